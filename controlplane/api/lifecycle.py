"""Roll-out and autoscale policies as users write them, checked: every mistake with its path and the remedy.

In come the parts of a spec, out come violations. The zone files of this machine are asked whether a zone
exists; nothing else is read.
"""

from datetime import timedelta
from zoneinfo import ZoneInfo

from google.protobuf.duration_pb2 import Duration
from millrace.core.v1 import deployment_pb2, policy_pb2, types_pb2

from controlplane.api import limits
from controlplane.api.violations import Violations
from controlplane.scheduler.autoscale import Thresholds, parse_days, parse_time

_DAY = timedelta(days=1)
# (field of the message, attribute of the defaults): the pairs of which the first must lie above the second.
_PAIRS = (
    ("utilization_out_ratio", "utilization_out", "utilization_in_ratio", "utilization_in"),
    ("first_token_p99_out_ms", "first_token_p99_out_ms", "first_token_p99_in_ms", "first_token_p99_in_ms"),
    ("kv_usage_out_ratio", "kv_usage_out", "kv_usage_in_ratio", "kv_usage_in"),
)
_DEFAULTS = Thresholds()


def check_lifecycle(spec: deployment_pb2.DeploymentSpec, prefix: str, violations: Violations) -> None:
    """Checks how replicas are replaced and how many there are.

    Args:
        spec: What is wanted.
        prefix: Put before field names, such as `models[0].`.
        violations: Takes what is wrong.
    """
    if spec.HasField("rollout"):
        _check_rollout(spec.rollout, f"{prefix}rollout", violations)
    if spec.HasField("autoscale"):
        _check_autoscale(spec, f"{prefix}autoscale", violations)


def _check_rollout(rollout: policy_pb2.Rollout, field: str, violations: Violations) -> None:
    for name in ("max_surge", "max_unavailable"):
        value = getattr(rollout, name)
        if not 0 <= value <= limits.REPLICAS_MAX:
            violations.add(
                f"{field}.{name}", f"{value} is out of range; give 0 to {limits.REPLICAS_MAX} replicas"
            )
    both = rollout.HasField("max_surge") and rollout.HasField("max_unavailable")
    if both and rollout.max_surge == 0 and rollout.max_unavailable == 0:
        violations.add(
            f"{field}.max_unavailable",
            "0 with max_surge 0 lets nothing ever be replaced; give at least 1 to one of them",
        )
    if rollout.HasField("progress_deadline"):
        _check_duration(
            rollout.progress_deadline,
            f"{field}.progress_deadline_seconds",
            violations,
            least=timedelta(seconds=10),
        )
    if rollout.HasField("drain_timeout"):
        _check_duration(rollout.drain_timeout, f"{field}.drain_timeout_seconds", violations)


def _check_autoscale(spec: deployment_pb2.DeploymentSpec, field: str, violations: Violations) -> None:
    autoscale = spec.autoscale
    if spec.engine == types_pb2.ENGINE_EXTERNAL:
        violations.add(
            field, "an external deployment has one replica a URL and cannot be scaled; leave it out"
        )
        return
    if not 1 <= autoscale.max_replicas <= limits.REPLICAS_MAX:
        violations.add(
            f"{field}.max_replicas",
            f"{autoscale.max_replicas} is out of range; give 1 to {limits.REPLICAS_MAX}",
        )
    least = autoscale.min_replicas if autoscale.HasField("min_replicas") else 1
    if not 0 <= least <= autoscale.max_replicas:
        violations.add(
            f"{field}.min_replicas",
            f"{least} is not between 0 and max_replicas, {autoscale.max_replicas}; change one of them",
        )
    for name in ("cooldown_out", "cooldown_in", "idle_timeout"):
        if autoscale.HasField(name):
            _check_duration(getattr(autoscale, name), f"{field}.{name}_seconds", violations)
    _check_thresholds(autoscale.thresholds, f"{field}.thresholds", violations)
    if len(autoscale.cron_windows) > limits.CRON_WINDOWS_MAX:
        violations.add(
            f"{field}.cron_windows",
            f"has {len(autoscale.cron_windows)} entries; at most {limits.CRON_WINDOWS_MAX} are taken",
        )
        return
    for index, window in enumerate(autoscale.cron_windows):
        _check_window(window, autoscale.max_replicas, f"{field}.cron_windows[{index}]", violations)


def _check_thresholds(thresholds: policy_pb2.AutoscaleThresholds, field: str, violations: Violations) -> None:
    def value(name: str, attribute: str) -> float:
        present = thresholds.HasField(name)  # type: ignore[arg-type]  # a name of the message
        return float(getattr(thresholds, name) if present else getattr(_DEFAULTS, attribute))

    for out_name, out_attribute, in_name, in_attribute in _PAIRS:
        out_value, in_value = value(out_name, out_attribute), value(in_name, in_attribute)
        ratio = out_name.endswith("_ratio")
        for name, each in ((out_name, out_value), (in_name, in_value)):
            # Also refuses what is no number at all.
            if not (0 <= each <= 1 if ratio else 0 <= each <= limits.LATENCY_MS_MAX):
                violations.add(
                    f"{field}.{name}",
                    f"{each:g} is out of range; give 0 to {1 if ratio else limits.LATENCY_MS_MAX}",
                )
        if not out_value > in_value:
            violations.add(
                f"{field}.{out_name}",
                f"{out_value:g} is not above {in_name}, {in_value:g}; replicas would come and go for ever",
            )
    waiting = value("waiting_requests_out", "waiting_out")
    if not 0 < waiting <= limits.WAITING_REQUESTS_MAX:
        violations.add(
            f"{field}.waiting_requests_out",
            f"{waiting:g} is out of range; give more than 0, at most {limits.WAITING_REQUESTS_MAX}",
        )
    if thresholds.HasField("waiting_requests_in_period"):
        _check_duration(
            thresholds.waiting_requests_in_period, f"{field}.waiting_requests_in_period_seconds", violations
        )


def _check_window(window: policy_pb2.CronWindow, most: int, field: str, violations: Violations) -> None:
    try:
        parse_days(window.days)
    except ValueError as error:
        violations.add(f"{field}.days", str(error))
    for name in ("start_time", "end_time"):
        try:
            parse_time(getattr(window, name))
        except ValueError as error:
            violations.add(f"{field}.{name}", str(error))
    if not _is_zone(window.time_zone):
        violations.add(
            f"{field}.time_zone",
            f"`{window.time_zone[:40]}` is no IANA time zone; give one such as `Europe/Berlin` or `UTC`",
        )
    if not 0 <= window.replicas <= most:
        violations.add(
            f"{field}.replicas",
            f"{window.replicas} is not between 0 and max_replicas, {most}; lower it or raise the other",
        )
    _check_duration(window.warm_up, f"{field}.warm_up_seconds", violations)


def _is_zone(name: str) -> bool:
    """Tells whether a zone exists; paths, empty names and folders of zones are none."""
    try:
        ZoneInfo(name)
    except (ValueError, OSError, KeyError):
        return False
    return bool(name)


def _check_duration(
    duration: Duration, field: str, violations: Violations, *, least: timedelta = timedelta(0)
) -> None:
    """Checks a time; a malformed one has no value that could be told."""
    try:
        value = duration.ToTimedelta()
    except (ValueError, OverflowError):
        violations.add(field, "is no time; give seconds")
        return
    if not least <= value <= _DAY:
        violations.add(
            field,
            f"{value.total_seconds():g} s is out of range; give {least.total_seconds():g} to "
            f"{_DAY.total_seconds():g} seconds",
        )
