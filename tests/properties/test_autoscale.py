"""Generated loads, gaps in the data and slow starts: what every decision of the autoscaler keeps to."""

from collections import deque
from datetime import UTC, datetime, timedelta

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from controlplane.scheduler.autoscale import AutoscalePolicy, Demand, Measure, Reading, State, decide

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
START = datetime(2030, 1, 7, tzinfo=UTC)
TICK = timedelta(seconds=5)

policies = st.builds(
    lambda least, more, out, into: AutoscalePolicy(
        min_replicas=least,
        max_replicas=max(1, least + more),
        cooldown_out=timedelta(seconds=out),
        cooldown_in=timedelta(seconds=into),
        idle_timeout=timedelta(seconds=60),
    ),
    st.integers(0, 3),
    st.integers(0, 8),
    st.sampled_from([10, 60]),
    st.sampled_from([30, 300]),
)


@st.composite
def phases(draw: st.DrawFn) -> list[tuple[int, float, float, bool]]:
    """Stretches of time: ticks, requests that wait, use of each device, and whether samples are missing."""
    one = st.tuples(
        st.integers(1, 40),
        st.sampled_from([0.0, 0.0, 5.0, 40.0, 500.0]),
        st.sampled_from([0.0, 0.1, 0.5, 0.95]),
        st.integers(0, 3).map(lambda value: value == 3),
    )
    return draw(st.lists(one, min_size=1, max_size=6))


@QUICK
@given(policies, phases(), st.integers(0, 9), st.integers(0, 6))
def test_bounds_cool_downs_and_missing_data(
    policy: AutoscalePolicy, load: list[tuple[int, float, float, bool]], first: int, late: int
) -> None:
    state: State | None = None
    readings: deque[Reading] = deque(maxlen=20)
    wanted: deque[int] = deque([first] * (late + 1), maxlen=late + 1)
    now = START
    for ticks, waiting, utilization, missing in load:
        for _ in range(ticks):
            now += TICK
            # What was ordered serves some ticks later.
            serving = min(wanted)
            sampled = 0 if missing else serving
            busy = Measure(utilization * sampled, sampled)
            demand = Demand(parked=0 if serving else round(waiting), in_flight=round(serving * utilization))
            measured = waiting if sampled else 0.0
            readings.append(
                Reading(
                    now, serving, sampled, waiting=Measure(measured, sampled), utilization=busy, demand=demand
                )
            )
            before = state
            decision = decide(policy, readings, state, now, first=first)
            state = decision.state
            wanted.append(state.desired)
            assert policy.min_replicas <= state.desired <= policy.max_replicas
            assert state.reason
            assert state.message
            if before is None or not decision.step:
                continue
            bounded = state.reason in {"BelowMinimum", "AboveMaximum", "WokenUp"}
            if state.desired > before.desired and not bounded:
                assert before.out_time is None or now - before.out_time >= policy.cooldown_out
                assert state.desired <= before.desired + max(2, before.desired)
            if state.desired < before.desired and not bounded:
                assert before.step_time is None or now - before.step_time >= policy.cooldown_in
                assert not missing
                assert not waiting
