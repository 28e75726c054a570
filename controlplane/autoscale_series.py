"""Series for replays: files of measurements or of a load, as requests a second over time.

In come CSV or JSON lines, out come `Load` values in the order of time. A recorded series holds what replicas
did: the load is what they served and what their queue grew by. Every mistake is told with its line.
"""

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from controlplane.scheduler.autoscale.replay import Load
from core.errors import InvalidArgument

SERIES_BYTES_MAX = 256 * 1024 * 1024
_RATE = "requests_per_second"


def read_series(path: Path, *, begin: datetime, replica_rate: float) -> list[Load]:
    """Reads a series.

    Args:
        path: A `.jsonl` file, or CSV with a head line.
        begin: Moment that times given as seconds count from.
        replica_rate: Requests a second of a fully used replica, for recorded series.

    Raises:
        InvalidArgument: The file cannot be read, or a line is wrong.
    """
    try:
        if path.stat().st_size > SERIES_BYTES_MAX:
            raise InvalidArgument.of(str(path), f"is larger than {SERIES_BYTES_MAX} bytes; thin it out")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument.of(str(path), f"cannot be read: {error}") from error
    rows = _json_lines(text, path) if path.suffix == ".jsonl" else _csv_lines(text)
    loads: list[Load] = []
    waited_before: tuple[datetime, float] | None = None
    for number, row in rows:
        where = f"{path}:{number}"
        moment = _moment(row, begin, where)
        if loads and moment <= loads[-1].time:
            raise InvalidArgument.of(where, "is not later than the line before")
        if row.get(_RATE) not in {None, ""}:
            rate = _number(row, _RATE, where)
        else:
            rate = _number(row, "replicas", where) * _number(row, "utilization", where) * replica_rate
            waiting = _number(row, "waiting", where) if row.get("waiting") not in {None, ""} else 0.0
            if waited_before is not None:
                seconds = (moment - waited_before[0]).total_seconds()
                rate += (waiting - waited_before[1]) / seconds
            waited_before = (moment, waiting)
        loads.append(Load(moment, max(0.0, rate)))
    if len(loads) < 2:
        raise InvalidArgument.of(str(path), "needs at least two lines with a time")
    return loads


def _csv_lines(text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for index, row in enumerate(csv.DictReader(io.StringIO(text))):
        yield index + 2, row


def _json_lines(text: str, path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for index, line in enumerate(text.splitlines()):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InvalidArgument.of(f"{path}:{index + 1}", f"is no JSON: {error.msg}") from error
        if not isinstance(row, dict):
            raise InvalidArgument.of(f"{path}:{index + 1}", "is no JSON object")
        yield index + 1, row


def _moment(row: Mapping[str, Any], begin: datetime, where: str) -> datetime:
    given = row.get("time")
    if given in {None, ""}:
        raise InvalidArgument.of(where, f"has no `time`; its fields are {', '.join(map(str, row))}")
    try:
        return begin + timedelta(seconds=float(given))
    except (TypeError, ValueError, OverflowError):
        pass
    try:
        moment = datetime.fromisoformat(str(given))
    except ValueError as error:
        raise InvalidArgument.of(where, f"`{str(given)[:40]}` is neither RFC 3339 nor seconds") from error
    if moment.tzinfo is None:
        raise InvalidArgument.of(where, f"`{str(given)[:40]}` has no zone; add `Z` or an offset")
    return moment.astimezone(UTC)


def _number(row: Mapping[str, Any], name: str, where: str) -> float:
    given = row.get(name)
    if given in {None, ""}:
        raise InvalidArgument.of(
            where, f"has no `{name}`; a line holds `{_RATE}`, or `replicas` and `utilization`"
        )
    try:
        value = float(given)
    except (TypeError, ValueError) as error:
        raise InvalidArgument.of(where, f"`{name}` is `{str(given)[:40]}`, which is no number") from error
    if not math.isfinite(value) or value < 0:
        raise InvalidArgument.of(where, f"`{name}` is {value:g}; give 0 or more")
    return value
