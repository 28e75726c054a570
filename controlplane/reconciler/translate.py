"""From a plan to guarded transactions, with the events that tell why. Pure.

In come the plan, the records that it was made from and what only the leader knows (token, time); out come
transactions: one a deployment, or a few where it has very many replicas. Each compares the revision of
every key that it writes, of the deployment's spec, and (added at commit) the leader's key. An order to
drain and its endpoint's state are always written together.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from google.protobuf.message import Message
from millrace.core.v1 import deployment_pb2, endpoint_pb2, replica_pb2, types_pb2
from millrace.state.v1 import records_pb2

from controlplane.knowledge.environments import Environments
from controlplane.reconciler.endpoints import endpoints, measured_start
from controlplane.reconciler.launches import launch_of
from controlplane.reconciler.rollouts import keep_autoscale, launched_record, record_rollout
from controlplane.reconciler.view import Grouped, View
from controlplane.scheduler import Conclusion, Condition, Drain, Place, Plan, Remove, Truth
from controlplane.scheduler.conclude import UNPLACED
from controlplane.scheduler.preempt import preemptors
from controlplane.status import AVAILABLE, PROGRESSING, SCHEDULED
from core.clock import to_timestamp
from core.states import DeviceKind, Engine
from core.store import Compare, Delete, Operation, Put, keys

# Below the store's 128, so that the guards fit beside them.
OPERATIONS_MAX = 100

_ENGINES = {int(each): each for each in Engine}
_KINDS = {int(each): each for each in DeviceKind}
_STATUS = {
    Truth.TRUE: types_pb2.CONDITION_STATUS_TRUE,
    Truth.FALSE: types_pb2.CONDITION_STATUS_FALSE,
    Truth.UNKNOWN: types_pb2.CONDITION_STATUS_UNKNOWN,
}


@dataclass(frozen=True, slots=True)
class Notice:
    """An event to emit once its transaction has been committed."""

    namespace: str
    deployment: str
    reason: str
    message: str
    replica: str = ""
    node: str = ""
    warning: bool = False


@dataclass(slots=True)
class Transaction:
    """Writes that belong together.

    Attributes:
        deployment: Whose.
        operations: What to write.
        compares: What must hold for it.
        notices: What to tell afterwards.
        preempted_by: Deployment for which a replica makes room; empty for none.
        concludes: True when it writes the deployment's conclusion.
        rests_on: Deployments whose transactions come before and must all have been committed.
    """

    deployment: str
    operations: list[Operation] = field(default_factory=list)
    compares: list[Compare] = field(default_factory=list)
    notices: list[Notice] = field(default_factory=list)
    preempted_by: str = ""
    concludes: bool = False
    rests_on: frozenset[str] = frozenset()

    def write(self, key: str, value: Message, revision: int) -> None:
        """Adds a guarded put."""
        self.operations.append(Put(key, value.SerializeToString(deterministic=True)))
        self.compares.append(Compare(key, mod_revision=revision))

    def delete(self, key: str, revision: int) -> None:
        """Adds a guarded deletion."""
        self.operations.append(Delete(key))
        self.compares.append(Compare(key, mod_revision=revision))

    def absorb(self, other: "Transaction") -> None:
        """Takes over another's writes."""
        self.operations += other.operations
        self.compares += other.compares
        self.notices += other.notices


@dataclass(frozen=True, slots=True)
class _Orders:
    """The plan of one deployment."""

    place: list[Place] = field(default_factory=list)
    drain: dict[str, Drain] = field(default_factory=dict)
    remove: dict[str, Remove] = field(default_factory=dict)


def translate(
    plan: Plan,
    view: View,
    *,
    now: datetime,
    fencing_token: int,
    touched: Iterable[str] | None = None,
    environments: Environments | None = None,
) -> list[Transaction]:
    """Turns a plan into transactions; deployments about which nothing changes get none.

    They are to be committed in their order: replicas that replace pre-empted ones rest on the orders that
    end those, which are the pre-empting deployment's to commit.

    Args:
        plan: What to do.
        view: The records that it was made from.
        now: The present.
        fencing_token: The leader's.
        touched: Deployments of which a record has changed since they were last translated, beside those
            that the plan speaks of; all of them where it is None.
        environments: What engines need on which hardware; nothing where it is None.
    """
    orders: dict[str, _Orders] = {}
    for place in plan.place:
        orders.setdefault(place.deployment, _Orders()).place.append(place)
    for drain in plan.drain:
        orders.setdefault(drain.deployment, _Orders()).drain[drain.replica] = drain
    for remove in plan.remove:
        orders.setdefault(remove.deployment, _Orders()).remove[remove.replica] = remove
    conclusions = {each.deployment: each for each in plan.conclusions}
    grouped = view.grouped if view.grouped is not None else Grouped(view)
    if touched is None:
        concluded = (key.removeprefix(keys.PLAN_DEPLOYMENTS) for key in view.conclusions)
        touched = {*grouped.names(keys.SERVE_ENDPOINTS), *concluded}
    evictions: dict[str, list[Transaction]] = {}
    units: dict[str, list[Transaction]] = {}
    guards: dict[str, Compare] = {}
    for name in sorted({*orders, *conclusions, *touched}):
        scribe = _Scribe(
            name=name,
            view=view,
            now=now,
            fencing_token=fencing_token,
            orders=orders.get(name, _Orders()),
            assignments=grouped.of(keys.PLAN_REPLICAS, name),
            observations=grouped.of(keys.ACTUAL_REPLICAS, name),
            published=grouped.of(keys.SERVE_ENDPOINTS, name),
            environments=environments or Environments(),
        )
        guards[name] = scribe.spec_guard()
        for unit in scribe.units(conclusions.get(name)):
            if unit.preempted_by:
                unit.compares.append(guards[name])
                evictions.setdefault(unit.preempted_by, []).append(unit)
            else:
                units.setdefault(name, []).append(unit)
    transactions: list[Transaction] = []
    waits_for = preemptors(plan.drain)
    for name, own in units.items():
        for unit in own if name in evictions else ():
            if unit.concludes:
                # Who makes room and for whom it is kept are written together, or not at all.
                for eviction in evictions[name]:
                    unit.absorb(eviction)
        transactions += _packed(name, own, guards[name], waits_for.get(name, frozenset()))
    # Nobody who is pre-empted pre-empts in the same plan, so that two steps are enough.
    return sorted(transactions, key=lambda each: bool(each.rests_on))


def _packed(
    name: str, units: Iterable[Transaction], guard: Compare, rests_on: frozenset[str]
) -> list[Transaction]:
    """Fills transactions with whole units, each guarded by the deployment's spec."""
    packed: list[Transaction] = []
    for unit in units:
        if not unit.operations:
            continue
        if not packed or len(packed[-1].operations) + len(unit.operations) > OPERATIONS_MAX:
            packed.append(Transaction(name, compares=[guard], rests_on=rests_on))
        packed[-1].absorb(unit)
    return packed


@dataclass(frozen=True, slots=True)
class _Scribe:
    """Writes down the plan of one deployment."""

    name: str
    view: View
    now: datetime
    fencing_token: int
    orders: _Orders
    assignments: Mapping[str, Message]
    observations: Mapping[str, Message]
    published: Mapping[str, Message]
    environments: Environments

    def spec_guard(self) -> Compare:
        """The plan holds only while the spec is the one that it was made from."""
        key = keys.SPEC_DEPLOYMENTS + self.name
        return Compare(key, mod_revision=self.view.revisions(key))

    def units(self, conclusion: Conclusion | None) -> Iterator[Transaction]:
        """One unit for each replica that changes, and one for the conclusion."""
        after = self._assignments_after()
        present: dict[str, endpoint_pb2.Endpoint] = {
            replica: each
            for replica, each in self.published.items()
            if isinstance(each, endpoint_pb2.Endpoint)
        }
        wanted = endpoints(after, self._typed_observations(), present, self._agent_targets(after))
        for replica in sorted({*self.assignments, *after, *present}):
            drain = self.orders.drain.get(replica)
            unit = Transaction(self.name, preempted_by=drain.preempted_by if drain is not None else "")
            self._order(unit, replica, after.get(replica))
            self._endpoint(unit, replica, wanted.get(replica), present.get(replica))
            unit.notices += self._notices(replica)
            yield unit
        yield self._served(measured_start(after, wanted, present, self.now))
        yield self._conclusion(conclusion)

    def _served(self, start: timedelta | None) -> Transaction:
        """What routers need to know beside the endpoints, while there is a deployment."""
        unit, key = Transaction(self.name), keys.SERVE_DEPLOYMENTS + self.name
        spec = self.view.deployments.get(keys.SPEC_DEPLOYMENTS + self.name)
        if spec is None and key in self.view.served:
            unit.delete(key, self.view.revisions(key))
        elif spec is not None and start is not None:
            served = records_pb2.ServedDeploymentRecord(
                namespace=spec.namespace, name=spec.name, deployment_uid=spec.uid
            )
            served.start_duration.FromTimedelta(start)
            served.measure_time.CopyFrom(to_timestamp(self.now))
            unit.write(key, served, self.view.revisions(key))
        return unit

    def _agent_targets(self, assignments: Mapping[str, replica_pb2.ReplicaAssignment]) -> dict[str, str]:
        nodes = {each.node for each in assignments.values()}
        records = {node: self.view.nodes.get(keys.ACTUAL_NODES + node) for node in nodes}
        return {
            node: record.inventory.agent_target
            for node, record in records.items()
            if record is not None and record.inventory.agent_target
        }

    def _typed_observations(self) -> dict[str, replica_pb2.ReplicaObservation]:
        return {
            replica: each
            for replica, each in self.observations.items()
            if isinstance(each, replica_pb2.ReplicaObservation)
        }

    def _assignments_after(self) -> dict[str, replica_pb2.ReplicaAssignment]:
        after: dict[str, replica_pb2.ReplicaAssignment] = {}
        for replica, before in self.assignments.items():
            assert isinstance(before, replica_pb2.ReplicaAssignment)
            if replica in self.orders.remove:
                continue
            drain = self.orders.drain.get(replica)
            after[replica] = before if drain is None else self._drained(before, drain)
        for place in self.orders.place:
            after[place.replica] = self._placed(place)
        return after

    def _drained(self, before: replica_pb2.ReplicaAssignment, drain: Drain) -> replica_pb2.ReplicaAssignment:
        drained = replica_pb2.ReplicaAssignment()
        drained.CopyFrom(before)
        drained.desired_state = types_pb2.REPLICA_STATE_DRAINING
        drained.drain_deadline_time.CopyFrom(to_timestamp(drain.deadline))
        drained.fencing_token = self.fencing_token
        drained.preempted_by = drain.preempted_by
        return drained

    def _placed(self, place: Place) -> replica_pb2.ReplicaAssignment:
        record = self._launched(place)
        return replica_pb2.ReplicaAssignment(
            namespace=record.namespace,
            deployment=record.name,
            deployment_uid=record.uid,
            replica=place.replica,
            generation=place.generation,
            node=place.node,
            devices=[
                replica_pb2.DeviceClaim(device_id=claim.device_id, memory_bytes=claim.memory_bytes)
                for claim in place.claims
            ],
            launch=self._suited(launch_of(record, place.external_url), place),
            desired_state=types_pb2.REPLICA_STATE_READY,
            fencing_token=self.fencing_token,
            create_time=to_timestamp(self.now),
        )

    def _suited(self, launch: replica_pb2.LaunchSpec, place: Place) -> replica_pb2.LaunchSpec:
        """The launch with what the node's hardware asks for; what the user says wins."""
        node = self.view.nodes.get(keys.ACTUAL_NODES + place.node)
        claimed = {each.device_id for each in place.claims}
        devices = [each for each in node.inventory.devices if each.id in claimed] if node is not None else []
        if not devices or devices[0].kind not in _KINDS or launch.engine not in _ENGINES:
            return launch
        device = devices[0]
        row = self.environments.find(_ENGINES[launch.engine], _KINDS[device.kind], device.product)
        if row is not None:
            launch.image_family, launch.image = row.family, row.image
            launch.extra_args.update(row.arguments_beside(launch.extra_args.fields))
        return launch

    def _launched(self, place: Place) -> records_pb2.DeploymentRecord:
        """The record that a replica is started from: after a roll back, with the launch that served last."""
        record = self.view.deployments[keys.SPEC_DEPLOYMENTS + self.name]
        concluded = self.view.conclusions.get(keys.PLAN_DEPLOYMENTS + self.name)
        return launched_record(record, place.generation, concluded)

    def _order(self, unit: Transaction, replica: str, after: replica_pb2.ReplicaAssignment | None) -> None:
        key = f"{keys.PLAN_REPLICAS}{self.name}/{replica}"
        before = self.assignments.get(replica)
        if after is None and before is not None:
            unit.delete(key, self.view.revisions(key))
        elif after is not None and after != before:
            unit.write(key, after, self.view.revisions(key))

    def _endpoint(
        self,
        unit: Transaction,
        replica: str,
        wanted: endpoint_pb2.Endpoint | None,
        present: endpoint_pb2.Endpoint | None,
    ) -> None:
        key = f"{keys.SERVE_ENDPOINTS}{self.name}/{replica}"
        if wanted is None and present is not None:
            unit.delete(key, self.view.revisions(key))
        elif wanted is not None and wanted != present:
            unit.write(key, wanted, self.view.revisions(key))

    def _conclusion(self, conclusion: Conclusion | None) -> Transaction:
        unit = Transaction(self.name, concludes=True)
        key = keys.PLAN_DEPLOYMENTS + self.name
        before = self.view.conclusions.get(key)
        revision = self.view.revisions(key)
        if conclusion is None:
            if before is not None and keys.SPEC_DEPLOYMENTS + self.name not in self.view.deployments:
                unit.delete(key, revision)
            return unit
        spec = self.view.deployments[keys.SPEC_DEPLOYMENTS + self.name]
        if before is not None and before.deployment_uid != spec.uid:
            before = None
        after = records_pb2.DeploymentPlanRecord(
            namespace=spec.namespace,
            name=spec.name,
            deployment_uid=spec.uid,
            observed_generation=spec.generation,
            conditions=[
                self._condition(SCHEDULED, conclusion.scheduled, before),
                self._condition(AVAILABLE, conclusion.available, before),
            ],
        )
        self._failure(after, conclusion, before)
        _write_preemption(after, conclusion)
        keep_autoscale(after, before, spec)
        told = record_rollout(after, before, spec, conclusion, after.last_failure.log_tail)
        if conclusion.progressing is not None:
            message = conclusion.progressing.message + told.addition
            progressing = replace(conclusion.progressing, message=message)
            after.conditions.append(self._condition(PROGRESSING, progressing, before))
        if after != before:
            unit.write(key, after, revision)
            if told.reason:
                unit.notices.append(self._notice(told.reason, told.message, warning=told.warning))
            if conclusion.scheduled.reason in UNPLACED and not _was_unschedulable(before):
                message = conclusion.scheduled.message
                unit.notices.append(self._notice("Unschedulable", message, warning=True))
        return unit

    def _condition(
        self, kind: str, condition: Condition, before: records_pb2.DeploymentPlanRecord | None
    ) -> deployment_pb2.Condition:
        status = _STATUS[condition.status]
        earlier = next((each for each in before.conditions if each.type == kind), None) if before else None
        kept = earlier is not None and earlier.status == status
        return deployment_pb2.Condition(
            type=kind,
            status=status,
            reason=condition.reason,
            message=condition.message,
            transition_time=earlier.transition_time if earlier and kept else to_timestamp(self.now),
        )

    def _failure(
        self,
        after: records_pb2.DeploymentPlanRecord,
        conclusion: Conclusion,
        before: records_pb2.DeploymentPlanRecord | None,
    ) -> None:
        failure = conclusion.failure
        if failure is None:
            return
        after.last_failure.replica = failure.replica
        after.last_failure.node = failure.node
        after.last_failure.message = failure.message
        after.last_failure.time.CopyFrom(to_timestamp(failure.time))
        after.last_failure.consecutive_failures = failure.consecutive
        after.last_failure.generation = failure.generation
        if failure.next_attempt is not None:
            after.last_failure.next_attempt_time.CopyFrom(to_timestamp(failure.next_attempt))
        observed = self.observations.get(failure.replica)
        if before is not None and before.last_failure.replica == failure.replica:
            after.last_failure.log_tail.extend(before.last_failure.log_tail)
        elif isinstance(observed, replica_pb2.ReplicaObservation):
            after.last_failure.log_tail.extend(observed.log_tail)

    def _notices(self, replica: str) -> Iterator[Notice]:
        assignment = self.assignments.get(replica)
        node = assignment.node if isinstance(assignment, replica_pb2.ReplicaAssignment) else ""
        drain, remove = self.orders.drain.get(replica), self.orders.remove.get(replica)
        if drain is not None and drain.preempted_by:
            message = f"{replica} makes room: {drain.why}"
            yield self._notice("Preempted", message, replica=replica, node=node, warning=True)
        elif drain is not None:
            yield self._notice("Draining", f"{replica} drains: {drain.why}", replica=replica, node=node)
        if remove is not None:
            yield self._removal(remove, node)
        gone = [
            each
            for _, each in sorted(self.orders.remove.items())
            if each.reason in {"ReplicaFailed", "NodeLost"}
        ]
        for index, place in enumerate(self.orders.place):
            if place.replica != replica:
                continue
            message = f"{replica} is placed on node {place.node}: {place.why}"
            yield self._notice("Scheduled", message, replica=replica, node=place.node)
            if index < len(gone):
                message = f"{gone[index].replica} is replaced by {replica} on node {place.node}"
                yield self._notice("ReplicaReplaced", message, replica=replica, node=place.node)

    def _removal(self, remove: Remove, node: str) -> Notice:
        match remove.reason:
            case "ReplicaFailed":
                observed = self.observations.get(remove.replica)
                lines = observed.log_tail if isinstance(observed, replica_pb2.ReplicaObservation) else []
                last = next((line.strip() for line in reversed(lines) if line.strip()), "")
                message = f"{remove.replica} failed: {remove.why}" + (
                    f" (last log line: {last})" if last else ""
                )
                return self._notice("ReplicaFailed", message, replica=remove.replica, node=node, warning=True)
            case "NodeLost":
                message = f"{remove.replica} is given up: {remove.why}"
                return self._notice("ReplicaLost", message, replica=remove.replica, node=node, warning=True)
            case _:
                message = f"{remove.replica} is removed: {remove.why}"
                return self._notice("Removed", message, replica=remove.replica, node=node)

    def _notice(
        self, reason: str, message: str, *, replica: str = "", node: str = "", warning: bool = False
    ) -> Notice:
        namespace, _, deployment = self.name.partition("/")
        return Notice(namespace, deployment, reason, message, replica, node, warning)


def _write_preemption(after: records_pb2.DeploymentPlanRecord, conclusion: Conclusion) -> None:
    for each in conclusion.reservations:
        kept = after.reservations.add(
            node=each.node,
            devices=[
                replica_pb2.DeviceClaim(device_id=claim.device_id, memory_bytes=claim.memory_bytes)
                for claim in each.claims
            ],
            victims=each.victims,
        )
        kept.deadline_time.CopyFrom(to_timestamp(each.deadline))
    lost = conclusion.preemption
    if lost is not None:
        after.preemption.deployment = lost.by
        after.preemption.priority = lost.by_priority
        after.preemption.replica = lost.replica
        after.preemption.node = lost.node
        after.preemption.time.CopyFrom(to_timestamp(lost.time))


def _was_unschedulable(record: records_pb2.DeploymentPlanRecord | None) -> bool:
    return record is not None and any(
        each.type == SCHEDULED and each.reason in UNPLACED for each in record.conditions
    )
