"""Chats in virtual time, and on them what the default promises."""

import pytest

from tests.bench.router_chats import ChatSimulation, tokens_of
from tests.bench.router_loads import SEED


def _rates(strategy: str, *, slowness: tuple[float, float, float], chats: int = 120) -> tuple[float, float]:
    simulation = ChatSimulation(strategy=strategy, seed=SEED, slowness=slowness)
    result = simulation.run(simulation.chats(chats))
    assert len(result.end_to_end) == 5 * chats
    return result.hit_rate, simulation.ideal_hit_rate


def test_two_characters_are_a_token() -> None:
    assert len(tokens_of("abcde")) == 3
    assert tokens_of("abcd")[:1] == tokens_of("ab")


def test_chats_that_fit_keep_what_can_be_kept() -> None:
    hit_rate, ideal = _rates("default", slowness=(1.0, 1.0, 1.0), chats=30)
    assert hit_rate >= 0.95 * ideal


@pytest.mark.parametrize("slowness", [(1.0, 1.0, 1.0), (1.0, 2.0, 4.0)])
def test_chats_that_do_not_fit_share_all_caches(slowness: tuple[float, float, float]) -> None:
    hit_rate, ideal = _rates("default", slowness=slowness)
    assert hit_rate >= 0.91 * ideal
