"""A reconciler with everything around it scripted: users, fleet and agents write straight to the store."""

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from typing import Self, TypeVar

from google.protobuf.message import Message
from millrace.core.v1 import deployment_pb2, endpoint_pb2, node_pb2, replica_pb2, sizing_pb2, types_pb2
from millrace.state.v1 import records_pb2

from controlplane.reconciler import Reconciler
from controlplane.status import deployment_status
from core.clock import Clock, to_timestamp
from core.store import Put, Store, keys
from core.store.election import Leadership
from core.tasks import cancel_and_wait
from tests.support.recorded_events import RecordedEvents

M = TypeVar("M", bound=Message)

GIB = 1 << 30
NAMESPACE = "team"


class ReconciledCluster:
    """Runs a reconciler on a store; its methods play everybody else's part."""

    def __init__(self, store: Store, clock: Clock, *, member_id: str = "member-a") -> None:
        self.store = store
        self.clock = clock
        self.events = RecordedEvents()
        self.leadership = Leadership(store, member_id, records_pb2.LeaderRecord(), clock=clock, ttl_seconds=5)
        self.reconciler = Reconciler(store, clock, self.leadership, self.events, drain_seconds=30)
        self.failing: set[str] = set()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self.reconciler.run(), name="reconciler")
        return self

    async def __aexit__(self, *_: object) -> None:
        await cancel_and_wait(self._task)

    async def read(self, prefix: str, kind: type[M]) -> dict[str, M]:
        page = await self.store.list(prefix)
        return {item.key.rpartition("/")[2]: kind.FromString(item.value) for item in page.items}

    async def put(self, key: str, value: Message) -> None:
        assert (await self.store.commit([Put(key, value.SerializeToString())])).succeeded

    async def add_node(
        self,
        name: str,
        *,
        memory_gib: int = 16,
        state: types_pb2.NodeState.ValueType = types_pb2.NODE_STATE_READY,
    ) -> None:
        engines = [
            node_pb2.EngineEnvironment(engine=engine, device_kinds=[types_pb2.DEVICE_KIND_CPU])
            for engine in (types_pb2.ENGINE_VLLM, types_pb2.ENGINE_SIMULATOR)
        ]
        cpu = node_pb2.Device(id="cpu", kind=types_pb2.DEVICE_KIND_CPU, memory_bytes=memory_gib * GIB)
        inventory = node_pb2.NodeInventory(node=name, devices=[cpu], engines=engines)
        record = records_pb2.NodeObservationRecord(inventory=inventory, state=state)
        await self.put(keys.actual_node(name), record)

    async def set_node(self, name: str, *, cordoned: bool = False, draining: bool = False) -> None:
        spec = node_pb2.NodeSpec(cordoned=cordoned, draining=draining)
        await self.put(keys.spec_node(name), records_pb2.NodeRecord(node=name, spec=spec))

    async def declare(
        self,
        name: str,
        *,
        replicas: int = 1,
        memory_gib: int = 4,
        urls: list[str] | None = None,
        priority: int | None = None,
    ) -> records_pb2.DeploymentRecord:
        engine = types_pb2.ENGINE_VLLM if urls is None else types_pb2.ENGINE_EXTERNAL
        spec = deployment_pb2.DeploymentSpec(model="org/model", engine=engine, priority=priority)
        sizing = sizing_pb2.Sizing()
        if urls is None:
            spec.replicas = replicas
            sizing = sizing_pb2.Sizing(
                total_bytes=memory_gib * GIB,
                kv_cache_bytes=1 << 26,
                device_count=1,
                tensor_parallel=1,
                max_model_len=2048,
                device_kinds=[types_pb2.DEVICE_KIND_CPU],
            )
        else:
            spec.extra_args.update({"urls": urls, "served_model_name": "their-name"})
        record = records_pb2.DeploymentRecord(
            namespace=NAMESPACE,
            name=name,
            uid=str(uuid.uuid4()),
            generation=1,
            launch_generation=1,
            spec=spec,
            sizing=sizing,
        )
        await self.put(keys.spec_deployment(NAMESPACE, name), record)
        return record

    async def change(
        self, name: str, *, replicas: int | None = None, relaunch: bool = False
    ) -> records_pb2.DeploymentRecord:
        key = keys.spec_deployment(NAMESPACE, name)
        found = await self.store.get(key)
        assert found is not None
        record = records_pb2.DeploymentRecord.FromString(found.value)
        record.generation += 1
        if replicas is not None:
            record.spec.replicas = replicas
        if relaunch:
            record.launch_generation += 1
        await self.put(key, record)
        return record

    async def assignments(self) -> dict[str, replica_pb2.ReplicaAssignment]:
        return await self.read(keys.PLAN_REPLICAS, replica_pb2.ReplicaAssignment)

    async def observations(self) -> dict[str, replica_pb2.ReplicaObservation]:
        return await self.read(keys.ACTUAL_REPLICAS, replica_pb2.ReplicaObservation)

    async def endpoints(self) -> dict[str, endpoint_pb2.Endpoint]:
        return await self.read(keys.SERVE_ENDPOINTS, endpoint_pb2.Endpoint)

    async def served(self) -> dict[str, records_pb2.ServedDeploymentRecord]:
        return await self.read(keys.SERVE_DEPLOYMENTS, records_pb2.ServedDeploymentRecord)

    async def concluded(self, name: str) -> records_pb2.DeploymentPlanRecord | None:
        found = await self.store.get(keys.plan_deployment(NAMESPACE, name))
        return None if found is None else records_pb2.DeploymentPlanRecord.FromString(found.value)

    async def status(self, name: str) -> deployment_pb2.DeploymentStatus:
        found = await self.store.get(keys.spec_deployment(NAMESPACE, name))
        assert found is not None
        own = [each for each in (await self.assignments()).values() if each.deployment == name]
        seen = [each for each in (await self.observations()).values() if each.deployment == name]
        record = records_pb2.DeploymentRecord.FromString(found.value)
        return deployment_status(record, await self.concluded(name), own, seen)

    async def report(
        self,
        assignment: replica_pb2.ReplicaAssignment,
        state: types_pb2.ReplicaState.ValueType,
        *,
        message: str = "",
        log_tail: tuple[str, ...] = (),
        healthy: bool = True,
    ) -> None:
        """What an agent and fleet do: one more fact about a replica."""
        before = (await self.observations()).get(assignment.replica, replica_pb2.ReplicaObservation())
        now = to_timestamp(self.clock.now())
        observation = replica_pb2.ReplicaObservation()
        observation.CopyFrom(before)
        observation.namespace = assignment.namespace
        observation.deployment = assignment.deployment
        observation.deployment_uid = assignment.deployment_uid
        observation.replica = assignment.replica
        observation.node = assignment.node
        observation.state = state
        observation.state_time.CopyFrom(now)
        observation.message = message
        observation.healthy = healthy
        del observation.log_tail[:]
        observation.log_tail.extend(log_tail)
        if state == types_pb2.REPLICA_STATE_STARTING:
            observation.start_time.CopyFrom(now)
            observation.url = (
                assignment.launch.external_url or f"http://{assignment.node}/{assignment.replica}"
            )
            observation.incarnation = uuid.uuid4().hex
        if state == types_pb2.REPLICA_STATE_READY and not before.HasField("ready_time"):
            observation.ready_time.CopyFrom(now)
        key = keys.actual_replica(assignment.namespace, assignment.deployment, assignment.replica)
        await self.put(key, observation)

    async def agents_step(self) -> None:
        """Every agent that answers takes each of its replicas one step on."""
        nodes = await self.read(keys.ACTUAL_NODES, records_pb2.NodeObservationRecord)
        seen = await self.observations()
        orders = await self.assignments()
        for replica, assignment in orders.items():
            if nodes[assignment.node].state != types_pb2.NODE_STATE_READY:
                continue
            state = seen[replica].state if replica in seen else types_pb2.REPLICA_STATE_UNSPECIFIED
            if state >= types_pb2.REPLICA_STATE_STOPPED:
                continue
            if assignment.desired_state == types_pb2.REPLICA_STATE_DRAINING:
                pre_empted = bool(assignment.preempted_by)
                await self.report(
                    assignment,
                    types_pb2.REPLICA_STATE_PREEMPTED if pre_empted else types_pb2.REPLICA_STATE_STOPPED,
                )
            elif state < types_pb2.REPLICA_STATE_STARTING:
                await self.report(assignment, types_pb2.REPLICA_STATE_STARTING)
            elif state == types_pb2.REPLICA_STATE_STARTING:
                if assignment.deployment in self.failing:
                    await self.fail(assignment)
                else:
                    await self.report(assignment, types_pb2.REPLICA_STATE_READY)

    async def fail(self, assignment: replica_pb2.ReplicaAssignment) -> None:
        """The engine ends by itself."""
        await self.report(
            assignment,
            types_pb2.REPLICA_STATE_FAILED,
            message="the engine exited with status 1",
            log_tail=("loading weights", "RuntimeError: no such file", ""),
            healthy=False,
        )

    async def drive(
        self,
        reached: Callable[[], Awaitable[object]],
        *,
        timeout_seconds: float = 10.0,
        agents: bool = True,
    ) -> None:
        """Lets agents work until something holds."""
        async with asyncio.timeout(timeout_seconds):
            while not await reached():
                if agents:
                    await self.agents_step()
                await asyncio.sleep(0.002)

    async def idle(self) -> None:
        """Waits until the reconciler has nothing more to do."""
        for _ in range(500):
            before = (await self.store.list(keys.ROOT, keys_only=True)).revision
            await asyncio.sleep(0.005)
            if (await self.store.list(keys.ROOT, keys_only=True)).revision == before:
                return
        raise AssertionError("the cluster does not come to rest")
