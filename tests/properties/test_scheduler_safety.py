"""Generated clusters, a simulated world, and what must hold whatever happens in it."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from controlplane.scheduler import (
    DeploymentView,
    DeviceView,
    EngineView,
    Need,
    NodeView,
    Plan,
    Policy,
    ReplicaView,
    Snapshot,
    plan,
)
from core.states import DeviceKind, Engine, NodeState, ReplicaState

GIB = 1 << 30
START = datetime(2030, 1, 1, tzinfo=UTC)
POLICY = Policy()
QUICK = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@dataclass
class World:
    """A cluster whose agents obey; time moves by `step`."""

    nodes: dict[str, NodeView] = field(default_factory=dict)
    deployments: dict[str, DeploymentView] = field(default_factory=dict)
    replicas: dict[str, ReplicaView] = field(default_factory=dict)
    now: datetime = START
    ids: "itertools.count[int]" = field(default_factory=itertools.count)
    fails: Callable[[str], bool] = lambda _: False

    def snapshot(self) -> Snapshot:
        return Snapshot(dict(self.deployments), dict(self.nodes), dict(self.replicas))

    def plan(self) -> Plan:
        ids = itertools.count(next(self.ids) * 1000)
        return plan(self.snapshot(), self.now, lambda key: f"{key.split('/')[1]}-{next(ids):06d}", POLICY)

    def apply(self, made: Plan) -> None:
        for remove in made.remove:
            del self.replicas[remove.replica]
        for drain in made.drain:
            replica = self.replicas[drain.replica]
            self.replicas[drain.replica] = replace(replica, draining=True, drain_deadline=drain.deadline)
        for place in made.place:
            owner = self.deployments[place.deployment]
            assert place.replica not in self.replicas
            self.replicas[place.replica] = ReplicaView(
                replica=place.replica,
                deployment=place.deployment,
                uid=owner.uid,
                generation=owner.launch_generation,
                node=place.node,
                claims=place.claims,
                draining=False,
                state=ReplicaState.ASSIGNED,
                created=self.now,
                external_url=place.external_url,
            )
        for conclusion in made.conclusions:
            view = self.deployments[conclusion.deployment]
            self.deployments[view.key] = replace(
                view, failure=conclusion.failure, observed_generation=view.generation
            )

    def step(self, seconds: float = 1.0) -> None:
        """Every agent that can be heard advances each of its replicas by one state."""
        self.now += timedelta(seconds=seconds)
        for key, replica in self.replicas.items():
            if self.nodes[replica.node].state is NodeState.READY:
                self.replicas[key] = self._advanced(replica)

    def _advanced(self, replica: ReplicaView) -> ReplicaView:
        seen = replace(replica, observed=True)
        if replica.state.terminal:
            return seen
        if replica.draining:
            # It holds its memory for a while.
            over = replica.state is ReplicaState.DRAINING
            state = ReplicaState.STOPPED if over else ReplicaState.DRAINING
            return replace(seen, state=state, state_time=self.now)
        if replica.state is ReplicaState.ASSIGNED:
            return replace(seen, state=ReplicaState.STARTING, state_time=self.now)
        if replica.state is ReplicaState.STARTING:
            if self.fails(replica.node):
                return replace(seen, state=ReplicaState.FAILED, state_time=self.now, message="it crashed")
            return replace(seen, state=ReplicaState.READY, state_time=self.now, ready_time=self.now)
        return seen

    def settle(self, rounds: int = 80) -> int:
        """Plans and advances until nothing changes any more; returns the rounds it took."""
        for count in range(rounds):
            made = self.plan()
            self.check(made)
            self.apply(made)
            self.check_state()
            again = self.plan()
            assert again.empty, f"not stable: {again}"
            before = dict(self.replicas)
            self.step()
            if made.empty and before == self.replicas:
                return count
        raise AssertionError(f"does not converge: {self.plan()}")

    def check(self, made: Plan) -> None:
        for place in made.place:
            node = self.nodes[place.node]
            assert node.state is NodeState.READY
            assert not node.cordoned
            assert not node.draining
            assert place.deployment in self.deployments
        drained = {each.replica for each in made.drain} | {each.replica for each in made.remove}
        for key, view in self.deployments.items():
            members = [
                each for each in self.replicas.values() if each.deployment == key and each.uid == view.uid
            ]
            serving = [each for each in members if each.serves]
            kept = [each for each in serving if each.replica not in drained]
            lost = [
                each
                for each in serving
                if each.replica in {removed.replica for removed in made.remove}
                and self.nodes[each.node].state is NodeState.LOST
            ]
            floor = min(len(serving) - len(lost), max(0, view.desired - 1))
            assert len(kept) >= floor, f"{key}: {len(serving)} served, only {len(kept)} are kept"

    def check_state(self) -> None:
        claimed: dict[tuple[str, str], int] = {}
        for replica in self.replicas.values():
            if replica.state.terminal:
                continue
            for claim in replica.claims:
                slot = (replica.node, claim.device_id)
                claimed[slot] = claimed.get(slot, 0) + claim.memory_bytes
        totals = {
            (node.name, device.device_id): device.memory_bytes
            for node in self.nodes.values()
            for device in node.devices
        }
        for slot, amount in claimed.items():
            assert amount <= totals[slot], f"{slot} is oversold"
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
            ceiling = view.desired + POLICY.surge
            fresh = [each for each in live if each.created == self.now]
            assert len(live) <= ceiling or not fresh, f"{key}: {len(live)} live of {view.desired}"


ENGINES = (
    EngineView(Engine.VLLM, frozenset({DeviceKind.CPU, DeviceKind.NVIDIA})),
    EngineView(Engine.SIMULATOR, frozenset({DeviceKind.CPU})),
)


@st.composite
def node_views(draw: st.DrawFn, name: str) -> NodeView:
    gpus = draw(st.integers(0, 4))
    devices = [DeviceView("cpu", DeviceKind.CPU, draw(st.integers(2, 32)) * GIB)]
    devices += [DeviceView(f"gpu-{index}", DeviceKind.NVIDIA, 80 * GIB) for index in range(gpus)]
    return NodeView(
        name=name,
        state=NodeState.READY,
        cordoned=draw(st.booleans()) and draw(st.booleans()),
        draining=False,
        devices=tuple(devices),
        engines=ENGINES,
    )


@st.composite
def needs(draw: st.DrawFn) -> Need:
    if draw(st.booleans()):
        return Need(Engine.VLLM, (DeviceKind.CPU,), 1, draw(st.integers(1, 12)) * GIB)
    count = draw(st.sampled_from([1, 1, 2, 4]))
    return Need(
        Engine.VLLM, (DeviceKind.NVIDIA, DeviceKind.CPU), count, count * draw(st.integers(5, 90)) * GIB
    )


@st.composite
def worlds(draw: st.DrawFn) -> World:
    world = World()
    for index in range(draw(st.integers(1, 5))):
        name = f"node-{index}"
        world.nodes[name] = draw(node_views(name))
    for index in range(draw(st.integers(1, 4))):
        key = f"team/model-{index}"
        world.deployments[key] = DeploymentView(
            key=key,
            uid=f"uid-{index}",
            generation=1,
            launch_generation=1,
            desired=draw(st.integers(0, 5)),
            need=draw(needs()),
        )
    return world


@QUICK
@given(worlds())
def test_every_replica_that_fits_comes_to_serve(world: World) -> None:
    world.settle()
    made = world.plan()
    for conclusion in made.conclusions:
        serving = sum(1 for each in world.replicas.values() if each.deployment == conclusion.deployment)
        desired = world.deployments[conclusion.deployment].desired
        assert serving == desired - conclusion.pending
        if conclusion.pending:
            assert conclusion.scheduled.reason == "Unschedulable"
            assert "needs" in conclusion.scheduled.message


@QUICK
@given(worlds(), st.data())
def test_changes_of_the_spec_keep_every_promise(world: World, data: st.DataObject) -> None:
    world.settle()
    for key, view in list(world.deployments.items()):
        match data.draw(st.sampled_from(["keep", "scale", "update", "delete", "recreate"]), label=key):
            case "scale":
                desired = data.draw(st.integers(0, 6))
                world.deployments[key] = replace(view, desired=desired, generation=view.generation + 1)
            case "update":
                world.deployments[key] = replace(
                    view,
                    need=data.draw(needs()),
                    generation=view.generation + 1,
                    launch_generation=view.launch_generation + 1,
                )
            case "delete":
                del world.deployments[key]
            case "recreate":
                world.deployments[key] = replace(view, uid=view.uid + "-again", observed_generation=0)
            case _:
                pass
        for _ in range(data.draw(st.integers(0, 3))):
            made = world.plan()
            world.check(made)
            world.apply(made)
            world.check_state()
            world.step()
    world.settle()
    assert all(each.deployment in world.deployments for each in world.replicas.values())
    assert all(each.uid == world.deployments[each.deployment].uid for each in world.replicas.values())


@QUICK
@given(worlds(), st.data())
def test_nodes_that_come_and_go(world: World, data: st.DataObject) -> None:
    world.settle()
    for _ in range(3):
        name = data.draw(st.sampled_from(sorted(world.nodes)))
        node = world.nodes[name]
        match data.draw(st.sampled_from(["lose", "silence", "return", "cordon", "drain", "open"])):
            case "lose":
                node = replace(node, state=NodeState.LOST)
            case "silence":
                node = replace(node, state=NodeState.SILENT)
            case "return":
                node = replace(node, state=NodeState.READY)
            case "cordon":
                node = replace(node, cordoned=True)
            case "drain":
                node = replace(node, draining=True)
            case _:
                node = replace(node, cordoned=False, draining=False)
        world.nodes[name] = node
        silent = sum(1 for each in world.nodes.values() if each.state is not NodeState.READY)
        made = world.plan()
        if silent == len(world.nodes) or (silent > 1 and silent > 0.3 * len(world.nodes)):
            holding = {each.node for each in world.replicas.values()}
            judged = [
                each
                for each in world.nodes.values()
                if each.state is not NodeState.LOST or each.name in holding
            ]
            quiet = [each for each in judged if each.state is not NodeState.READY]
            if len(quiet) > 1 and len(quiet) > 0.3 * len(judged):
                assert made.frozen
                assert not [each for each in made.remove if each.reason == "NodeLost"]
        world.settle()


@QUICK
@given(worlds(), st.integers(1, 6))
def test_an_engine_that_always_fails_is_retried_ever_more_slowly(world: World, waves: int) -> None:
    world.fails = lambda _: True
    started = 0
    for _ in range(2**waves + 3 * waves):
        made = world.plan()
        world.check(made)
        world.apply(made)
        world.check_state()
        started += len(made.place)
        world.step()
    wanted = sum(each.desired for each in world.deployments.values())
    # Waves come after 0, 1, 3, 7 ... seconds of waiting, each preceded by two seconds of starting.
    assert started <= (waves + 2) * max(1, wanted)


@QUICK
@given(worlds())
def test_equal_snapshots_give_equal_plans(world: World) -> None:
    snapshot = world.snapshot()
    first, second = itertools.count(), itertools.count()
    assert plan(snapshot, START, lambda key: f"{key}{next(first)}") == plan(
        snapshot, START, lambda key: f"{key}{next(second)}"
    )
