"""Shares behind an alias."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from router.admission.split import Splitter
from router.view.view import Alias, Target, View

ALIAS = Alias("chat", (Target("new", 1), Target("old", 4)))
BOTH = {"new", "old"}


def test_turns_are_exact() -> None:
    splitter = Splitter()
    chosen = [splitter.choose("a", ALIAS, BOTH, "") for _ in range(1000)]
    assert Counter(chosen) == {"old": 800, "new": 200}
    # Spread evenly, not in blocks.
    assert all(chosen[at : at + 5].count("new") == 1 for at in range(0, 1000, 5))


def test_targets_that_are_missing_give_their_share_to_the_others() -> None:
    splitter = Splitter()
    assert splitter.choose("a", ALIAS, {"new"}, "") == "new"
    assert splitter.choose("a", ALIAS, {"new"}, "s") == "new"
    assert splitter.choose("a", ALIAS, set(), "") is None


@given(st.text(min_size=1, max_size=20), st.integers(1, 100))
def test_a_session_stays_and_moves_only_toward_what_became_heavier(session: str, weight: int) -> None:
    first = Splitter().choose("a", ALIAS, BOTH, session)
    assert Splitter().choose("a", ALIAS, BOTH, session) == first
    heavier = Alias("chat", (Target("new", 1), Target("old", 4 + weight)))
    moved = Splitter().choose("a", heavier, BOTH, session)
    assert moved in {first, "old"}


def test_sessions_split_by_weight() -> None:
    splitter = Splitter()
    chosen = Counter(splitter.choose("a", ALIAS, BOTH, f"session-{n}") for n in range(2000))
    assert 0.75 < chosen["old"] / 2000 < 0.85


def test_changed_targets_begin_anew_and_gone_aliases_are_forgotten() -> None:
    splitter = Splitter()
    for _ in range(3):
        splitter.choose("a", ALIAS, BOTH, "")
    other = Alias("chat", (Target("new", 1), Target("third", 1)))
    assert Counter(splitter.choose("a", other, {"new", "third"}, "") for _ in range(10)) == {
        "new": 5,
        "third": 5,
    }
    splitter.retain(View())
    assert not splitter._turns
