from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from controlplane.scheduler.autoscale import (
    AutoscalePolicy,
    Decision,
    Demand,
    Measure,
    Reading,
    State,
    Window,
    decide,
    parse_days,
    parse_time,
)

NOW = datetime(2030, 1, 7, 12, tzinfo=UTC)
POLICY = AutoscalePolicy(min_replicas=1, max_replicas=8)
LONG_AGO = NOW - timedelta(hours=1)
CALM = Demand(in_flight=1, first_token_p99_ms=100.0)


def state(desired: int, **changes: Any) -> State:
    base = State(desired, waiting_time=LONG_AGO, active_time=LONG_AGO, out_time=LONG_AGO, step_time=LONG_AGO)
    return replace(base, **changes)


def reading(
    serving: int,
    *,
    waiting: float | None = 0,
    utilization: float | None = 0.5,
    kv: float | None = 0.6,
    sampled: int | None = None,
    demand: Demand | None = CALM,
    **changes: Any,
) -> Reading:
    """One moment; utilisation and cache use of each replica that has a sample, None where not measured."""
    known = serving if sampled is None else sampled
    values: dict[str, Any] = {
        "time": NOW,
        "serving": serving,
        "sampled": known,
        "running": Measure(0, known),
        "waiting": Measure() if waiting is None else Measure(waiting, known),
        "utilization": Measure() if utilization is None else Measure(utilization * known, known),
        "kv_usage": Measure() if kv is None else Measure(kv * known, known),
        "demand": demand,
    }
    return Reading(**{**values, **changes})


def after(
    policy: AutoscalePolicy, before: State | None, last: Reading, *, seconds: int = 30, first: int = 1
) -> Decision:
    """Decides when the same has been read for some time."""
    readings = [replace(last, time=NOW - timedelta(seconds=index)) for index in range(seconds, -1, -1)]
    return decide(policy, readings, before, NOW, first=first)


@pytest.mark.parametrize(
    ("desired", "last", "expected", "why"),
    [
        (2, reading(2, waiting=21), 3, "2 -> 3: 21 requests wait, 10.5 a replica (more than 10)"),
        (2, reading(2, waiting=20), 2, ""),
        # Ten times too much is more than one replica's work: it doubles, or adds two.
        (1, reading(1, waiting=100), 3, "1 -> 3: 100 requests wait, 100.0 a replica (more than 10)"),
        (3, reading(3, waiting=300), 6, "300 requests wait"),
        (6, reading(6, waiting=600), 8, "600 requests wait"),
        (2, reading(2, utilization=0.81), 3, "device utilisation is 81.0% (more than 80%)"),
        (4, reading(4, utilization=1.0), 5, "device utilisation is 100.0%"),
        (2, reading(2, kv=0.95), 3, "KV-cache use is 95.0% (more than 90%)"),
        (
            2,
            reading(2, demand=Demand(first_token_p99_ms=2400)),
            3,
            "p99 of the first token is 2400 ms (more than 2000 ms)",
        ),
        # Requests that wait at routers wait as well.
        (1, reading(1, waiting=6, demand=Demand(queued=6)), 2, "12 requests wait"),
        # Those that are starting count as if they shared the work already.
        (4, reading(2, waiting=38), 4, ""),
        (
            4,
            reading(2, waiting=42),
            5,
            "42 requests wait, 10.5 a replica (more than 10); 2 of 4 still starting",
        ),
        (4, reading(2, utilization=1.0), 4, ""),
        # Those that wait for the first to start want nothing more.
        (1, reading(0, demand=Demand(parked=60)), 1, ""),
        # A latency cannot be shared beforehand.
        (3, reading(2, demand=Demand(first_token_p99_ms=9000)), 3, ""),
        # What is missing can only make a step smaller.
        (2, reading(2, waiting=30, sampled=1), 3, "30 requests wait"),
        (2, reading(2, utilization=0.9, sampled=1), 2, ""),
    ],
)
def test_steps_out(desired: int, last: Reading, expected: int, why: str) -> None:
    decision = after(POLICY, state(desired), last)
    assert decision.state.desired == expected
    assert decision.step == (expected != desired)
    assert why in decision.state.message
    if decision.step:
        assert decision.state.reason == "ScaledOut"
        assert decision.state.out_time == decision.state.step_time == NOW


def test_a_latency_speaks_of_replicas_that_have_served_for_a_minute() -> None:
    slow = reading(2, demand=Demand(first_token_p99_ms=9000))
    assert after(POLICY, state(2), slow, seconds=70).step
    # Requests that waited for the start are still in it.
    assert not after(POLICY, state(2, step_time=NOW - timedelta(seconds=59)), slow, seconds=70).step
    readings = [replace(slow, time=NOW - timedelta(seconds=index)) for index in range(70, -1, -1)]
    readings[30] = replace(readings[30], serving=1)
    assert not decide(POLICY, readings, state(2), NOW).step


def test_the_most_is_never_exceeded_and_said() -> None:
    decision = after(POLICY, state(8), reading(8, waiting=500))
    assert (decision.state.desired, decision.state.reason) == (8, "AtMaximum")
    assert "8 is the most that the policy allows" in decision.state.message


def test_a_step_out_waits_for_the_one_before_and_not_for_a_step_in() -> None:
    recent = NOW - timedelta(seconds=59)
    cooling = after(POLICY, state(2, out_time=recent, step_time=recent), reading(2, waiting=50))
    assert (cooling.state.desired, cooling.state.reason) == (2, "CoolingDown")
    assert "12:00:01 UTC" in cooling.state.message
    earlier = NOW - timedelta(seconds=60)
    assert after(POLICY, state(2, out_time=earlier, step_time=earlier), reading(2, waiting=50)).step
    assert after(POLICY, state(2, step_time=NOW - timedelta(seconds=20)), reading(2, waiting=50)).step


def test_one_spike_is_no_load() -> None:
    calm = [replace(reading(2), time=NOW - timedelta(seconds=index)) for index in range(30, 0, -1)]
    assert not decide(POLICY, [*calm, reading(2, waiting=300)], state(2), NOW).step


def test_nothing_is_decided_before_enough_was_seen() -> None:
    decision = after(POLICY, state(2), reading(2, waiting=300), seconds=10)
    assert (decision.state.desired, decision.state.reason) == (2, "Observing")
    # What was measured before the last step speaks of another number of replicas.
    stepped = state(4, step_time=NOW - timedelta(seconds=5))
    assert not after(POLICY, stepped, reading(4, waiting=300)).step


@pytest.mark.parametrize(
    ("desired", "last", "expected"),
    [
        (3, reading(3, utilization=0.1, kv=0.1), 2),
        (3, reading(3, utilization=0.2, kv=0.1), 3),
        (3, reading(3, utilization=0.1, kv=0.5), 3),
        (3, reading(3, utilization=0.1, kv=0.1, waiting=1), 3),
        (3, reading(3, utilization=0.1, kv=0.1, demand=Demand(queued=1)), 3),
        (3, reading(3, utilization=0.1, kv=0.1, demand=Demand(first_token_p99_ms=600)), 3),
        (3, reading(3, utilization=0.1, kv=0.1, demand=Demand()), 2),
        # No router reports: engines speak for themselves.
        (3, reading(3, utilization=0.1, kv=0.1, demand=None), 2),
        # Engines that do not measure utilisation do not block; such that measure nothing do.
        (3, reading(3, kv=0.1, utilization=None), 2),
        (3, reading(3, utilization=None, kv=None, waiting=None), 3),
        (1, reading(1, utilization=0.0, kv=0.0), 1),
        (3, reading(3, utilization=0.1, kv=0.1, sampled=2), 3),
        (40, reading(40, utilization=0.1, kv=0.1), 36),
        # One that cannot be placed goes first.
        (3, reading(2, utilization=0.1, kv=0.1), 2),
    ],
)
def test_steps_in(desired: int, last: Reading, expected: int) -> None:
    decision = after(replace(POLICY, max_replicas=50), state(desired), last)
    assert decision.state.desired == expected
    if decision.step:
        assert decision.state.reason == "ScaledIn"
        assert "nothing has waited for 3600 s" in decision.state.message


def test_taking_one_away_must_not_be_a_reason_to_add_one() -> None:
    narrow = replace(POLICY, thresholds=replace(POLICY.thresholds, utilization_out=0.6, utilization_in=0.5))
    last = reading(2, utilization=0.4, kv=0.1)
    assert not after(narrow, state(2), last).step
    assert after(narrow, state(3), replace(reading(3, utilization=0.35, kv=0.1))).step


def test_a_step_in_waits_for_any_step_before() -> None:
    idle = reading(3, utilization=0.1, kv=0.1)
    for changes in ({"step_time": NOW - timedelta(seconds=299)}, {"out_time": LONG_AGO, "step_time": NOW}):
        assert not after(POLICY, state(3, **changes), idle).step
    cooling = after(POLICY, state(3, step_time=NOW - timedelta(seconds=299)), idle)
    assert cooling.state.reason == "CoolingDown"
    assert after(POLICY, state(3, step_time=NOW - timedelta(seconds=300)), idle).step


def test_nothing_may_have_waited_for_a_while_and_what_was_not_seen_may_have_waited() -> None:
    idle = reading(3, utilization=0.1, kv=0.1)
    recent = state(3, waiting_time=NOW - timedelta(seconds=299))
    assert not after(POLICY, recent, idle).step
    unseen = after(POLICY, state(3), replace(idle, sampled=2))
    assert unseen.state.waiting_time == NOW
    assert unseen.state.reason == "DataMissing"
    assert "1 of 3 replicas had no fresh sample: nothing is taken away" in unseen.state.message


SLEEPY = AutoscalePolicy(min_replicas=0, max_replicas=4)
QUIET = Demand()


def test_it_goes_to_sleep_after_a_time_without_requests() -> None:
    idle = reading(2, utilization=0.0, kv=0.0, demand=QUIET)
    asleep = after(SLEEPY, state(2), idle)
    assert (asleep.state.desired, asleep.state.reason) == (0, "ScaledToZero")
    assert "no request for 3600 s (at least 300 s)" in asleep.state.message
    assert after(SLEEPY, state(1, active_time=NOW - timedelta(seconds=299)), idle).state.desired == 1


@pytest.mark.parametrize(
    "last",
    [
        reading(1, utilization=0.0, kv=0.0, demand=Demand(in_flight=1)),
        reading(1, utilization=0.0, kv=0.0, demand=Demand(last_request_time=NOW - timedelta(seconds=9))),
        reading(1, utilization=0.0, kv=0.0, demand=QUIET, running=Measure(1, 1)),
        # Without a router's word nobody knows, and nobody would wake it.
        reading(1, utilization=0.0, kv=0.0, demand=None),
        reading(1, utilization=0.0, kv=0.0, demand=QUIET, sampled=0),
        # It is still starting.
        reading(0, demand=QUIET),
    ],
)
def test_it_stays_awake_while_requests_come_or_may_come(last: Reading) -> None:
    assert after(SLEEPY, state(1), last).state.desired == 1


def test_the_first_request_wakes_it_at_once() -> None:
    asleep = state(0, step_time=NOW - timedelta(seconds=1), out_time=NOW - timedelta(seconds=1))
    still = decide(SLEEPY, [reading(0, demand=QUIET)], asleep, NOW)
    assert (still.state.desired, still.state.reason) == (0, "Asleep")
    woken = decide(SLEEPY, [reading(0, demand=Demand(parked=1))], asleep, NOW)
    assert (woken.state.desired, woken.state.reason, woken.step) == (1, "WokenUp", True)
    assert woken.state.message == "0 -> 1: a request waits for it"
    crowd = decide(SLEEPY, [reading(0, demand=Demand(parked=95))], asleep, NOW)
    assert crowd.state.desired == 2
    # One that has given up waiting wants it all the same.
    gone = decide(SLEEPY, [reading(0, demand=Demand(last_request_time=NOW))], asleep, NOW)
    assert gone.state.desired == 1


def test_a_floor_of_zero_does_not_end_by_low_load() -> None:
    idle = reading(2, utilization=0.0, kv=0.0, demand=Demand(in_flight=1))
    assert after(SLEEPY, state(2), idle).state.desired == 1
    assert after(SLEEPY, state(1), replace(idle, serving=1, sampled=1)).state.desired == 1


def test_bounds_hold_at_once() -> None:
    calm = reading(1)
    just_stepped = {"step_time": NOW, "out_time": NOW}
    raised = after(replace(POLICY, min_replicas=3), state(1, **just_stepped), calm)
    assert (raised.state.desired, raised.state.reason) == (3, "BelowMinimum")
    lowered = after(replace(POLICY, max_replicas=2), state(5, **just_stepped), calm)
    assert (lowered.state.desired, lowered.state.reason) == (2, "AboveMaximum")


def test_a_window_raises_at_once_and_its_end_is_left_to_the_measures() -> None:
    hours = Window("work", parse_days("*"), parse_time("08:00"), parse_time("18:00"), UTC, 4)
    policy = replace(POLICY, windows=(hours,))
    begun = after(policy, state(1, step_time=NOW), reading(1))
    assert (begun.state.desired, begun.state.reason) == (4, "CronWindow")
    assert begun.state.message == "1 -> 4: window work wants at least 4"
    assert begun.state.floor == 4
    held = after(policy, state(4), reading(4, utilization=0.0, kv=0.0))
    assert held.state.desired == 4
    # The very load under which it may shrink once the window is over.
    assert after(POLICY, state(4), reading(4, utilization=0.0, kv=0.0)).state.desired == 3


def test_the_first_decision_begins_with_the_first_number() -> None:
    decision = decide(POLICY, [reading(0)], None, NOW, first=3)
    assert (decision.state.desired, decision.step) == (3, False)
    assert decision.state.waiting_time == decision.state.active_time == NOW
