"""A simulated cluster for the scheduler: agents obey, time moves by steps, and every promise is checked.

Hypothesis draws clusters; `World` carries plans out as the reconciler would (a pre-emption is one
transaction, and single transactions may be lost), and plans twice each time: by a planner that lives on
and by one that looks at everything. Both must say the same.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

from hypothesis import strategies as st

from controlplane.scheduler import (
    DeploymentView,
    DeviceView,
    EngineView,
    Launch,
    Limits,
    Need,
    NodeView,
    Pin,
    Plan,
    Planner,
    Policy,
    Quota,
    ReplicaView,
    Snapshot,
    Taint,
    Toleration,
    effective,
    plan,
)
from controlplane.scheduler.preempt import preemptors
from core.states import DeviceKind, Engine, NodeState, ReplicaState, TaintEffect

GIB = 1 << 30
START = datetime(2030, 1, 1, tzinfo=UTC)
POLICY = Policy()

ENGINES = (
    EngineView(Engine.VLLM, frozenset({DeviceKind.CPU, DeviceKind.NVIDIA})),
    EngineView(Engine.SIMULATOR, frozenset({DeviceKind.CPU})),
)


TALLY: Counter[str] = Counter()
"""How many clusters, steps of time, plans and pre-empting plans this process has tried."""


@dataclass
class World:
    """A cluster whose agents obey; time moves by `step`."""

    nodes: dict[str, NodeView] = field(default_factory=dict)
    deployments: dict[str, DeploymentView] = field(default_factory=dict)
    replicas: dict[str, ReplicaView] = field(default_factory=dict)
    quotas: dict[str, Quota] = field(default_factory=dict)
    now: datetime = START
    ids: "itertools.count[int]" = field(default_factory=itertools.count)
    fails: Callable[[str], bool] = lambda _: False
    broken_generations: frozenset[int] = frozenset()
    planner: Planner = field(default_factory=lambda: Planner(POLICY), repr=False)

    def snapshot(self) -> Snapshot:
        return Snapshot(dict(self.deployments), dict(self.nodes), dict(self.replicas), dict(self.quotas))

    def plan(self) -> Plan:
        """Plans by what changed, and compares with a plan that looks at everything."""
        self.planner.books.load(self.snapshot())
        first = next(self.ids) * 1000
        made = self.planner.plan(self.now, _numbered(first))
        full = plan(self.snapshot(), self.now, _numbered(first), POLICY)
        TALLY["plans"] += 1
        TALLY["plans that pre-empt"] += any(each.preempted_by for each in made.drain)
        victims = {each.deployment for each in made.drain if each.preempted_by}
        both = any(each.deployment in victims and not each.preempted_by for each in made.drain)
        TALLY["plans that pre-empt from who gives up"] += both
        assert _without_names(made) == _without_names(full)
        assert self.planner.conclusions == {each.deployment: each for each in full.conclusions}
        assert (made.retry_after, made.frozen) == (full.retry_after, full.frozen)
        return made

    def apply(self, made: Plan, lost: Iterable[str] = ()) -> None:
        """Carries a plan out, but for the transactions of some deployments and those that rest on them."""
        lost = set(lost)
        lost |= {key for key, others in preemptors(made.drain).items() if others & lost}
        before = dict(self.deployments)
        for remove in made.remove:
            if remove.deployment not in lost:
                del self.replicas[remove.replica]
        for drain in made.drain:
            # Victims and the room kept for their successor are one transaction.
            if (drain.preempted_by or drain.deployment) not in lost:
                self.replicas[drain.replica] = replace(
                    self.replicas[drain.replica],
                    draining=True,
                    drain_deadline=drain.deadline,
                    preempted_by=drain.preempted_by,
                )
        for place in made.place:
            owner = before[place.deployment]
            assert place.replica not in self.replicas
            if place.deployment in lost:
                continue
            self.replicas[place.replica] = ReplicaView(
                replica=place.replica,
                deployment=place.deployment,
                uid=owner.uid,
                generation=place.generation,
                node=place.node,
                claims=place.claims,
                draining=False,
                state=ReplicaState.ASSIGNED,
                created=self.now,
                external_url=place.external_url,
            )
        for conclusion in made.conclusions:
            view = before[conclusion.deployment]
            if view.key not in lost:
                good = view.good
                if conclusion.good_generation == view.declared_generation:
                    good = Launch(view.declared_generation, view.need)
                self.deployments[view.key] = effective(
                    replace(
                        view,
                        failure=conclusion.failure,
                        observed_generation=view.generation,
                        reservations=conclusion.reservations,
                        preemption=conclusion.preemption,
                        progress=conclusion.progress,
                        good=good,
                    )
                )
        self.planner.look_again(lost)

    def step(self, seconds: float = 1.0) -> None:
        """Every agent that can be heard advances each of its replicas by one state."""
        TALLY["steps"] += 1
        self.now += timedelta(seconds=seconds)
        for key, replica in self.replicas.items():
            if self.nodes[replica.node].state is NodeState.READY:
                self.replicas[key] = self._advanced(replica)

    def _advanced(self, replica: ReplicaView) -> ReplicaView:
        seen = replace(replica, observed=True)
        if replica.state.terminal:
            return seen
        if replica.draining and replica.state is ReplicaState.DRAINING:
            ended = ReplicaState.PREEMPTED if replica.preempted_by else ReplicaState.STOPPED
            return replace(seen, state=ended, state_time=self.now)
        if replica.draining:
            # It holds its memory for a while.
            return replace(seen, state=ReplicaState.DRAINING, state_time=self.now)
        if replica.state is ReplicaState.ASSIGNED:
            return replace(seen, state=ReplicaState.STARTING, state_time=self.now)
        broken = self.fails(replica.node) or replica.generation in self.broken_generations
        if replica.state is ReplicaState.STARTING and broken:
            return replace(seen, state=ReplicaState.FAILED, state_time=self.now, message="it crashed")
        if replica.state is ReplicaState.STARTING:
            seen = replace(seen, state=ReplicaState.READY, state_time=self.now, ready_time=self.now)
        return seen

    def round(self, lost: Iterable[str] = ()) -> Plan:
        """Plans, checks, carries out, checks."""
        made = self.plan()
        self.check(made)
        TALLY["rounds with lost transactions"] += bool(lost)
        self.apply(made, lost)
        self.check_state()
        return made

    def settle(self, rounds: int = 80) -> int:
        """Plans and advances until nothing changes any more; returns the rounds it took."""
        for count in range(rounds):
            made = self.round()
            again = self.plan()
            assert again.empty, f"not stable: {again}"
            # Nobody wrote down what it concluded.
            self.planner.look_again(each.deployment for each in again.conclusions)
            before = dict(self.replicas)
            self.step()
            if made.empty and before == self.replicas:
                return count
        raise AssertionError(f"does not converge: {self.plan()}")

    def check(self, made: Plan) -> None:
        """What a plan promises."""
        for place in made.place:
            node, owner = self.nodes[place.node], self.deployments[place.deployment]
            assert node.state is NodeState.READY
            assert not node.cordoned
            assert not node.draining
            assert all(each.tolerated_by(owner.need.tolerations) for each in node.taints)
            assert set(owner.need.node_selector) <= node.labels
        for drain in made.drain:
            if drain.preempted_by:
                assert (
                    self.deployments[drain.preempted_by].priority
                    > self.deployments[drain.deployment].priority
                )
        removed = {each.replica for each in made.remove}
        victims = {each.replica for each in made.drain if each.preempted_by}
        gone = {each.replica for each in made.drain} | removed
        for key, view in self.deployments.items():
            members = [
                each for each in self.replicas.values() if each.deployment == key and each.uid == view.uid
            ]
            serving = [each for each in members if each.serves and each.replica not in victims]
            kept = [each for each in serving if each.replica not in gone]
            lost = [
                each
                for each in serving
                if each.replica in removed and self.nodes[each.node].state is NodeState.LOST
            ]
            unavailable = _unavailable(view)
            if any(each.deployment == key and "successor needs" in each.why for each in made.drain):
                assert view.limits.unavailable != 0
                unavailable = max(1, unavailable)
            floor = min(len(serving) - len(lost), max(0, view.desired - unavailable))
            assert len(kept) >= floor, f"{key}: {len(serving)} served, only {len(kept)} are kept"

    def check_state(self) -> None:
        """What holds in every state of the world."""
        self._check_room()
        self._check_quotas()
        for key, view in self.deployments.items():
            live = [
                each
                for each in self.replicas.values()
                if each.deployment == key
                and each.uid == view.uid
                and not each.draining
                and not each.state.terminal
                and self.nodes[each.node].state is not NodeState.LOST
            ]
            fresh = [each for each in live if each.created == self.now]
            surge = POLICY.surge if view.limits.surge is None else view.limits.surge
            assert len(live) <= view.desired + surge or not fresh, f"{key}: {len(live)} of {view.desired}"

    def _check_room(self) -> None:
        """No device is oversold, and nobody takes room that is kept for another."""
        claimed: dict[tuple[str, str], int] = {}
        promised: dict[tuple[str, str], int] = {}
        victims = {
            victim
            for view in self.deployments.values()
            for each in view.reservations
            for victim in each.victims
        }
        for replica in self.replicas.values():
            for claim in replica.claims if not replica.state.terminal else ():
                slot = (replica.node, claim.device_id)
                claimed[slot] = claimed.get(slot, 0) + claim.memory_bytes
                if replica.replica not in victims:
                    promised[slot] = promised.get(slot, 0) + claim.memory_bytes
        for view in self.deployments.values():
            for each in view.reservations:
                for claim in each.claims:
                    slot = (each.node, claim.device_id)
                    promised[slot] = promised.get(slot, 0) + claim.memory_bytes
        totals = {
            (node.name, device.device_id): device.memory_bytes
            for node in self.nodes.values()
            for device in node.devices
        }
        for slot, amount in claimed.items():
            assert amount <= totals[slot], f"{slot} is oversold"
        for slot, amount in promised.items():
            assert amount <= totals[slot], f"{slot} is promised twice"

    def _check_quotas(self) -> None:
        """Nothing new is placed beyond a quota; a quota that was lowered takes nothing away."""
        for namespace, quota in self.quotas.items():
            held = [each for each in self.replicas.values() if each.deployment.startswith(namespace + "/")]
            if not any(each.created == self.now for each in held):
                continue
            devices = {(each.node, claim.device_id) for each in held for claim in each.claims}
            assert quota.replicas is None or len(held) <= quota.replicas
            fresh = {(e.node, c.device_id) for e in held if e.created == self.now for c in e.claims}
            old = {(e.node, c.device_id) for e in held if e.created != self.now for c in e.claims}
            assert quota.devices is None or len(devices) <= quota.devices or fresh <= old


def _unavailable(view: DeploymentView) -> int:
    """How many replicas an update may take from the wanted number, whatever has room."""
    if view.limits.unavailable is not None:
        return view.limits.unavailable
    return 0 if view.limits.surge is None or view.limits.surge > 0 else 1


def _numbered(first: int) -> Callable[[str], str]:
    ids = itertools.count(first)
    return lambda key: f"{key.split('/')[1]}-{next(ids):06d}"


def _without_names(made: Plan) -> tuple[object, ...]:
    """A plan without the identifiers of new replicas."""
    return tuple(replace(each, replica="") for each in made.place), made.drain, made.remove


TAINTS = (
    Taint("dedicated", "research", TaintEffect.NO_SCHEDULE),
    Taint("maintenance", "", TaintEffect.NO_EXECUTE),
)
ZONES = ("north", "south")


@st.composite
def node_views(draw: st.DrawFn, name: str) -> NodeView:
    gpus = draw(st.integers(0, 4))
    devices = [DeviceView("cpu", DeviceKind.CPU, draw(st.integers(2, 32)) * GIB)]
    devices += [DeviceView(f"gpu-{index}", DeviceKind.NVIDIA, 80 * GIB) for index in range(gpus)]
    return NodeView(
        name=name,
        state=NodeState.READY,
        cordoned=draw(st.integers(0, 4)) == 4,
        draining=False,
        devices=tuple(devices),
        engines=ENGINES,
        labels=frozenset({("zone", draw(st.sampled_from(ZONES)))}),
        taints=(draw(st.sampled_from(TAINTS)),) if draw(st.integers(0, 6)) == 6 else (),
        cached_models=frozenset(draw(st.sets(st.sampled_from(["small", "large"])))),
        heat=draw(st.one_of(st.none(), st.floats(0, 1))),
    )


@st.composite
def needs(draw: st.DrawFn) -> Need:
    limits = Need(
        Engine.VLLM,
        model=draw(st.sampled_from(["", "small", "large"])),
        node_selector=(("zone", draw(st.sampled_from(ZONES))),) if draw(st.integers(0, 5)) == 5 else (),
        tolerations=(Toleration("dedicated"),) if draw(st.booleans()) else (),
    )
    if draw(st.integers(0, 9)) == 9:
        return replace(limits, engine=Engine.SIMULATOR)
    if draw(st.booleans()):
        memory = draw(st.integers(1, 12)) * GIB
        return replace(limits, device_kinds=(DeviceKind.CPU,), device_count=1, memory_bytes=memory)
    count = draw(st.sampled_from([1, 1, 2, 4]))
    kinds = (DeviceKind.NVIDIA, DeviceKind.CPU)
    return replace(
        limits,
        device_kinds=kinds,
        device_count=count,
        memory_bytes=count * draw(st.integers(5, 90)) * GIB,
    )


@st.composite
def pins(draw: st.DrawFn, world: World, need: Need) -> tuple[Pin, ...]:
    """Devices chosen by hand, sensibly or not."""
    if draw(st.integers(0, 5)) < 5:
        return ()
    node = draw(st.sampled_from(sorted(world.nodes)))
    devices = [each.device_id for each in world.nodes[node].devices]
    return (Pin(node, tuple(devices[-max(1, need.device_count) :])),)


@st.composite
def limits(draw: st.DrawFn) -> Limits:
    """What an update may do; not to be stuck, it may go above or below the wanted number."""
    surge = draw(st.sampled_from([None, 0, 1, 2]))
    unavailable = draw(st.sampled_from([None, 1, 2] if surge == 0 else [None, 0, 1, 2]))
    return Limits(surge=surge, unavailable=unavailable)


@st.composite
def worlds(draw: st.DrawFn, priorities: tuple[int, ...] = (2, 5, 8)) -> World:
    world = World()
    TALLY["clusters"] += 1
    for index in range(draw(st.integers(1, 5))):
        name = f"node-{index}"
        world.nodes[name] = draw(node_views(name))
    for index in range(draw(st.integers(1, 4))):
        key = f"{draw(st.sampled_from(['team', 'lab']))}/model-{index}"
        need = draw(needs())
        world.deployments[key] = DeploymentView(
            key=key,
            uid=f"uid-{index}",
            generation=1,
            launch_generation=1,
            desired=draw(st.integers(0, 5)),
            need=need,
            limits=draw(limits()) if draw(st.booleans()) else Limits(),
            priority=draw(st.sampled_from(priorities)),
            pins=draw(pins(world, need)),
        )
    if draw(st.integers(0, 2)) == 2:
        world.quotas["team"] = draw(quotas)
    return world


crowding_needs = st.builds(
    lambda count, memory, zone: Need(
        Engine.VLLM,
        (DeviceKind.NVIDIA,),
        count,
        count * memory * GIB,
        node_selector=(("zone", zone),) if zone else (),
    ),
    st.sampled_from([1, 1, 2]),
    st.sampled_from([20, 40, 80]),
    st.sampled_from(["", "", *ZONES]),
)


@st.composite
def crowds(draw: st.DrawFn) -> World:
    """A small cluster that is nearly full of deployments with several replicas each, none as important."""
    world = World()
    TALLY["clusters"] += 1
    for index in range(draw(st.integers(1, 3))):
        name = f"node-{index}"
        gpus = draw(st.integers(1, 3))
        devices = tuple(DeviceView(f"gpu-{each}", DeviceKind.NVIDIA, 80 * GIB) for each in range(gpus))
        labels = frozenset({("zone", ZONES[index % 2])})
        world.nodes[name] = NodeView(name, NodeState.READY, devices=devices, engines=ENGINES, labels=labels)
    for index in range(draw(st.integers(1, 3))):
        key = f"{draw(st.sampled_from(['team', 'lab']))}/model-{index}"
        world.deployments[key] = DeploymentView(
            key=key,
            uid=f"uid-{index}",
            generation=1,
            launch_generation=1,
            desired=draw(st.integers(1, 6)),
            need=draw(crowding_needs),
            limits=draw(limits()),
            priority=index + 1,
        )
    return world


quotas = st.builds(
    Quota, devices=st.one_of(st.none(), st.integers(0, 5)), replicas=st.one_of(st.none(), st.integers(0, 6))
)
