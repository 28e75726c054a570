"""Roll-out, autoscale and routing policies as callers write them, and their way to protobuf and back.

In come the optional objects `rollout`, `autoscale` and `routing` of a model's entry, out come messages, and
the other way round. Times are numbers of seconds in fields that end in `_seconds`; what is left out stays
unset. Ranges that depend on each other are the API's to check.
"""

from datetime import timedelta
from typing import Annotated, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from millrace.core.v1 import policy_pb2
from pydantic import BaseModel, ConfigDict, Field

from controlplane.api import limits

M = TypeVar("M", bound=Message)
B = TypeVar("B", bound="_Policy")

_SECONDS = "_seconds"
Seconds = Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)]
Ratio = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Milliseconds = Annotated[float, Field(ge=0, le=limits.LATENCY_MS_MAX, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=limits.REPLICAS_MAX)]


class _Policy(BaseModel):
    """What callers send: strict, but a whole number is a number too."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Rollout(_Policy):
    """Bounds of a rolling update."""

    max_surge: Count | None = Field(
        default=None, description="Replicas above the wanted number while it runs. By default 1."
    )
    max_unavailable: Count | None = Field(
        default=None, description="Replicas below it. By default 0, or 1 where a surge has no room."
    )
    progress_deadline_seconds: Seconds | None = Field(
        default=None, description="Time without progress after which it is rolled back. By default 600."
    )
    drain_timeout_seconds: Seconds | None = Field(
        default=None,
        description="Time that requests in flight get before a replica is stopped; by default the cluster's.",
    )


class Thresholds(_Policy):
    """Limits of what is measured, as means over the replicas."""

    utilization_out_ratio: Ratio | None = Field(
        default=None, description="Device utilisation above which replicas are added. By default 0.8."
    )
    utilization_in_ratio: Ratio | None = Field(
        default=None, description="Device utilisation below which some may go. By default 0.2."
    )
    waiting_requests_out: float | None = Field(
        default=None,
        gt=0,
        le=limits.WAITING_REQUESTS_MAX,
        description="Waiting requests a replica above which replicas are added. By default 10.",
    )
    waiting_requests_in_period_seconds: Seconds | None = Field(
        default=None, description="How long nothing may have waited before some may go. By default 300."
    )
    first_token_p99_out_ms: Milliseconds | None = Field(
        default=None, description="p99 of the time to first token above which one is added. By default 2000."
    )
    first_token_p99_in_ms: Milliseconds | None = Field(
        default=None, description="The same below which some may go. By default 500."
    )
    kv_usage_out_ratio: Ratio | None = Field(
        default=None, description="Key/value cache use above which replicas are added. By default 0.9."
    )
    kv_usage_in_ratio: Ratio | None = Field(
        default=None, description="The same below which some may go. By default 0.5."
    )


class CronWindow(_Policy):
    """A time of the week with a floor of its own."""

    days: str = Field(description="Days on which it starts.", examples=["mon-fri", "sat,sun", "*"])
    start_time: str = Field(description="Local time at which it starts.", examples=["08:00"])
    end_time: str = Field(
        description="Local time at which it ends; not later than the start means on the next day.",
        examples=["18:00"],
    )
    time_zone: str = Field(description="IANA time zone.", examples=["Europe/Berlin"])
    replicas: Count = Field(description="Fewest replicas while it lasts.")
    warm_up_seconds: Seconds | None = Field(
        default=None, description="How long before its start the replicas are started."
    )


class Autoscale(_Policy):
    """Lets the number of replicas follow the load; `replicas` is then only the first number."""

    min_replicas: Count | None = Field(
        default=None, description="Fewest replicas. By default 1; 0 lets it sleep until the next request."
    )
    max_replicas: Annotated[int, Field(ge=1, le=limits.REPLICAS_MAX)] = Field(description="Most replicas.")
    thresholds: Thresholds | None = Field(default=None, description="Limits of what is measured.")
    cooldown_out_seconds: Seconds | None = Field(
        default=None, description="Least time between two steps out. By default 60."
    )
    cooldown_in_seconds: Seconds | None = Field(
        default=None, description="Least time between any step and a step in. By default 300."
    )
    idle_timeout_seconds: Seconds | None = Field(
        default=None, description="Time without a request before it goes to sleep. By default 300."
    )
    cron_windows: list[CronWindow] | None = Field(
        default=None,
        max_length=limits.CRON_WINDOWS_MAX,
        description="Times of the week at which the floor is another.",
    )


class CircuitBreaker(_Policy):
    """When an endpoint is left alone."""

    consecutive_failures: Annotated[int, Field(ge=1, le=limits.CONSECUTIVE_FAILURES_MAX)] | None = Field(
        default=None, description="Failures in a row of engine or transport. By default the router's."
    )
    ejection_seconds: Seconds | None = Field(
        default=None, description="How long it is left alone the first time. By default the router's."
    )


class Routing(_Policy):
    """How routers treat requests for a deployment."""

    strategy: str | None = Field(
        default=None,
        max_length=limits.STRATEGY_LENGTH_MAX,
        description="Picking plug-ins, a scorer's with a weight where wanted. By default the router's.",
        examples=["least-pending", "prefix=3,kv=2,load=2"],
    )
    circuit_breaker: CircuitBreaker | None = Field(default=None, description="When endpoints are left alone.")
    stream_continuation: bool | None = Field(
        default=None,
        description="Continues a stream on another endpoint when its engine dies. By default false.",
    )
    fallback_deployment: str | None = Field(
        default=None, description="Deployment of the same namespace that serves when this one cannot."
    )
    queue_requests_max: Annotated[int, Field(ge=0, le=limits.QUEUE_REQUESTS_MAX)] | None = Field(
        default=None,
        description="Requests that one router worker lets wait for room. By default the router's.",
    )
    queue_timeout_seconds: Seconds | None = Field(
        default=None, description="How long they wait at most. By default the router's."
    )


def rollout_message(rollout: Rollout) -> policy_pb2.Rollout:
    """Converts what a caller sent."""
    return _to_message(rollout, policy_pb2.Rollout())


def autoscale_message(autoscale: Autoscale) -> policy_pb2.Autoscale:
    """Converts what a caller sent."""
    return _to_message(autoscale, policy_pb2.Autoscale())


def routing_message(routing: Routing) -> policy_pb2.Routing:
    """Converts what a caller sent."""
    return _to_message(routing, policy_pb2.Routing())


def rollout_of(message: policy_pb2.Rollout) -> Rollout:
    """Converts what is stored."""
    return _from_message(message, Rollout)


def autoscale_of(message: policy_pb2.Autoscale) -> Autoscale:
    """Converts what is stored."""
    return _from_message(message, Autoscale)


def routing_of(message: policy_pb2.Routing) -> Routing:
    """Converts what is stored."""
    return _from_message(message, Routing)


def _to_message(policy: _Policy, message: M) -> M:
    for name in type(policy).model_fields:
        value = getattr(policy, name)
        if value is None:
            continue
        if isinstance(value, _Policy):
            # An object without fields is one that is there.
            getattr(message, name).SetInParent()
            _to_message(value, getattr(message, name))
        elif isinstance(value, list):
            for each in value:
                _to_message(each, getattr(message, name).add())
        elif name.endswith(_SECONDS):
            getattr(message, name.removesuffix(_SECONDS)).FromTimedelta(timedelta(seconds=value))
        else:
            setattr(message, name, value)
    return message


def _from_message(message: Message, kind: type[B]) -> B:
    return kind.model_validate(_plain(message))


def _plain(message: Message) -> dict[str, object]:
    """The set fields of a policy by the names that callers use; what has no presence is always told."""
    plain: dict[str, object] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if hasattr(value, "add"):
            if value:
                plain[field.name] = [_plain(each) for each in value]
        elif field.has_presence and not message.HasField(field.name):
            continue
        elif isinstance(value, Duration):
            plain[field.name + _SECONDS] = value.ToTimedelta().total_seconds()
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            plain[field.name] = _plain(value)
        else:
            plain[field.name] = value
    return plain
