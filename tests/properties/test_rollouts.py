"""Rolling updates of generated deployments, some of which can never start: what must always hold."""

from dataclasses import replace
from datetime import timedelta

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from controlplane.scheduler import DeploymentView, DeviceView, Limits, Need, NodeView
from core.states import DeviceKind, Engine, NodeState
from tests.support.scheduled_world import ENGINES, GIB, World, limits

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
KEY = "team/model"


def world_of(desired: int, bounds: Limits) -> World:
    """Two machines with room for twice the replicas."""
    world = World()
    for name in ("node-1", "node-2"):
        cpu = DeviceView("cpu", DeviceKind.CPU, 16 * GIB)
        world.nodes[name] = NodeView(name, NodeState.READY, devices=(cpu,), engines=ENGINES)
    need = Need(Engine.VLLM, (DeviceKind.CPU,), 1, 2 * GIB)
    world.deployments[KEY] = DeploymentView(KEY, "uid", 1, 1, desired, need, limits=bounds)
    world.settle()
    # The first launch has proved itself.
    world.step(61)
    world.settle()
    return world


def update(world: World) -> None:
    view = world.deployments[KEY]
    world.deployments[KEY] = replace(
        view,
        generation=view.generation + 1,
        launch_generation=view.declared_generation + 1,
        spec_launch_generation=0,
    )


def serving(world: World) -> list[int]:
    return [each.generation for each in world.replicas.values() if each.serves]


@QUICK
@given(st.integers(1, 5), limits())
def test_an_update_keeps_its_limits_and_ends(desired: int, bounds: Limits) -> None:
    world = world_of(desired, bounds)
    update(world)
    surge = 1 if bounds.surge is None else bounds.surge
    unavailable = bounds.unavailable if bounds.unavailable is not None else (1 if surge == 0 else 0)
    for _ in range(60):
        made = world.plan()
        world.apply(made)
        live = [each for each in world.replicas.values() if not each.draining and not each.state.terminal]
        assert len(live) <= desired + surge
        assert len(serving(world)) >= desired - unavailable
        world.step()
    assert serving(world) == [2] * desired
    conclusion = world.planner.conclusions[KEY]
    assert conclusion.progressing is not None
    assert conclusion.progressing.reason == "Complete"


@QUICK
@given(st.integers(1, 5), limits(), st.data())
def test_an_update_that_cannot_start_goes_back(desired: int, bounds: Limits, data: st.DataObject) -> None:
    world = world_of(desired, bounds)
    world.broken_generations = frozenset({2})
    update(world)
    unavailable = max(1 if bounds.surge == 0 and bounds.unavailable is None else 0, bounds.unavailable or 0)
    reasons = set()
    for _ in range(60):
        made = world.plan()
        world.apply(made)
        conclusion = world.planner.conclusions[KEY]
        assert conclusion.progressing is not None
        reasons.add(conclusion.progressing.reason)
        assert len(serving(world)) >= desired - unavailable
        world.step()
    assert "RolledBack" in reasons
    assert serving(world) == [1] * desired
    # What is lost afterwards is replaced by the launch that serves.
    victim = data.draw(st.sampled_from(sorted(world.replicas)))
    del world.replicas[victim]
    world.settle()
    assert serving(world) == [1] * desired
    # A change of the spec is the next attempt.
    update(world)
    world.now += timedelta(seconds=1)
    world.settle()
    assert serving(world) == [3] * desired
