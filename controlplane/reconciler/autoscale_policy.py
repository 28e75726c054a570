"""What a user allows the autoscaler, from protobuf to the pure values; zone files are read here.

In come `Autoscale` messages that the API has checked, out come `AutoscalePolicy` and the other way round its
state. A zone that this machine does not know is an error with a name: the window that it belongs to cannot be
kept to.
"""

from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

from google.protobuf.duration_pb2 import Duration
from millrace.core.v1 import policy_pb2
from millrace.state.v1 import records_pb2

from controlplane.scheduler.autoscale import (
    AutoscalePolicy,
    State,
    Thresholds,
    Window,
    parse_days,
    parse_time,
)
from core.clock import from_timestamp, to_timestamp

_DEFAULTS = AutoscalePolicy()
_THRESHOLDS = Thresholds()
# Engines are sampled once a second: below this an average would rest on one sample.
_OBSERVATION_MIN = timedelta(seconds=4)


def policy_of(autoscale: policy_pb2.Autoscale) -> AutoscalePolicy:
    """Converts a policy, with the defaults of requirement R6 where it does not say.

    Raises:
        ZoneInfoNotFoundError: A window's zone is not known to this machine.
        ValueError: A window's days or times are malformed, which the API refuses.
    """
    cooldown_out = _duration(autoscale, "cooldown_out", _DEFAULTS.cooldown_out)
    return AutoscalePolicy(
        min_replicas=autoscale.min_replicas if autoscale.HasField("min_replicas") else 1,
        max_replicas=autoscale.max_replicas,
        thresholds=_thresholds(autoscale.thresholds),
        cooldown_out=cooldown_out,
        cooldown_in=_duration(autoscale, "cooldown_in", _DEFAULTS.cooldown_in),
        idle_timeout=_duration(autoscale, "idle_timeout", _DEFAULTS.idle_timeout),
        windows=tuple(_window(each) for each in autoscale.cron_windows),
        # Who wants quick steps wants quick eyes too.
        observation=max(_OBSERVATION_MIN, min(_DEFAULTS.observation, cooldown_out)),
    )


def state_of(record: records_pb2.AutoscaleState) -> State | None:
    """Converts what is kept; None where its times are missing."""
    waiting_time, active_time = from_timestamp(record.waiting_time), from_timestamp(record.active_time)
    if waiting_time is None or active_time is None:
        return None
    return State(
        desired=record.desired_replicas,
        waiting_time=waiting_time,
        active_time=active_time,
        floor=record.floor_replicas,
        reason=record.reason,
        message=record.message,
        out_time=from_timestamp(record.out_time),
        step_time=from_timestamp(record.step_time),
    )


def record_of(state: State, first: int) -> records_pb2.AutoscaleState:
    """Converts what is to be kept."""
    record = records_pb2.AutoscaleState(
        desired_replicas=state.desired,
        floor_replicas=state.floor,
        reason=state.reason,
        message=state.message,
        waiting_time=to_timestamp(state.waiting_time),
        active_time=to_timestamp(state.active_time),
        first_replicas=first,
    )
    if state.out_time is not None:
        record.out_time.CopyFrom(to_timestamp(state.out_time))
    if state.step_time is not None:
        record.step_time.CopyFrom(to_timestamp(state.step_time))
    return record


def delayed(state: State, now: datetime, delay: timedelta) -> State:
    """The state after a change of the leader: what was seen last may have been written so much too early."""
    return State(
        desired=state.desired,
        waiting_time=min(now, state.waiting_time + delay),
        active_time=min(now, state.active_time + delay),
        floor=state.floor,
        reason=state.reason,
        message=state.message,
        out_time=state.out_time,
        step_time=state.step_time,
    )


def _thresholds(given: policy_pb2.AutoscaleThresholds) -> Thresholds:
    def value(name: str, default: float) -> float:
        present = given.HasField(name)  # type: ignore[arg-type]  # a name of the message
        return float(getattr(given, name)) if present else default

    period = given.waiting_requests_in_period
    return Thresholds(
        utilization_out=value("utilization_out_ratio", _THRESHOLDS.utilization_out),
        utilization_in=value("utilization_in_ratio", _THRESHOLDS.utilization_in),
        waiting_out=value("waiting_requests_out", _THRESHOLDS.waiting_out),
        waiting_in_period=(
            period.ToTimedelta()
            if given.HasField("waiting_requests_in_period")
            else _THRESHOLDS.waiting_in_period
        ),
        first_token_p99_out_ms=value("first_token_p99_out_ms", _THRESHOLDS.first_token_p99_out_ms),
        first_token_p99_in_ms=value("first_token_p99_in_ms", _THRESHOLDS.first_token_p99_in_ms),
        kv_usage_out=value("kv_usage_out_ratio", _THRESHOLDS.kv_usage_out),
        kv_usage_in=value("kv_usage_in_ratio", _THRESHOLDS.kv_usage_in),
    )


def _window(window: policy_pb2.CronWindow) -> Window:
    return Window(
        name=f"{window.days} {window.start_time}-{window.end_time} {window.time_zone}",
        days=parse_days(window.days),
        start=parse_time(window.start_time),
        end=parse_time(window.end_time),
        zone=ZoneInfo(window.time_zone),
        replicas=window.replicas,
        warm_up=window.warm_up.ToTimedelta(),
    )


def _duration(autoscale: policy_pb2.Autoscale, name: str, default: timedelta) -> timedelta:
    if not autoscale.HasField(name):  # type: ignore[arg-type]  # a name of the message
        return default
    value: Duration = getattr(autoscale, name)
    return value.ToTimedelta()
