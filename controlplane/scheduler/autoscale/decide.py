"""The decision: from readings and what was decided before to a number of replicas and why.

In come the policy, the readings of the last moments, the state and the time; out comes a `Decision`. The
rules stand in one ordered table, the first that speaks wins. Steps out rest on what is certainly there, so
that a missing sample can only make them smaller; steps in need every sample. Pure.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from controlplane.scheduler.autoscale.structs import (
    AutoscalePolicy,
    Decision,
    Floor,
    Measure,
    Reading,
    State,
)
from controlplane.scheduler.autoscale.windows import floor_at

STEP_OUT_MIN = 2
"""A step out may at least add so many; above it, it may double what is there."""
LATENCY_MEMORY = timedelta(seconds=60)
"""Routers tell the latency of the last minute: requests that waited for a start are in it for so long."""
STEP_IN_SHARE = 10
"""A step in takes one replica, or one in so many."""


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What a rule says: how many replicas, why, and in which words."""

    desired: int
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class _Case:
    """Everything that a rule may look at."""

    policy: AutoscalePolicy
    state: State
    floor: Floor
    now: datetime
    latest: Reading
    window: tuple[Reading, ...]
    settled: bool

    @property
    def observed(self) -> bool:
        """True when the readings cover enough of the time over which they are averaged."""
        return bool(self.window) and self.now - self.window[0].time >= self.policy.observation / 2

    def mean(self, total: Callable[[Reading], float]) -> float:
        """Mean of a sum over the window's readings."""
        return sum(total(each) for each in self.window) / len(self.window)

    def mean_of(self, measure: Callable[[Reading], Measure]) -> float:
        """Mean of a measure's sum over the window's readings."""
        return self.mean(lambda each: measure(each).total)

    def measured(self, measure: Callable[[Reading], Measure]) -> bool:
        """True when any replica reports it."""
        return any(measure(each).known for each in self.window)


def decide(
    policy: AutoscalePolicy,
    readings: Sequence[Reading],
    state: State | None,
    now: datetime,
    *,
    first: int = 1,
) -> Decision:
    """Decides how many replicas there should be.

    Args:
        policy: What the user allows.
        readings: Of the last moments, oldest first; at least one.
        state: From the decision before; None for the first.
        now: The present.
        first: Replicas to begin with.
    """
    if state is None:
        state = State(desired=first, waiting_time=now, active_time=now)
    latest = readings[-1]
    state = _with_evidence(state, latest, now)
    since = now - policy.observation
    if state.step_time is not None:
        since = max(since, state.step_time)
    window = tuple(each for each in readings if each.time >= since)
    floor = floor_at(policy, now)
    case = _Case(policy, state, floor, now, latest, window, _settled(readings, state, now))
    verdict = next(found for rule in RULES if (found := rule(case)) is not None)
    return _applied(state, verdict, floor, now)


def _settled(readings: Sequence[Reading], state: State, now: datetime) -> bool:
    """Tells whether a latency speaks of all replicas that are wanted.

    What is starting shortens a queue in figures at once, but a measured latency only once it serves.
    """
    since = now - LATENCY_MEMORY
    stepped = state.step_time is not None and state.step_time > since
    return not stepped and all(each.serving >= state.desired for each in readings if each.time >= since)


def _applied(state: State, verdict: _Verdict, floor: Floor, now: datetime) -> Decision:
    before = state.desired
    message = verdict.message
    if verdict.desired != before:
        message = f"{before} -> {verdict.desired}: {message}"
    state = replace(
        state,
        desired=verdict.desired,
        floor=floor.replicas,
        reason=verdict.reason,
        message=message,
        out_time=now if verdict.desired > before else state.out_time,
        step_time=now if verdict.desired != before else state.step_time,
    )
    return Decision(state, verdict.desired != before)


def _with_evidence(state: State, latest: Reading, now: datetime) -> State:
    """Notes when requests were last seen to wait and to come; what could not be seen counts as seen."""
    demand = latest.demand
    waits = latest.waiting_total > 0 or not latest.complete or latest.serving == 0
    active = waits or demand is None or demand.in_flight > 0 or latest.running.total > 0
    # A deployment that sleeps has nothing unseen: its requests park at the routers.
    asleep = state.desired == 0 and demand is not None and not demand.parked and not demand.queued
    waiting_time = now if waits and not asleep else state.waiting_time
    active_time = now if active and not asleep else state.active_time
    if demand is not None and demand.last_request_time is not None:
        active_time = max(active_time, min(now, demand.last_request_time))
    return replace(state, waiting_time=waiting_time, active_time=active_time)


def _bounds(case: _Case) -> _Verdict | None:
    """Keeps to the bounds at once; nothing cools down."""
    desired, most = case.state.desired, case.policy.max_replicas
    if desired < case.floor.replicas:
        if case.floor.window:
            message = f"window {case.floor.window} wants at least {case.floor.replicas}"
            return _Verdict(case.floor.replicas, "CronWindow", message)
        return _Verdict(
            case.floor.replicas, "BelowMinimum", f"the policy wants at least {case.floor.replicas}"
        )
    if desired > most:
        return _Verdict(most, "AboveMaximum", f"the policy allows at most {most}")
    return None


def _wake(case: _Case) -> _Verdict | None:
    """Starts a sleeping deployment with the first request."""
    if case.state.desired > 0:
        return None
    demand, slept_at = case.latest.demand, case.state.step_time
    if demand is None:
        return _Verdict(0, "Asleep", "no replica is wanted until a request comes; no router reports any")
    waiting = demand.parked + demand.queued
    came = demand.last_request_time
    if not waiting and not (came is not None and slept_at is not None and came > slept_at):
        return _Verdict(0, "Asleep", "no replica is wanted until a request comes")
    wanted = math.ceil(waiting / case.policy.thresholds.waiting_out)
    desired = min(max(1, min(wanted, STEP_OUT_MIN)), case.policy.max_replicas)
    what = f"{waiting} requests wait for it" if waiting != 1 else "a request waits for it"
    return _Verdict(desired, "WokenUp", what if waiting else "a request came for it")


def _out(case: _Case) -> _Verdict | None:
    """Adds replicas where what is certainly there is too much for all that are wanted."""
    if not case.observed:
        return None
    thresholds, desired = case.policy.thresholds, case.state.desired
    wanted: list[tuple[int, str]] = []
    waiting = case.mean(lambda each: each.waiting_total)
    # Where none serves yet, requests wait for the start and not for want of replicas.
    if case.latest.serving and waiting / desired > thresholds.waiting_out:
        limit_text = f"more than {thresholds.waiting_out:g}"
        text = f"{waiting:.0f} requests wait, {waiting / desired:.1f} a replica ({limit_text})"
        wanted.append((math.ceil(waiting / thresholds.waiting_out), text))
    for name, limit, total in (
        ("device utilisation", thresholds.utilization_out, case.mean(lambda each: each.utilization.total)),
        ("KV-cache use", thresholds.kv_usage_out, case.mean(lambda each: each.kv_usage.total)),
    ):
        if total / desired > limit:
            text = f"{name} is {min(1.0, total / desired):.1%} (more than {limit:.0%})"
            wanted.append((math.ceil(total / limit), text))
    p99_ms = case.latest.demand.first_token_p99_ms if case.latest.demand is not None else None
    if p99_ms is not None and p99_ms > thresholds.first_token_p99_out_ms and case.settled:
        text = (
            f"p99 of the first token is {p99_ms:.0f} ms (more than {thresholds.first_token_p99_out_ms:g} ms)"
        )
        wanted.append((desired + 1, text))
    if not wanted:
        return None
    # The figures are lower bounds over the replicas that serve: one more is the least.
    most_wanted = max(desired + 1, max(wanted)[0])
    target = min(most_wanted, desired + max(STEP_OUT_MIN, desired), case.policy.max_replicas)
    why = "; ".join(text for _, text in wanted) + _starting(case)
    if target <= desired:
        return _Verdict(desired, "AtMaximum", f"{why}; {desired} is the most that the policy allows")
    last = case.state.out_time
    if last is not None and case.now < last + case.policy.cooldown_out:
        after = f"{last + case.policy.cooldown_out:%H:%M:%S} UTC"
        return _Verdict(desired, "CoolingDown", f"{why}; the next step out is possible at {after}")
    return _Verdict(target, "ScaledOut", why)


def _starting(case: _Case) -> str:
    starting = max(0, case.state.desired - case.latest.serving)
    return f"; {starting} of {case.state.desired} still starting, counted" if starting else ""


def _idle(case: _Case) -> _Verdict | None:
    """Goes to sleep after a time without requests."""
    state, policy = case.state, case.policy
    if case.floor.replicas > 0 or case.now < state.active_time + policy.idle_timeout:
        return None
    if state.step_time is not None and case.now < state.step_time + policy.cooldown_in:
        return None
    seconds = (case.now - state.active_time).total_seconds()
    return _Verdict(
        0,
        "ScaledToZero",
        f"no request for {seconds:.0f} s (at least {policy.idle_timeout.total_seconds():g} s)",
    )


def _in(case: _Case) -> _Verdict | None:
    """Takes replicas away where every measure says that they are not needed, now and afterwards."""
    state, policy = case.state, case.policy
    least = max(1, case.floor.replicas)
    if state.desired <= least:
        return None
    if not case.observed:
        return None
    missing = _missing(case)
    if missing:
        return _Verdict(state.desired, "DataMissing", f"{missing}: nothing is taken away")
    target = max(least, state.desired - max(1, state.desired // STEP_IN_SHARE))
    why, quiet = _quiet(case, target)
    if not quiet:
        return None
    if state.step_time is not None and case.now < state.step_time + policy.cooldown_in:
        after = f"{state.step_time + policy.cooldown_in:%H:%M:%S} UTC"
        return _Verdict(state.desired, "CoolingDown", f"{why}; the next step in is possible at {after}")
    return _Verdict(target, "ScaledIn", why)


def _missing(case: _Case) -> str:
    """What a step in would have to know and does not; empty when nothing is missing."""
    incomplete = next((each for each in reversed(case.window) if not each.complete), None)
    if incomplete is not None:
        gone = incomplete.serving - incomplete.sampled
        return f"{gone} of {incomplete.serving} replicas had no fresh sample"
    if case.latest.serving and not any(map(case.measured, (_utilization, _kv_usage, _waiting))):
        return "the engines measure neither utilisation nor cache nor queue"
    return ""


def _utilization(reading: Reading) -> Measure:
    return reading.utilization


def _kv_usage(reading: Reading) -> Measure:
    return reading.kv_usage


def _waiting(reading: Reading) -> Measure:
    return reading.waiting


def _quiet(case: _Case, target: int) -> tuple[str, bool]:
    """Tells whether fewer replicas do, with the figures."""
    thresholds, state = case.policy.thresholds, case.state
    calm = case.now - state.waiting_time
    if calm < thresholds.waiting_in_period:
        return "", False
    figures = [f"nothing has waited for {calm.total_seconds():.0f} s"]
    serving = max(1, case.latest.serving)
    remaining = max(1, min(serving, target))
    for name, measure, inside, outside in (
        ("device utilisation", _utilization, thresholds.utilization_in, thresholds.utilization_out),
        ("KV-cache use", _kv_usage, thresholds.kv_usage_in, thresholds.kv_usage_out),
    ):
        if not case.measured(measure):
            continue
        total = case.mean_of(measure)
        # Taking one away must not be a reason to add one.
        if total / serving >= inside or total / remaining > outside:
            return "", False
        figures.append(f"{name} is {total / serving:.1%} (less than {inside:.0%})")
    p99_ms = case.latest.demand.first_token_p99_ms if case.latest.demand is not None else None
    if p99_ms is not None:
        if p99_ms >= thresholds.first_token_p99_in_ms:
            return "", False
        figures.append(f"p99 of the first token is {p99_ms:.0f} ms")
    return ", ".join(figures), True


def _hold(case: _Case) -> _Verdict:
    """Nothing calls for another number."""
    desired = case.state.desired
    if case.latest.serving < desired:
        text = f"{case.latest.serving} of {desired} replicas serve, the others are starting"
        return _Verdict(desired, "Starting", text)
    if not case.observed:
        seconds = case.policy.observation.total_seconds() / 2
        return _Verdict(desired, "Observing", f"it is measured for {seconds:g} s before anything is decided")
    if not case.latest.complete:
        gone = case.latest.serving - case.latest.sampled
        return _Verdict(
            desired, "DataMissing", f"{gone} of {case.latest.serving} replicas have no fresh sample"
        )
    if case.floor.replicas == 0 and case.latest.demand is None:
        return _Verdict(desired, "DataMissing", "no router reports requests: it cannot go to sleep")
    return _Verdict(desired, "Steady", "what is measured calls for no other number")


RULES: tuple[Callable[[_Case], _Verdict | None], ...] = (_bounds, _wake, _out, _idle, _in, _hold)
"""In order; the first that speaks wins, and the last always does."""
