"""Routing of a deployment and aliases of a namespace as users write them, checked: path, mistake, remedy.

In come the parts of a spec, out come violations. A strategy is checked for its form only: which plug-ins
there are is known to the routers, which refuse a wrong one in their log and use their own. Nothing here does
I/O; which deployments exist is an argument.
"""

import re
from collections.abc import Container

from google.protobuf.duration_pb2 import Duration
from millrace.core.v1 import policy_pb2

from controlplane.api import limits
from controlplane.api.violations import Violations

# A plug-in's name, and a weight where it is a scorer's: `prefix=3,kv=2`.
_STRATEGY_PART = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(=\d+(\.\d+)?)?")
# Clients send aliases as `model`: what model ids look like.
_ALIAS = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._:/-]*[A-Za-z0-9])?")


def check_routing(routing: policy_pb2.Routing, field: str, violations: Violations) -> None:
    """Checks how requests for a deployment are treated.

    Args:
        routing: What is wanted.
        field: Its path.
        violations: Takes what is wrong.
    """
    _check_strategy(routing.strategy, f"{field}.strategy", violations)
    breaker = routing.circuit_breaker
    if breaker.HasField("consecutive_failures"):
        _check_range(
            breaker.consecutive_failures,
            f"{field}.circuit_breaker.consecutive_failures",
            violations,
            least=1,
            most=limits.CONSECUTIVE_FAILURES_MAX,
        )
    if breaker.HasField("ejection"):
        _check_time(
            breaker.ejection,
            f"{field}.circuit_breaker.ejection_seconds",
            violations,
            most=limits.EJECTION_SECONDS_MAX,
        )
    if routing.HasField("queue_requests_max"):
        _check_range(
            routing.queue_requests_max,
            f"{field}.queue_requests_max",
            violations,
            least=0,
            most=limits.QUEUE_REQUESTS_MAX,
        )
    if routing.HasField("queue_timeout"):
        _check_time(
            routing.queue_timeout,
            f"{field}.queue_timeout_seconds",
            violations,
            most=limits.QUEUE_SECONDS_MAX,
        )
    name = routing.fallback_deployment
    if len(name) > limits.NAME_LENGTH_MAX or not (name.isprintable() and name == name.strip()):
        violations.add(
            f"{field}.fallback_deployment",
            "is no deployment's name; give the name of another deployment of the same namespace",
        )


def check_namespace_spec(
    spec: policy_pb2.NamespaceSpec, deployments: Container[str], violations: Violations
) -> None:
    """Checks quota and aliases of a namespace.

    Args:
        spec: What is wanted.
        deployments: Names of the namespace's deployments.
        violations: Takes what is wrong.
    """
    for name in ("devices", "replicas"):
        if spec.quota.HasField(name):
            _check_range(
                getattr(spec.quota, name), f"quota.{name}", violations, least=0, most=limits.QUOTA_MAX
            )
    if len(spec.aliases) > limits.ALIASES_MAX:
        violations.add("aliases", f"has {len(spec.aliases)} entries; at most {limits.ALIASES_MAX} are taken")
        return
    first_at: dict[str, int] = {}
    for index, alias in enumerate(spec.aliases):
        field = f"aliases[{index}]"
        if first_at.setdefault(alias.name, index) != index:
            violations.add(f"{field}.name", f"`{alias.name[:80]}` is already aliases[{first_at[alias.name]}]")
        _check_alias(alias, field, deployments, violations)


def _check_alias(
    alias: policy_pb2.ModelAlias, field: str, deployments: Container[str], violations: Violations
) -> None:
    if len(alias.name) > limits.ALIAS_LENGTH_MAX or not _ALIAS.fullmatch(alias.name):
        violations.add(
            f"{field}.name",
            f"`{alias.name[:80]}` is no model name; use letters, digits, `.`, `-`, `_`, `:` and `/`, "
            f"beginning and ending with a letter or digit, at most {limits.ALIAS_LENGTH_MAX} characters",
        )
    elif alias.name in deployments:
        violations.add(
            f"{field}.name",
            f"`{alias.name}` is a deployment of this namespace, which goes first; choose another name",
        )
    if not 1 <= len(alias.targets) <= limits.ALIAS_TARGETS_MAX:
        violations.add(
            f"{field}.targets",
            f"has {len(alias.targets)} entries; give 1 to {limits.ALIAS_TARGETS_MAX} deployments",
        )
        return
    seen: set[str] = set()
    for index, target in enumerate(alias.targets):
        path = f"{field}.targets[{index}]"
        if target.deployment not in deployments:
            violations.add(
                f"{path}.deployment",
                f"there is no deployment `{target.deployment[:80]}` in this namespace; declare it first",
            )
        elif target.deployment in seen:
            violations.add(f"{path}.deployment", f"`{target.deployment}` is there twice; give it once")
        seen.add(target.deployment)
        _check_range(target.weight, f"{path}.weight", violations, least=0, most=limits.ALIAS_WEIGHT_MAX)


def _check_strategy(strategy: str, field: str, violations: Violations) -> None:
    if not strategy:
        return
    parts = [part.strip() for part in strategy.split(",")]
    if len(strategy) > limits.STRATEGY_LENGTH_MAX or not all(
        _STRATEGY_PART.fullmatch(part) for part in parts
    ):
        violations.add(
            field,
            f"`{strategy[:80]}` is no strategy; give names of picking plug-ins separated by commas, a "
            "scorer's with a weight where wanted, such as `least-pending` or `prefix=3,kv=2,load=2`",
        )


def _check_range(value: int, field: str, violations: Violations, *, least: int, most: int) -> None:
    if not least <= value <= most:
        violations.add(field, f"{value} is out of range; give {least} to {most:,}")


def _check_time(duration: Duration, field: str, violations: Violations, *, most: float) -> None:
    """Checks a time; a malformed one has no value that could be told."""
    try:
        seconds = duration.ToTimedelta().total_seconds()
    except (ValueError, OverflowError):
        violations.add(field, "is no time; give seconds")
        return
    if not 0 < seconds <= most:
        violations.add(field, f"{seconds:g} s is out of range; give more than 0, at most {most:g} seconds")
