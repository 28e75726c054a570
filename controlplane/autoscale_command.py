"""`millrace-autoscale`: an autoscale policy tried on a series, without a cluster.

In come a policy as declarations have it and a series of measurements or of a load; out go the steps that the
autoscaler would have taken with their why, a summary, and a plot. `millrace autoscale` becomes this program.
Nothing is declared or started.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from millrace.core.v1 import deployment_pb2

from controlplane.api.lifecycle import check_lifecycle
from controlplane.api.violations import Violations
from controlplane.autoscale_plot import draw
from controlplane.autoscale_series import read_series
from controlplane.gateway.bodies import parse_body
from controlplane.gateway.policies import Autoscale, autoscale_message
from controlplane.reconciler.autoscale_policy import policy_of
from controlplane.scheduler.autoscale import AutoscalePolicy
from controlplane.scheduler.autoscale.replay import LATE_SECONDS, Moment, ServiceModel, Summary, replay
from core.errors import InvalidArgument, MillraceError

# A Monday: windows of working days show at once.
_FIRST_MOMENT = datetime(2030, 1, 7, tzinfo=UTC)
_POLICY_BYTES_MAX = 1024 * 1024
_TICKS_MAX = 2_000_000


def main(arguments: Sequence[str] | None = None) -> None:
    """Replays one policy.

    Exit codes: 0 with an answer; 2 for a wrong option, policy or series, and where a plot cannot be drawn.
    """
    parsed = _parser().parse_args(arguments)
    try:
        text = _replay(parsed)
    except MillraceError as error:
        sys.stderr.write(f"error: {error.message}\n")
        raise SystemExit(2) from None
    sys.stdout.write(text)


def _replay(parsed: argparse.Namespace) -> str:
    zone = _zone(parsed.time_zone)
    policy = read_policy(Path(parsed.policy))
    loads = read_series(
        Path(parsed.series), begin=_FIRST_MOMENT, replica_rate=parsed.replica_requests_per_second
    )
    tick = timedelta(seconds=parsed.tick_seconds)
    if (loads[-1].time - loads[0].time) / tick > _TICKS_MAX:
        raise InvalidArgument.of("--tick-seconds", f"takes more than {_TICKS_MAX} ticks; give a longer one")
    model = ServiceModel(
        requests_per_second=parsed.replica_requests_per_second,
        request_seconds=parsed.request_seconds,
        start=timedelta(seconds=parsed.start_seconds),
        first_token_ms=parsed.first_token_ms,
    )
    moments, summary = replay(policy, loads, model, first=parsed.replicas, tick=tick)
    if parsed.plot is not None:
        draw(Path(parsed.plot), moments, summary, model=model, zone=zone, title=parsed.title)
    return as_json(moments, summary) if parsed.output == "json" else as_table(moments, summary, zone)


def read_policy(path: Path) -> AutoscalePolicy:
    """Reads the `autoscale` object of a model's entry.

    Raises:
        InvalidArgument: The file cannot be read, or a field is wrong.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InvalidArgument.of(str(path), f"cannot be read: {error.strerror}") from error
    if len(raw) > _POLICY_BYTES_MAX:
        raise InvalidArgument.of(str(path), "is larger than 1 MiB: is it the right file?")
    spec = deployment_pb2.DeploymentSpec(autoscale=autoscale_message(parse_body(raw, Autoscale)))
    violations = Violations()
    check_lifecycle(spec, "", violations)
    violations.raise_if_any()
    return policy_of(spec.autoscale)


def as_table(moments: Sequence[Moment], summary: Summary, zone: tzinfo) -> str:
    """The steps as people read them, and the summary."""
    lines = [f"{'TIME':<21}{'WANTED':>7}{'SERVING':>9}{'QUEUED':>8}  WHY"]
    lines += [
        f"{each.time.astimezone(zone):%a %Y-%m-%d %H:%M}{each.desired:>8}{each.serving:>9}{each.queued:>8}  "
        f"{each.reason}: {each.step}"
        for each in moments
        if each.step
    ]
    if not summary.steps:
        lines.append(f"no step: {moments[-1].desired} replicas all the time")
    late = summary.late / summary.requests if summary.requests else 0.0
    always = f"the most, {summary.most}, all the time: {summary.fixed_hours:.1f}"
    waited = f"{late:.2%} waited longer than {LATE_SECONDS:g} s"
    longest = f"the longest {summary.longest_wait.total_seconds():.0f} s"
    lines += [
        "",
        f"steps          {summary.steps}",
        f"replica hours  {summary.replica_hours:.1f} ({always})",
        f"requests       {summary.requests:,}, {waited}, {longest}",
    ]
    if summary.unserved:
        lines.append(f"               {summary.unserved:,} still waited at the end")
    return "\n".join(lines) + "\n"


def as_json(moments: Sequence[Moment], summary: Summary) -> str:
    """Every moment and the summary as programs read them; times in UTC."""
    figures: dict[str, Any] = asdict(summary)
    figures["longest_wait_seconds"] = figures.pop("longest_wait").total_seconds()
    document = {
        "summary": figures,
        "moments": [{**asdict(each), "time": each.time.isoformat()} for each in moments],
    }
    return json.dumps(document) + "\n"


def _zone(name: str) -> tzinfo:
    try:
        return ZoneInfo(name)
    except (ValueError, OSError, KeyError) as error:
        raise InvalidArgument.of("--time-zone", f"`{name[:40]}` is no IANA time zone") from error


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"{text} has to be more than 0")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="millrace autoscale", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "replay",
        help="run a policy over a series",
        description="What a policy would have done over a series, and why. Needs no cluster.",
    )
    command.add_argument("policy", metavar="POLICY", help="JSON file: the `autoscale` object of a model")
    command.add_argument(
        "series",
        metavar="SERIES",
        help="CSV or JSON lines with `time` (RFC 3339, or seconds) and either `requests_per_second`, or "
        "`replicas` and `utilization` (0 to 1), and `waiting` where it is known",
    )
    default = ServiceModel()
    command.add_argument(
        "--replica-requests-per-second",
        type=_positive,
        default=default.requests_per_second,
        metavar="N",
        help="what a replica serves (default %(default)s)",
    )
    command.add_argument(
        "--request-seconds", type=_positive, default=default.request_seconds, metavar="N",
        help="how long it works on one request (default %(default)s)",
    )  # fmt: skip
    command.add_argument(
        "--start-seconds", type=_positive, default=default.start.total_seconds(), metavar="N",
        help="from the order of a replica to its first token (default %(default)s)",
    )  # fmt: skip
    command.add_argument(
        "--first-token-ms", type=_positive, default=default.first_token_ms, metavar="N",
        help="time to first token without waiting (default %(default)s)",
    )  # fmt: skip
    command.add_argument("--replicas", type=int, default=1, metavar="N", help="at the beginning (default 1)")
    command.add_argument("--tick-seconds", type=_positive, default=5.0, metavar="N", help="default 5")
    command.add_argument("--time-zone", default="UTC", metavar="NAME", help="of what is shown (default UTC)")
    command.add_argument("--plot", metavar="FILE.png", help="draw it; needs `pip install millrace[plots]`")
    command.add_argument("--title", default="", help="above the plot")
    command.add_argument("--output", "-o", choices=("table", "json"), default="table")
    return parser
