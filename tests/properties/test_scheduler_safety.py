"""Generated clusters and histories: what must hold whatever happens.

`MILLRACE_SCHEDULER_EXAMPLES` sets how many of them in all, with those of `test_scheduler_preemption`;
`make test-scheduler` takes 10,000.
"""

import itertools
import os
from dataclasses import replace

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from controlplane.scheduler import plan
from core.states import NodeState
from tests.support.scheduled_world import START, TAINTS, World, needs, node_views, pins, quotas, worlds

# By default about three seconds of generated clusters.
EXAMPLES = int(os.environ.get("MILLRACE_SCHEDULER_EXAMPLES", "140"))
PARTS = 8
QUICK = settings(
    max_examples=-(-EXAMPLES // PARTS), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@QUICK
@given(worlds())
def test_every_replica_that_fits_comes_to_serve(world: World) -> None:
    world.settle()
    made = plan(world.snapshot(), world.now, str)
    for conclusion in made.conclusions:
        serving = sum(1 for each in world.replicas.values() if each.deployment == conclusion.deployment)
        desired = world.deployments[conclusion.deployment].desired
        assert serving == desired - conclusion.pending
        assert not conclusion.reservations
        if conclusion.pending:
            assert conclusion.scheduled.reason in {"Unschedulable", "QuotaExceeded", "Preempted"}
            assert "needs" in conclusion.scheduled.message


NODE_CHANGES = ("lose", "silence", "return", "cordon", "drain", "taint", "relabel", "open")


def change(world: World, key: str, data: st.DataObject) -> None:
    """Has a user change a deployment."""
    view = world.deployments[key]
    again = replace(view, generation=view.generation + 1)
    kinds = ["keep", "scale", "update", "priority", "placement", "delete", "recreate"]
    match data.draw(st.sampled_from(kinds), label=key):
        case "scale":
            world.deployments[key] = replace(again, desired=data.draw(st.integers(0, 6)))
        case "update":
            launch = view.declared_generation + 1
            world.deployments[key] = replace(
                again, need=data.draw(needs()), launch_generation=launch, spec_launch_generation=0
            )
        case "priority":
            world.deployments[key] = replace(again, priority=data.draw(st.integers(1, 10)))
        case "placement":
            moved = data.draw(needs())
            need = replace(view.need, node_selector=moved.node_selector, tolerations=moved.tolerations)
            world.deployments[key] = replace(again, need=need, pins=data.draw(pins(world, need)))
        case "delete":
            del world.deployments[key]
        case "recreate":
            world.deployments[key] = replace(
                view, uid=view.uid + "-again", observed_generation=0, reservations=(), preemption=None
            )
        case _:
            pass


@QUICK
@given(worlds(), st.data())
def test_changes_of_the_spec_keep_every_promise(world: World, data: st.DataObject) -> None:
    world.settle()
    for _ in range(2):
        for key in list(world.deployments):
            change(world, key, data)
        if data.draw(st.integers(0, 3)) == 3:
            world.quotas["team"] = data.draw(quotas)
        for _ in range(data.draw(st.integers(0, 3))):
            # Transactions that meet a conflict are lost whole.
            lost = data.draw(st.sets(st.sampled_from(sorted(world.deployments)))) if world.deployments else ()
            world.round(lost)
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
        match data.draw(
            st.sampled_from(["lose", "silence", "return", "cordon", "drain", "taint", "relabel", "open"])
        ):
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
            case "taint":
                node = replace(node, taints=(data.draw(st.sampled_from(TAINTS)),))
            case "relabel":
                node = replace(node, labels=data.draw(node_views(name)).labels)
            case _:
                node = replace(node, cordoned=False, draining=False, taints=())
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
        made = world.round()
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
