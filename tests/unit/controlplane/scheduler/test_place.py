from dataclasses import replace

import pytest

from controlplane.scheduler import Claim, DeviceView, EngineView, Need, NodeView
from controlplane.scheduler.books import Books
from controlplane.scheduler.explain import explain
from controlplane.scheduler.place import Index, Placement, Preferences, Search
from controlplane.scheduler.room import Room
from core.states import DeviceKind, Engine, NodeState

GIB = 1 << 30
BOTH = EngineView(Engine.VLLM, frozenset({DeviceKind.CPU, DeviceKind.NVIDIA}))
ANY = Preferences({})


def machine(name: str, *, cpu_gib: int = 16, gpus: int = 0, gpu_gib: int = 80) -> NodeView:
    devices = [DeviceView("cpu", DeviceKind.CPU, cpu_gib * GIB)]
    devices += [DeviceView(f"gpu-{index}", DeviceKind.NVIDIA, gpu_gib * GIB) for index in range(gpus)]
    return NodeView(name, NodeState.READY, devices=tuple(devices), engines=(BOTH,))


def cpu(gib: int) -> Need:
    return Need(Engine.VLLM, (DeviceKind.CPU,), 1, gib * GIB)


def gpus(count: int, gib: int) -> Need:
    return Need(Engine.VLLM, (DeviceKind.NVIDIA,), count, count * gib * GIB)


def cluster(*nodes: NodeView) -> tuple[Books, Room]:
    books = Books()
    for node in nodes:
        books.set_node(node.name, node)
    return books, books.room


def find_placement(need: Need, books: Books, room: Room, preferences: Preferences) -> Placement | None:
    return Search(need, Index(need, books), room, preferences).best()


def test_replicas_are_spread_and_used_nodes_are_filled_first() -> None:
    nodes, room = cluster(machine("a"), machine("b"))
    room.claim("b", [Claim("cpu", 4 * GIB)])
    first = find_placement(cpu(4), nodes, room, ANY)
    assert first is not None
    assert first.node == "b"
    second = find_placement(cpu(4), nodes, room, Preferences({"b": 1}))
    assert second is not None
    assert second.node == "a"


def test_ties_are_broken_by_name() -> None:
    nodes, room = cluster(machine("b"), machine("a"))
    found = find_placement(cpu(4), nodes, room, ANY)
    assert found is not None
    assert found.node == "a"


def test_the_node_of_the_last_failure_is_avoided() -> None:
    nodes, room = cluster(machine("a"), machine("b"))
    found = find_placement(cpu(4), nodes, room, Preferences({}, failed_node="a"))
    assert found is not None
    assert found.node == "b"


def test_claims_are_never_exceeded() -> None:
    nodes, room = cluster(machine("a", cpu_gib=9))
    for _ in range(2):
        found = find_placement(cpu(4), nodes, room, ANY)
        assert found is not None
        room.claim(found.node, found.claims)
    assert find_placement(cpu(4), nodes, room, ANY) is None
    room.release("a", [Claim("cpu", 4 * GIB)])
    assert find_placement(cpu(4), nodes, room, ANY) is not None


def test_several_devices_are_equal_and_the_fullest_that_fit() -> None:
    node = machine("a", gpus=4)
    room = Room({"a": node})
    room.claim("a", [Claim("gpu-0", 70 * GIB), Claim("gpu-2", 10 * GIB)])
    claims = room.choose(gpus(2, 60), "a")
    assert claims is not None
    assert [claim.device_id for claim in claims] == ["gpu-2", "gpu-1"]
    assert {claim.memory_bytes for claim in claims} == {60 * GIB}
    assert room.choose(gpus(4, 60), "a") is None
    mixed = replace(node, devices=(*node.devices[:2], DeviceView("gpu-9", DeviceKind.NVIDIA, 24 * GIB)))
    assert Room({"a": mixed}).choose(gpus(2, 10), "a") is None


def test_odd_memory_is_rounded_up_on_each_device() -> None:
    need = Need(Engine.VLLM, (DeviceKind.NVIDIA,), 2, 7)
    claims = Room({"a": machine("a", gpus=2)}).choose(need, "a")
    assert claims is not None
    assert [claim.memory_bytes for claim in claims] == [4, 4]


def test_an_external_url_needs_no_engine_and_no_device() -> None:
    bare = NodeView("a", NodeState.READY)
    nodes, room = cluster(bare)
    found = find_placement(Need(Engine.EXTERNAL), nodes, room, ANY)
    assert found is not None
    assert found.claims == ()


def test_an_explanation_counts_each_reason() -> None:
    missing = replace(
        machine("e"), engines=(EngineView(Engine.VLLM, frozenset({DeviceKind.CPU}), "not installed"),)
    )
    nodes, room = cluster(
        replace(machine("a"), cordoned=True),
        machine("b", cpu_gib=1),
        machine("c", cpu_gib=2),
        replace(machine("d"), state=NodeState.SILENT),
        missing,
        replace(machine("f", cpu_gib=1), draining=True),
    )
    why = explain(cpu(3), nodes.nodes, room, ANY)
    assert why.summary == (
        "needs 3.0 GiB on CPU; 6 nodes: 1 silent, 2 being drained or cordoned, "
        "1 without the engine (vllm cannot be started on CPU: not installed), "
        "2 out of memory (largest free 2.0 GiB)"
    )
    assert why.suggestion == "uncordon node a"
    assert {each.node: each.failed_rule for each in why.nodes} == {
        "a": "Schedulable",
        "b": "MemoryFree",
        "c": "MemoryFree",
        "d": "NodeReady",
        "e": "EngineAvailable",
        "f": "Schedulable",
    }


ALONE = ", since one replica takes the devices of one node"


@pytest.mark.parametrize(
    ("need", "nodes", "suggestion"),
    [
        (cpu(4), [], "start a node agent"),
        (gpus(2, 40), [machine("a", gpus=1)], "add a node with 40.0 GiB free on each of 2 x NVIDIA GPU"),
        (
            gpus(2, 40),
            [machine("a", gpus=1), machine("b", gpus=1)],
            f"add a node with 40.0 GiB free on each of 2 x NVIDIA GPU{ALONE}",
        ),
        (
            gpus(2, 400),
            [machine("a", gpus=2)],
            "shorten max_model_len or add a node with 400.0 GiB free on each of 2 x NVIDIA GPU",
        ),
        (cpu(20), [machine("a")], "shorten max_model_len or add a node with 20.0 GiB free on CPU"),
        (cpu(4), [machine("a")], ""),
    ],
)
def test_the_cheapest_change_is_suggested(need: Need, nodes: list[NodeView], suggestion: str) -> None:
    found, room = cluster(*nodes)
    assert explain(need, found.nodes, room, ANY).suggestion == suggestion


def test_a_full_node_suggests_scaling_something_down() -> None:
    nodes, room = cluster(machine("a"))
    room.claim("a", [Claim("cpu", 15 * GIB)])
    why = explain(cpu(4), nodes.nodes, room, ANY)
    assert "scale another deployment on node a down" in why.sentence
    assert "4.0 GiB needed, largest free 1.0 GiB of 16.0 GiB" in why.nodes[0].message
