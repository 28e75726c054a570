"""Who makes room: the fewest, the least important, the youngest, and never one too many."""

from datetime import UTC, datetime, timedelta

from controlplane.scheduler import Claim, DeviceView, EngineView, Need, NodeView, ReplicaView
from controlplane.scheduler.preempt import SETS_MAX, VICTIMS_MAX, Candidate, cheapest_eviction
from controlplane.scheduler.room import Room
from core.states import DeviceKind, Engine, NodeState, ReplicaState

GIB = 1 << 30
NOW = datetime(2030, 1, 1, tzinfo=UTC)
VLLM = EngineView(Engine.VLLM, frozenset({DeviceKind.NVIDIA}))


def machine(name: str, gpus: int = 2) -> NodeView:
    devices = tuple(DeviceView(f"gpu-{index}", DeviceKind.NVIDIA, 80 * GIB) for index in range(gpus))
    return NodeView(name, NodeState.READY, devices=devices, engines=(VLLM,))


def gpus(count: int, gib: int) -> Need:
    return Need(Engine.VLLM, (DeviceKind.NVIDIA,), count, count * gib * GIB)


class Scene:
    """Nodes with replicas on them."""

    def __init__(self, *nodes: NodeView) -> None:
        self.room = Room({node.name: node for node in nodes})
        self.nodes = [node.name for node in nodes]
        self.on: dict[str, list[Candidate]] = {}

    def run(self, name: str, node: str, device: str, gib: int, *, priority: int = 1, age: int = 0) -> None:
        claims = tuple(Claim(each, gib * GIB) for each in device.split("+"))
        replica = ReplicaView(
            name, "team/a", "u", 1, node, claims, draining=False, state=ReplicaState.READY,
            created=NOW - timedelta(seconds=age),
        )  # fmt: skip
        self.room.claim(node, claims)
        self.on.setdefault(node, []).append(Candidate(replica, priority))

    def victims(self, need: Need, *, pinned: tuple[str, ...] = ()) -> list[str]:
        found = cheapest_eviction(need, self.nodes, self.room, lambda node: self.on.get(node, []), pinned)
        return [each.replica for each in found.victims] if found is not None else []


def test_one_large_replica_goes_rather_than_two_small_ones() -> None:
    scene = Scene(machine("a"))
    scene.run("small-1", "a", "gpu-0", 40)
    scene.run("small-2", "a", "gpu-0", 40)
    scene.run("large", "a", "gpu-1", 80, priority=7)
    assert scene.victims(gpus(1, 70)) == ["large"]


def test_then_the_least_important_then_the_youngest() -> None:
    scene = Scene(machine("a"), machine("b"))
    scene.run("old", "a", "gpu-0", 80, age=90)
    scene.run("young", "a", "gpu-1", 80, age=10)
    scene.run("important", "b", "gpu-0", 80, priority=2)
    scene.run("other", "b", "gpu-1", 80, priority=3)
    assert scene.victims(gpus(1, 70)) == ["young"]
    assert scene.victims(gpus(2, 70)) == ["old", "young"]


def test_a_replica_over_several_devices_frees_them_all() -> None:
    scene = Scene(machine("a"), machine("b"))
    scene.run("one", "a", "gpu-0", 80)
    scene.run("two", "a", "gpu-1", 80)
    scene.run("wide", "b", "gpu-0+gpu-1", 80, priority=9)
    assert scene.victims(gpus(2, 70)) == ["wide"]


def test_pinned_devices_are_the_only_ones_that_count() -> None:
    scene = Scene(machine("a"))
    scene.run("cheap", "a", "gpu-0", 80)
    scene.run("dear", "a", "gpu-1", 80, priority=5)
    assert scene.victims(gpus(1, 70), pinned=("gpu-1",)) == ["dear"]


def test_nobody_goes_where_it_would_not_help() -> None:
    scene = Scene(machine("a"))
    scene.run("small", "a", "gpu-0", 10)
    assert scene.victims(gpus(1, 90)) == []
    crowded = Scene(machine("b", gpus=1))
    for index in range(VICTIMS_MAX + 8):
        crowded.run(f"r{index:02d}", "b", "gpu-0", 2)
    assert crowded.victims(gpus(1, 80)) == [], "more than one transaction of the store holds"


def test_beyond_the_exact_search_nobody_goes_in_vain() -> None:
    scene = Scene(machine("a", gpus=4))
    for device in range(4):
        for index in range(10):
            scene.run(f"r{device}{index}", "a", f"gpu-{device}", 8, priority=1 + index % 3, age=index)
    need = gpus(2, 24)
    found = cheapest_eviction(need, scene.nodes, scene.room, lambda node: scene.on[node])
    assert found is not None
    assert SETS_MAX < 40 * 39 * 38 // 6
    for spared in found.victims:
        for each in found.victims:
            if each is not spared:
                scene.room.release("a", each.claims)
        assert not scene.room.fits(need, "a")
        for each in found.victims:
            if each is not spared:
                scene.room.claim("a", each.claims)
