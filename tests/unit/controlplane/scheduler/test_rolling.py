from dataclasses import replace
from datetime import UTC, datetime

import pytest

from controlplane.scheduler import DeploymentView, Limits, Need, Policy, ReplicaView
from controlplane.scheduler.reconcile import Class, Sorted
from controlplane.scheduler.rolling import intend
from core.states import Engine, ReplicaState

NOW = datetime(2030, 1, 1, tzinfo=UTC)


def members(text: str) -> list[Sorted]:
    """One character a replica: upper case serves; C current, S stale, O orphan."""
    classes = {"c": Class.CURRENT, "s": Class.STALE, "o": Class.ORPHAN}
    found = []
    for index, each in enumerate(text):
        state = ReplicaState.READY if each.isupper() else ReplicaState.STARTING
        replica = ReplicaView(
            f"{each}{index}", "team/qwen", "uid", 1, "n", (), draining=False, state=state, created=NOW
        )
        found.append(Sorted(replica, classes[each.lower()], "because"))
    return found


@pytest.mark.parametrize(
    ("desired", "text", "drained", "missing", "allowed", "yielding"),
    [
        (2, "", "", 2, 2, ""),
        (2, "C", "", 1, 1, ""),
        (2, "CC", "", 0, 0, ""),
        (1, "CCc", "cC", 0, 0, ""),
        (0, "C", "C", 0, 0, ""),
        # An update of two: one above, then one by one.
        (2, "SS", "", 2, 1, "SS"),
        (2, "SSc", "", 1, 0, "SS"),
        (2, "SSC", "S", 1, 1, "S"),
        (2, "SCC", "S", 0, 0, ""),
        # What does not serve goes at once; then fewer than desired serve, and none may go first.
        (2, "Ss", "s", 2, 2, ""),
        (3, "SS", "", 3, 2, ""),
        (1, "SSS", "SS", 1, 1, "S"),
        (1, "O", "O", 1, 1, ""),
    ],
)
def test_how_many_to_start_and_which_to_give_up(
    desired: int, text: str, drained: str, missing: int, allowed: int, yielding: str
) -> None:
    view = DeploymentView("team/qwen", "uid", 1, 1, desired, Need(Engine.VLLM))
    intent = intend(view, members(text), Policy())
    assert "".join(sorted(each.replica.replica[0] for each in intent.drain)) == "".join(sorted(drained))
    assert (intent.missing, intent.allowed) == (missing, allowed)
    assert "".join(each.replica.replica[0] for each in intent.yielding) == yielding


@pytest.mark.parametrize(
    ("surge", "unavailable", "text", "drained", "allowed", "yielding"),
    [
        (2, None, "SS", "", 2, "SS"),
        (2, None, "SScc", "", 0, ""),
        # Explicitly none below: none may yield.
        (1, 0, "SS", "", 1, ""),
        # One below: it goes at once, and makes room for one more.
        (1, 1, "SS", "S", 2, ""),
        (0, 1, "SS", "S", 1, ""),
        (0, None, "SS", "S", 1, ""),
        (0, 1, "Sc", "", 0, ""),
        (0, 1, "SC", "S", 1, ""),
        (0, 2, "SS", "SS", 2, ""),
        # A replica that only leaves its node waits for its successor.
        (1, 1, "NN", "", 1, "SS"),
    ],
)
def test_limits_of_a_rolling_update(
    surge: int, unavailable: int | None, text: str, drained: str, allowed: int, yielding: str
) -> None:
    limits = Limits(surge=surge, unavailable=unavailable)
    view = DeploymentView("team/qwen", "uid", 2, 2, 2, Need(Engine.VLLM), limits=limits)
    found = []
    for each in members(text.replace("N", "S")):
        moved = "N" in text
        generation = 2 if moved or each.result is Class.CURRENT else 1
        found.append(Sorted(replace(each.replica, generation=generation), each.result, each.why))
    intent = intend(view, found, Policy())
    assert "".join(sorted(each.replica.replica[0] for each in intent.drain)) == drained
    assert intent.allowed == allowed
    assert "".join(each.replica.replica[0] for each in intent.yielding) == yielding


def test_a_url_that_a_successor_serves_is_given_up_first() -> None:
    view = DeploymentView("team/x", "uid", 1, 1, 2, Need(Engine.EXTERNAL), ("http://a", "http://b"))
    urls = ["http://b", "http://a", "http://a"]
    found = [
        Sorted(replace(each.replica, external_url=url), each.result, each.why)
        for each, url in zip(members("SSC"), urls, strict=True)
    ]
    (given_up,) = intend(view, found, Policy()).drain
    assert given_up.replica.external_url == "http://a"
