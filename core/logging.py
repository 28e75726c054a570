"""Logging of every process: JSON lines for machines, readable lines on a terminal.

`configure` is called once by each process's entry point. Every line carries time, level, message,
service and version; request-scoped fields (trace_id, request_id, model, node, endpoint) come from
`structlog.contextvars`. Fields whose names look like secrets are masked here, as a second fence: the
first is not to log them.
"""

import logging
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any, Literal

import structlog

from core import VERSION

_SECRET_NAMES = ("token", "api_key", "apikey", "password", "secret", "authorization")
# Fields whose names contain a secret's name and hold none.
_NOT_SECRET = ("tokens", "token_count", "fencing_token")


def _mask_secrets(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for name in event:
        lowered = name.lower()
        if any(part in lowered for part in _SECRET_NAMES) and not any(
            part in lowered for part in _NOT_SECRET
        ):
            event[name] = "***"
    return event


def _rename_message(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    event["message"] = event.pop("event", "")
    return event


# Of the latest `configure`.
_json_fields: Mapping[str, str] | None = None


def json_fields() -> Mapping[str, str] | None:
    """Returns the fields that every line of this process has; None unless lines are written as JSON.

    For what logs too often to go through structlog: such lines must look like all others.
    """
    return _json_fields


def configure(
    *,
    service: str,
    level: str = "INFO",
    style: Literal["auto", "json", "console"] = "auto",
) -> None:
    """Sets up structlog and the standard library's logging to write to standard error.

    Args:
        service: Name of the process, on every line.
        level: Lowest level that is written.
        style: `auto` is `console` on a terminal and `json` elsewhere.
    """
    console = style == "console" or (style == "auto" and sys.stderr.isatty())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
        structlog.processors.StackInfoRenderer(),
        _mask_secrets,
    ]
    if console:
        tail: list[structlog.typing.Processor] = [structlog.dev.ConsoleRenderer(timestamp_key="time")]
    else:
        tail = [
            structlog.processors.format_exc_info,
            _rename_message,
            structlog.processors.JSONRenderer(),
        ]
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *tail],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    # Request lines come from our own middleware, with the request id.
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(service=service, version=VERSION)
    global _json_fields  # noqa: PLW0603 - logging itself is a global of the process, set up by its entry point
    _json_fields = None if console else {"service": service, "version": VERSION}
