"""Pre-emption takes what it needs and no more: compared with a search through every set of replicas."""

import itertools
from dataclasses import replace

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from controlplane.scheduler import (
    Claim,
    DeploymentView,
    DeviceView,
    Need,
    NodeView,
    Pin,
    Plan,
    Policy,
    ReplicaView,
)
from controlplane.scheduler.books import Books
from controlplane.scheduler.filters import allows
from controlplane.scheduler.preempt import Candidate, Cost, cost_of
from core.states import DeviceKind, Engine, NodeState, ReplicaState
from tests.properties.test_scheduler_safety import EXAMPLES, PARTS
from tests.support.scheduled_world import ENGINES, GIB, START, World, crowding_needs, crowds, needs, worlds

QUICK = settings(
    max_examples=-(-EXAMPLES // PARTS),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
# Every subset of a node's replicas is tried.
CANDIDATES_MAX = 9


def candidates(world: World, priority: int, node: str) -> list[Candidate]:
    owners = world.deployments
    return [
        Candidate(each, owners[each.deployment].priority)
        for each in world.replicas.values()
        if each.node == node and owners[each.deployment].priority < priority and each.claims
    ]


def fits(world: World, need: Need, node: str, without: tuple[ReplicaView, ...] = ()) -> bool:
    books = Books()
    gone = {each.replica for each in without}
    kept = {name: each for name, each in world.replicas.items() if name not in gone}
    books.load(replace(world.snapshot(), replicas=kept))
    return allows(need, world.nodes[node]) and books.room.fits(need, node)


def cheapest(world: World, need: Need, priority: int) -> Cost | None:
    """The least cost over every node and every set of replicas."""
    costs: list[Cost] = []
    for node in world.nodes:
        choices = candidates(world, priority, node)
        assume(len(choices) <= CANDIDATES_MAX)
        for size in range(1, len(choices) + 1):
            sets = [
                each
                for each in itertools.combinations(choices, size)
                if fits(world, need, node, tuple(one.replica for one in each))
            ]
            if sets:
                costs.append(min(cost_of(each) for each in sets))
                break
    return min(costs, default=None)


def victims_of(world: World, made: Plan) -> list[Candidate]:
    return [
        Candidate(world.replicas[each.replica], world.deployments[each.deployment].priority)
        for each in made.drain
        if each.preempted_by == "team/urgent"
    ]


@QUICK
@given(worlds(priorities=(1, 3, 5, 8)), needs(), st.integers(2, 10))
def test_the_cheapest_set_makes_room_and_no_more(world: World, need: Need, priority: int) -> None:
    world.quotas.clear()
    world.settle()
    world.deployments["team/urgent"] = DeploymentView(
        "team/urgent", "urgent", 1, 1, 1, need, priority=priority
    )
    room = any(fits(world, need, node) for node in world.nodes)
    least = None if room else cheapest(world, need, priority)
    made = world.plan()
    victims = victims_of(world, made)
    assert bool(victims) == (least is not None)
    if victims:
        assert cost_of(victims) == least
        node = victims[0].replica.node
        assert {each.replica.node for each in victims} == {node}
        gone = tuple(each.replica for each in victims)
        assert fits(world, need, node, gone)
        for spared in gone:
            assert not fits(world, need, node, tuple(each for each in gone if each is not spared))
    world.settle()
    urgent = [each for each in world.replicas.values() if each.deployment == "team/urgent"]
    assert len(urgent) == int(room or least is not None)


@QUICK
@given(worlds(priorities=(1, 3, 5, 8)), needs(), st.integers(1, 3), st.data())
def test_pre_emption_ends_and_never_comes_back(
    world: World, need: Need, desired: int, data: st.DataObject
) -> None:
    """Whoever made room is not asked again for the same replica, and takes nothing back from others."""
    world.settle()
    world.deployments["team/urgent"] = DeploymentView("team/urgent", "u", 1, 1, desired, need, priority=9)
    asked: set[str] = set()
    for _ in range(12):
        lost = data.draw(st.sets(st.sampled_from(sorted(world.deployments)), max_size=1))
        made = world.round(lost)
        for drain in made.drain:
            if drain.preempted_by and drain.preempted_by not in lost:
                assert drain.preempted_by == "team/urgent", "who was pre-empted must not pre-empt"
                assert drain.deadline == world.now + Policy().drain
                assert drain.replica not in asked
                asked.add(drain.replica)
        world.step()
    world.settle()


@QUICK
@given(crowds(), st.data())
def test_pre_emption_meets_updates_and_nobody_gives_up_more_than_it_may(
    world: World, data: st.DataObject
) -> None:
    """More important ones come at any moment of updates and scaling; each round is held to its promises."""
    world.settle()
    for attempt in range(2):
        for key in sorted(world.deployments):
            view = world.deployments[key]
            again = replace(view, generation=view.generation + 1)
            match data.draw(st.sampled_from(["update", "update", "scale", "keep"]), label=key):
                case "update":
                    launch = view.declared_generation + 1
                    again = replace(again, launch_generation=launch, spec_launch_generation=0)
                case "scale":
                    again = replace(again, desired=data.draw(st.integers(0, 6)))
                case _:
                    again = view
            world.deployments[key] = again
        for _ in range(data.draw(st.integers(0, 7), label="rounds before")):
            world.round()
            world.step()
        for index in range(data.draw(st.integers(1, 3), label="urgent")):
            key = f"team/urgent-{attempt}-{index}"
            taken = {each.priority for each in world.deployments.values()}
            priority = data.draw(st.sampled_from([each for each in range(2, 11) if each not in taken]))
            need = data.draw(crowding_needs)
            desired = data.draw(st.integers(1, 3))
            world.deployments[key] = DeploymentView(key, key, 1, 1, desired, need, priority=priority)
        for _ in range(data.draw(st.integers(1, 6), label="rounds after")):
            lost = data.draw(st.sets(st.sampled_from(sorted(world.deployments)), max_size=1))
            world.round(lost)
            world.step()
    for _ in range(80):
        # Room to come is kept for nobody, so that a plan that follows at once may not be empty.
        made, before = world.round(), dict(world.replicas)
        world.step()
        if made.empty and before == world.replicas:
            break
    else:
        raise AssertionError(f"does not converge: {world.plan()}")


def one_device(name: str, zone: str) -> NodeView:
    return NodeView(
        name,
        NodeState.READY,
        devices=(DeviceView("gpu-0", DeviceKind.NVIDIA, 80 * GIB),),
        engines=ENGINES,
        labels=frozenset({("zone", zone)}),
    )


def test_replacements_do_not_come_without_the_ends_that_they_stand_for() -> None:
    """Found by the property above: the pre-emption met a conflict, and the replacements did not."""
    small = Need(Engine.VLLM, (DeviceKind.NVIDIA,), 1, 20 * GIB)
    large = replace(small, memory_bytes=60 * GIB, node_selector=(("zone", "north"),))
    world = World(nodes={"node-0": one_device("node-0", "north")})
    world.deployments["team/model"] = DeploymentView("team/model", "m", 1, 1, 4, small, priority=3)
    world.settle()
    world.nodes["node-1"] = one_device("node-1", "south")
    world.deployments["team/urgent"] = DeploymentView("team/urgent", "u", 1, 1, 1, large, priority=9)
    before = dict(world.replicas)
    made = world.round({"team/urgent"})
    assert (len(made.drain), len(made.place)) == (3, 3)
    assert world.replicas == before
    world.settle()
    held = sorted((each.deployment, each.node) for each in world.replicas.values())
    assert held == [("team/model", "node-0"), *[("team/model", "node-1")] * 3, ("team/urgent", "node-0")]


def test_who_was_pre_empted_takes_from_nobody_even_if_its_own_record_was_refused() -> None:
    """Found by the property above: the loser forgot its loss and had a third deployment make room."""
    need = Need(Engine.VLLM, (DeviceKind.NVIDIA,), 1, 80 * GIB)
    only = replace(need, node_selector=(("zone", "north"),))
    world = World(nodes={"node-0": one_device("node-0", "north")})
    world.deployments["team/loser"] = DeploymentView("team/loser", "l", 1, 1, 1, need, priority=8)
    world.settle()
    world.nodes["node-1"] = one_device("node-1", "south")
    world.deployments["team/third"] = DeploymentView("team/third", "t", 1, 1, 1, need, priority=1)
    world.settle()
    world.deployments["team/urgent"] = DeploymentView("team/urgent", "u", 1, 1, 1, only, priority=9)
    world.round({"team/loser"})
    assert {each.preempted_by for each in world.replicas.values()} == {"", "team/urgent"}
    world.settle()
    assert sorted(each.deployment for each in world.replicas.values()) == ["team/third", "team/urgent"]


def test_nobody_makes_room_on_devices_that_were_chosen_for_another_size() -> None:
    """Found by the property of changed specs: the room was made again and again, and never taken."""
    need = Need(Engine.VLLM, (DeviceKind.NVIDIA,), 1, 80 * GIB)
    world = World(nodes={"node-0": one_device("node-0", "north")})
    two = (Pin("node-0", ("cpu", "gpu-0")),)
    world.deployments["team/least"] = DeploymentView("team/least", "l", 1, 1, 1, need, priority=1)
    world.deployments["team/pinned"] = DeploymentView("team/pinned", "p", 1, 1, 1, need, priority=9, pins=two)
    world.settle()
    assert [each.deployment for each in world.replicas.values()] == ["team/least"]


def test_surplus_stays_where_others_are_pre_empted_in_the_same_plan() -> None:
    """The last outdated replica is surplus until two of its successors make room."""
    need = Need(Engine.VLLM, (DeviceKind.NVIDIA,), 1, 20 * GIB)
    north = replace(need, node_selector=(("zone", "north"),))
    large = replace(north, memory_bytes=40 * GIB)
    world = World(nodes={"node-0": one_device("node-0", "south"), "node-1": one_device("node-1", "north")})
    world.deployments["team/model"] = DeploymentView("team/model", "m", 1, 1, 3, need, priority=3)
    claims = (Claim("gpu-0", 20 * GIB),)
    for name, generation, node in [
        ("old", 1, "node-0"),
        ("new-0", 2, "node-1"),
        ("new-1", 2, "node-1"),
        ("new-2", 2, "node-1"),
    ]:
        world.replicas[name] = ReplicaView(
            name,
            "team/model",
            "m",
            generation,
            node,
            claims,
            draining=False,
            state=ReplicaState.READY,
            created=START,
            observed=True,
            ready_time=START,
        )
    world.deployments["team/model"] = replace(
        world.deployments["team/model"], generation=2, launch_generation=2
    )
    assert [each.replica for each in world.plan().drain] == ["old"]
    world.deployments["team/urgent"] = DeploymentView("team/urgent", "u", 1, 1, 1, large, priority=9)
    made = world.round()
    assert [each.preempted_by for each in made.drain] == ["team/urgent"]
    assert {each.replica for each in world.replicas.values() if each.serves} > {"old"}
    world.settle()
    assert sorted(each.deployment for each in world.replicas.values()) == ["team/model"] * 3 + ["team/urgent"]
