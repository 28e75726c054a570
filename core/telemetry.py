"""Identifiers that tie one request together across processes, and the Prometheus text page.

`request_id_of` accepts or makes a request id; `trace_id_of` reads W3C trace context. Metric objects
live beside the code that moves them; this module only renders the registry. Label values come from
bounded sets, never from a request's text.
"""

import random
import re
from typing import Protocol

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

REQUEST_ID_HEADER = "x-request-id"
TRACE_PARENT_HEADER = "traceparent"

# Printable, no white space or quotes: a request id goes into headers and log lines as it is.
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:@/+=-]{1,128}")
# Identifiers have to be different, not secret, and there are three in every request: a generator of this
# process, seeded by the system, takes a fifth of the system's own time.
_random = random.Random()  # noqa: S311 - as above
_TRACE_PARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}")


class _Headers(Protocol):
    """What is asked of headers here."""

    def get(self, name: str, default: str, /) -> str:
        """Returns the value of a header."""
        ...


def request_id_of(headers: _Headers) -> str:
    """Returns the caller's request id, or a new one where it is absent or malformed."""
    return given_request_id(headers.get(REQUEST_ID_HEADER, "")) or new_request_id()


def given_request_id(given: str | None) -> str | None:
    """Returns a caller's request id if it can be used."""
    return given if given and _REQUEST_ID.fullmatch(given) else None


def new_request_id() -> str:
    """Makes a request id."""
    return f"{_random.getrandbits(128):032x}"


def new_identifiers() -> tuple[str, str]:
    """Makes a request id and a `traceparent` value at once."""
    # Digits out of bytes take half the time of digits out of one large number.
    digits = _random.randbytes(40).hex()
    return digits[:32], f"00-{digits[32:64]}-{digits[64:]}-01"


def trace_id_of(headers: _Headers) -> str | None:
    """Returns the trace id of a W3C `traceparent` header; None without a valid one."""
    match = _TRACE_PARENT.fullmatch(headers.get(TRACE_PARENT_HEADER, ""))
    return match.group(1) if match and match.group(1) != "0" * 32 else None


def new_trace_parent(trace_id: str | None = None) -> str:
    """Makes a `traceparent` value, continuing a trace where one is given."""
    return f"00-{trace_id or f'{_random.getrandbits(128):032x}'}-{_random.getrandbits(64):016x}-01"


def render_metrics(registry: CollectorRegistry = REGISTRY) -> tuple[bytes, str]:
    """Returns the Prometheus text page and its content type."""
    return generate_latest(registry), CONTENT_TYPE_PLAIN_0_0_4
