"""Text for people and data for programs.

In come protobuf messages and plain data, out come strings: JSON with the contract's own field names, YAML
of the same, and tables. Texts that came from elsewhere (logs, messages) lose the control characters that
would move a terminal's cursor. A value that is not known is shown as `-`, never as 0. Nothing here talks
to a server or writes to a stream.
"""

import io
import json
import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TextIO

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

UNKNOWN = "-"
# Wide enough that no cell is ever cut: a terminal wraps what is too long for it, a pipe keeps the line.
WIDTH = 4096

_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|.)")
_STYLES = {
    "READY": "green",
    "DEGRADED": "yellow",
    "STARTING": "cyan",
    "PREPARING": "cyan",
    "ASSIGNED": "cyan",
    "PENDING": "cyan",
    "DRAINING": "yellow",
    "SILENT": "yellow",
    "WARNING": "yellow",
    "UNSCHEDULABLE": "red",
    "FAILED": "red",
    "LOST": "red",
    "FALSE": "yellow",
    "created": "green",
    "configured": "yellow",
}


def message_data(message: Message) -> Any:
    """Returns a message as plain data: snake_case names, absent optional fields left out."""
    data = MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    return _whole_numbers(data)


def _whole_numbers(value: Any) -> Any:
    """Writes 50 where a user wrote 50: free-form objects travel as floating point."""
    if isinstance(value, dict):
        return {name: _whole_numbers(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_whole_numbers(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def dump(data: Any, output: str) -> str:
    """Returns data as JSON or YAML."""
    if output == "yaml":
        import yaml

        return str(yaml.safe_dump(data, sort_keys=False, allow_unicode=True))
    return json.dumps(data, indent=2, ensure_ascii=False)


def dump_line(data: Any, output: str) -> str:
    """Returns one item of a stream: one line of JSON, or one YAML document."""
    if output == "yaml":
        return "---\n" + dump(data, output)
    return json.dumps(data, ensure_ascii=False)


def printable(text: str) -> str:
    """Removes escape sequences and control characters, tabs excepted."""
    cleaned = _ANSI.sub("", text)
    return "".join(each for each in cleaned if each == "\t" or each.isprintable())


def enum_name(message: Message, field: str) -> str:
    """Returns the value of an enum field without its prefix: READY, VLLM_ASCEND; numbers where unknown."""
    descriptor = message.DESCRIPTOR.fields_by_name[field].enum_type
    assert descriptor is not None
    number = getattr(message, field)
    value = descriptor.values_by_number.get(number)
    if value is None:
        # A newer server may know values that this client does not.
        return str(number)
    if number == 0:
        return UNKNOWN
    prefix = descriptor.values_by_number[0].name.removesuffix("UNSPECIFIED")
    return str(value.name.removeprefix(prefix))


def spelled(message: Message, field: str) -> str:
    """Returns an engine or quantization as the declaration spells it: vllm-ascend, none."""
    return enum_name(message, field).lower().replace("_", "-")


def moment(timestamp: Timestamp) -> datetime | None:
    """Returns a timestamp as a time in UTC; None where it is not set."""
    return timestamp.ToDatetime(tzinfo=UTC) if timestamp.seconds or timestamp.nanos else None


def duration_text(seconds: float) -> str:
    """Returns a duration as kubectl writes ages: 42s, 7m, 3h, 12d."""
    for limit_seconds, unit_seconds, unit in ((120, 1, "s"), (7200, 60, "m"), (172800, 3600, "h")):
        if seconds < limit_seconds:
            return f"{int(max(seconds, 0)) // unit_seconds}{unit}"
    return f"{int(seconds) // 86400}d"


def age_text(timestamp: Timestamp, now: datetime | None = None) -> str:
    """Returns how long ago something was."""
    then = moment(timestamp)
    return UNKNOWN if then is None else duration_text(((now or datetime.now(UTC)) - then).total_seconds())


def time_text(timestamp: Timestamp) -> str:
    """Returns a time in the local zone, to the second, with the zone."""
    then = moment(timestamp)
    return UNKNOWN if then is None else then.astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")


def bytes_text(count: int) -> str:
    """Returns a number of bytes in binary units."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            return f"{int(value)} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable: the last unit always returns")


def styled(text: str, style: str | None = None) -> "Text":
    """Returns text that is never read as markup, in the colour of its meaning."""
    from rich.text import Text

    cleaned = printable(text)
    return Text(cleaned, style=style if style is not None else _STYLES.get(cleaned, ""))


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> "Table":
    """Returns a table without lines, as kubectl's."""
    from rich.table import Table

    built = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for position, column in enumerate(columns):
        last = position == len(columns) - 1
        built.add_column(column, no_wrap=not last, overflow="fold" if last else "ellipsis")
    for row in rows:
        built.add_row(*(styled(each or UNKNOWN) for each in row))
    return built


def to_text(renderables: Iterable[Any], *, stream: TextIO, color: bool) -> str:
    """Renders for a stream: coloured on a terminal, plain anywhere else; nothing is cut for its width."""
    from rich.console import Console

    buffer = io.StringIO()
    console = Console(
        file=buffer,
        force_terminal=stream.isatty(),
        no_color=True if not color else None,
        width=WIDTH,
        soft_wrap=True,
        highlight=False,
        markup=False,
        emoji=False,
    )
    for each in renderables:
        console.print(each)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())
