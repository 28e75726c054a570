"""Strategies of deployments beside the router's own."""

from millrace.core.v1 import deployment_pb2, policy_pb2
from millrace.state.v1 import records_pb2

from router.picking import selectors as module
from router.picking.registry import build_strategy
from router.picking.selector import Selector
from router.picking.selectors import Selectors
from router.upstream.loads import LoadTable
from router.view.samples import SampleTable
from router.view.view import Deployment, View, build_view
from tests.support.clock import ManualClock


def _selectors() -> Selectors:
    loads, samples = LoadTable(), SampleTable(ManualClock())
    return Selectors(
        Selector(build_strategy("default"), loads=loads, samples=samples),
        lambda strategy: Selector(strategy, loads=loads, samples=samples),
    )


def _view(**strategies: str) -> View:
    return build_view(
        version=1,
        endpoints=[],
        api_keys={},
        deployments=[
            records_pb2.DeploymentRecord(
                namespace="a",
                name=name,
                spec=deployment_pb2.DeploymentSpec(routing=policy_pb2.Routing(strategy=strategy)),
            )
            for name, strategy in strategies.items()
        ],
    )


def _deployment(view: View, name: str) -> Deployment:
    found = view.deployment("a", name)
    assert found is not None
    return found


def test_a_deployment_has_the_strategy_that_it_names() -> None:
    selectors = _selectors()
    view = _view(plain="", turns=" round-robin ", again="round-robin", sum="prefix=3,load=1")
    selectors.view_changed(view)
    assert selectors.of(_deployment(view, "plain")) is selectors.default
    turns = selectors.of(_deployment(view, "turns"))
    assert turns.strategy.name == "round-robin"
    assert selectors.of(_deployment(view, "again")) is turns
    assert len(list(selectors)) == 3
    # What stays keeps its index and its turns.
    selectors.view_changed(_view(turns="round-robin"))
    assert selectors.of(_deployment(view, "turns")) is turns
    assert len(list(selectors)) == 2


def test_a_wrong_strategy_is_refused_once_and_the_routers_own_used() -> None:
    selectors = _selectors()
    view = _view(wrong="nonsense", right="random")
    for _ in range(2):
        selectors.view_changed(view)
    assert selectors.of(_deployment(view, "wrong")) is selectors.default
    assert selectors.of(_deployment(view, "right")).strategy.name == "random"


def test_different_strategies_are_bounded() -> None:
    selectors = _selectors()
    many = {f"d{number}": f"load={number + 1}" for number in range(module.STRATEGIES_MAX + 3)}
    selectors.view_changed(_view(**many))
    assert len(list(selectors)) == 1 + module.STRATEGIES_MAX
