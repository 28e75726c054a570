"""`millrace describe`: everything about a deployment, and above all why it is as it is.

In comes a name; out come spec, status, what one replica needs, conditions with their reasons, replicas,
the last failure with the end of its log, each node's verdict, and recent events. A part that cannot be
had is named with its cause, and does not hide the rest.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from millrace_client import errors
from millrace_client.cli.session import Session, command

if TYPE_CHECKING:
    from google.protobuf.timestamp_pb2 import Timestamp
    from millrace.core.v1.deployment_pb2 import Deployment, ReplicaSummary
    from millrace.core.v1.event_pb2 import Event
    from millrace.core.v1.sizing_pb2 import Sizing
    from millrace.scheduler.v1.scheduler_service_pb2 import ExplainDeploymentResponse

    from millrace_client.client import MillraceClient

EVENTS_SHOWN_MAX = 20


@dataclass(slots=True)
class _Report:
    """What could be had; `missing` names the parts that could not, with the cause."""

    deployment: "Deployment"
    explanation: "ExplainDeploymentResponse | None" = None
    events: "deque[Event]" = field(default_factory=lambda: deque(maxlen=EVENTS_SHOWN_MAX))
    missing: dict[str, str] = field(default_factory=dict)


@command
def describe(
    session: Session,
    name: Annotated[str, typer.Argument(help="Deployment; may be written namespace/name.")],
) -> None:
    """Show a deployment in full: what it needs, where it runs, and why.

    Examples:
      millrace describe qwen
      millrace describe team-ai/qwen -o json
    """
    from millrace_client.cli.render import message_data

    key = session.split_name(name)
    report = session.run(lambda client: _gather(client, key))
    if session.structured:
        session.emit(
            {
                "deployment": message_data(report.deployment),
                "explanation": message_data(report.explanation) if report.explanation is not None else None,
                "events": [message_data(each) for each in report.events],
                "missing": report.missing,
            }
        )
    else:
        session.show(*_sections(report))


async def _gather(client: "MillraceClient", key: tuple[str, str]) -> _Report:
    report = _Report(await client.get(*key))
    try:
        report.explanation = await client.explain(*key)
    except errors.MillraceError as error:
        report.missing["explanation"] = error.message
    try:
        async with aclosing(client.events(*key)) as stream:
            async for event in stream:
                report.events.append(event)
    except errors.MillraceError as error:
        report.missing["events"] = error.message
    return report


def _sections(report: _Report) -> Iterator[Any]:
    deployment = report.deployment
    yield from _identity(deployment)
    yield from _sizing(deployment.status.sizing if deployment.status.HasField("sizing") else None)
    yield from _measured(deployment)
    yield from _conditions(deployment)
    yield from _autoscale(deployment)
    yield from _replicas(deployment)
    yield from _failure(deployment)
    yield from _explanation(report)
    yield from _events(report)


def _heading(text: str) -> Any:
    from millrace_client.cli.render import styled

    return styled(text, "bold")


def _identity(deployment: "Deployment") -> Iterator[Any]:
    from millrace_client.cli.get import phase_text
    from millrace_client.cli.render import message_data, spelled

    spec, status = deployment.spec, deployment.status
    behind = (
        ""
        if status.observed_generation == deployment.generation
        else (f" (status speaks of generation {status.observed_generation})")
    )
    context_length = (
        str(spec.max_model_len) if spec.HasField("max_model_len") else "worked out from the model"
    )
    wanted = str(spec.replicas) if spec.HasField("replicas") else "1 (default)"
    if status.HasField("autoscale"):
        wanted = str(status.desired_replicas)
    yield from _pairs(
        ("Name", deployment.name),
        ("Namespace", deployment.namespace),
        ("Created", _when(deployment.create_time)),
        ("Generation", f"{deployment.generation}{behind}"),
        ("Model", spec.model),
        ("Engine", spelled(spec, "engine")),
        ("Quantization", spelled(spec, "quantization")),
        ("Context", context_length),
        ("Replicas", f"{wanted} wanted, {status.ready_replicas} ready"),
        ("Engine arguments", _plain_object(message_data(spec).get("extra_args"))),
        ("Metadata", _plain_object(message_data(deployment).get("metadata"))),
        ("Phase", phase_text(deployment) + (", reconciling" if status.reconciling else "")),
    )


def _when(timestamp: "Timestamp") -> str:
    from millrace_client.cli.render import UNKNOWN, age_text, moment, time_text

    if moment(timestamp) is None:
        return UNKNOWN
    return f"{time_text(timestamp)} ({age_text(timestamp)} ago)"


def _plain_object(value: Any) -> str:
    import json

    return json.dumps(value, ensure_ascii=False) if value else ""


def _pairs(*pairs: tuple[str, str]) -> Iterator[Any]:
    from rich.table import Table

    from millrace_client.cli.render import styled

    grid = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for label, value in pairs:
        if value:
            grid.add_row(styled(f"{label}:", "bold"), styled(value))
    yield grid


def _sizing(sizing: "Sizing | None") -> Iterator[Any]:
    from millrace_client.cli.render import bytes_text, styled, table

    if sizing is None:
        return
    yield ""
    yield _heading("One replica needs")
    if sizing.summary:
        yield styled(f"  {sizing.summary}")
    rows = [(f"  {each.name}", bytes_text(each.bytes), each.explanation) for each in sizing.terms]
    if rows:
        yield table(("  TERM", "MEMORY", "HOW"), [*rows, ("  total", bytes_text(sizing.total_bytes), " ")])


def _measured(deployment: "Deployment") -> Iterator[Any]:
    """What engines reported of themselves beside what was worked out for them."""
    from millrace_client.cli.render import bytes_text, table

    sizing = deployment.status.sizing
    estimated = {
        "weights_bytes": sizing.weights_bytes,
        "kv_cache_bytes": sizing.kv_cache_bytes,
        "kv_cache_tokens": sizing.kv_cache_tokens,
        "resident_bytes": sizing.total_bytes - sizing.kv_cache_bytes,
        "graph_bytes": 0,
    }
    names = {
        "weights_bytes": "weights",
        "kv_cache_bytes": "KV cache",
        "kv_cache_tokens": "KV tokens",
        "resident_bytes": "in memory after the start",
        "graph_bytes": "graphs a device",
    }
    rows = []
    for replica in deployment.status.replicas:
        told = {each.name: value for each, value in replica.facts.ListFields()}
        for fact, name in names.items():
            if fact not in told:
                continue
            measured, expected = told[fact], estimated[fact]
            text = (lambda value: f"{value:,}") if fact == "kv_cache_tokens" else bytes_text
            difference = f"{(measured - expected) / expected:+.1%}" if expected else ""
            rows.append(
                (f"  {replica.replica}", name, text(expected) if expected else "", text(measured), difference)
            )
    if rows:
        yield ""
        yield _heading("Worked out and measured")
        yield table(("  REPLICA", "TERM", "WORKED OUT", "MEASURED", "DIFFERENCE"), rows)


def _conditions(deployment: "Deployment") -> Iterator[Any]:
    from millrace_client.cli.render import age_text, enum_name, table

    if not deployment.status.conditions:
        return
    yield ""
    yield _heading("Conditions")
    yield table(
        ("  TYPE", "STATUS", "SINCE", "REASON", "MESSAGE"),
        [
            (
                f"  {each.type}",
                enum_name(each, "status"),
                age_text(each.transition_time),
                each.reason,
                each.message,
            )
            for each in deployment.status.conditions
        ],
    )


def _autoscale(deployment: "Deployment") -> Iterator[Any]:
    from millrace_client.cli.render import moment

    if not deployment.spec.HasField("autoscale"):
        return
    policy, status = deployment.spec.autoscale, deployment.status
    least = policy.min_replicas if policy.HasField("min_replicas") else 1
    yield ""
    yield _heading("Autoscaling")
    if not status.HasField("autoscale"):
        yield f"  {least} to {policy.max_replicas} replicas; nothing has been decided yet"
        return
    found = status.autoscale
    window = f", {found.floor_replicas} at this time" if found.floor_replicas != least else ""
    yield from _pairs(
        ("  Bounds", f"{least}{window} to {policy.max_replicas}"),
        ("  Wanted", str(found.desired_replicas)),
        ("  Reason", found.reason),
        ("  Why", found.message),
        ("  Last step", _when(found.step_time) if moment(found.step_time) is not None else "none yet"),
    )


def _replicas(deployment: "Deployment") -> Iterator[Any]:
    from millrace_client.cli.render import age_text, table

    yield ""
    yield _heading("Replicas")
    if not deployment.status.replicas:
        yield "  none"
        return
    columns = (
        "  REPLICA",
        "STATE",
        "NODE",
        "PID",
        "DEVICES",
        "URL",
        "PLACED",
        "READY",
        "ENGINE START",
        "MESSAGE",
    )
    yield table(
        columns,
        [
            (
                f"  {each.replica}",
                _state(each),
                each.node,
                str(each.pid) if each.pid else "",
                ",".join(each.device_ids),
                each.url,
                age_text(each.assign_time),
                age_text(each.ready_time),
                f"{each.engine_start_ms} ms" if each.engine_start_ms else "",
                each.message,
            )
            for each in deployment.status.replicas
        ],
    )


def _state(replica: "ReplicaSummary") -> str:
    """Returns a replica's state; one that runs and fails its health checks is not READY to a reader."""
    from millrace_client.cli.render import enum_name

    state = enum_name(replica, "state")
    return "UNHEALTHY" if state == "READY" and not replica.healthy else state


def _failure(deployment: "Deployment") -> Iterator[Any]:
    from millrace_client.cli.progress import log_tail
    from millrace_client.cli.render import moment, styled, time_text

    if not deployment.status.HasField("last_failure"):
        return
    failure = deployment.status.last_failure
    yield ""
    yield _heading("Last failure")
    where = f"{failure.replica} on {failure.node}" if failure.node else failure.replica
    next_attempt = "under way or not needed"
    if moment(failure.next_attempt_time) is not None:
        next_attempt = time_text(failure.next_attempt_time)
    yield from _pairs(
        ("  What", failure.message),
        ("  Where", where),
        ("  When", _when(failure.time)),
        ("  In a row", str(failure.consecutive_failures)),
        ("  Next attempt", next_attempt),
    )
    lines = log_tail(deployment)
    if lines:
        yield styled("  Last lines of its log:", "bold")
        yield from (styled(f"    {line}") for line in lines)


def _explanation(report: _Report) -> Iterator[Any]:
    from millrace_client.cli.render import styled, table

    yield ""
    yield _heading("Why")
    explanation = report.explanation
    if explanation is None:
        yield styled(f"  not available: {report.missing.get('explanation', '')}")
        return
    if explanation.summary:
        yield styled(f"  {explanation.summary}")
    if explanation.suggestion:
        yield styled(f"  Instead: {explanation.suggestion}")
    if explanation.nodes:
        yield table(
            ("  NODE", "ONE MORE FITS", "SCORE", "RULE", "WHY"),
            [
                (
                    f"  {each.node}",
                    "yes" if each.fits else "no",
                    f"{each.score:.2f}" if each.fits else "",
                    each.failed_rule,
                    each.message,
                )
                for each in explanation.nodes
            ],
        )


def _events(report: _Report) -> Iterator[Any]:
    from millrace_client.cli.render import age_text, enum_name, styled, table

    yield ""
    yield _heading("Events")
    if "events" in report.missing:
        yield styled(f"  not available: {report.missing['events']}")
    elif not report.events:
        yield "  none in the last 24 hours"
    else:
        yield table(
            ("  AGE", "SEVERITY", "REASON", "ABOUT", "MESSAGE"),
            [
                (
                    f"  {age_text(each.time)}",
                    enum_name(each, "severity"),
                    each.reason,
                    each.replica or each.node or each.deployment,
                    each.message,
                )
                for each in report.events
            ],
        )
