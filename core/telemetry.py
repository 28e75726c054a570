"""Identifiers that tie one request together across processes, and the Prometheus text page.

`request_id_of` accepts or makes a request id; `trace_id_of` reads W3C trace context. Metric objects
live beside the code that moves them; this module only renders the registry. Label values come from
bounded sets, never from a request's text.
"""

import re
import secrets
import uuid
from collections.abc import Mapping

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

REQUEST_ID_HEADER = "x-request-id"
TRACE_PARENT_HEADER = "traceparent"

# Printable, no white space or quotes: a request id goes into headers and log lines as it is.
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:@/+=-]{1,128}")
_TRACE_PARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}")


def request_id_of(headers: Mapping[str, str]) -> str:
    """Returns the caller's request id, or a new one where it is absent or malformed."""
    given = headers.get(REQUEST_ID_HEADER, "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def trace_id_of(headers: Mapping[str, str]) -> str | None:
    """Returns the trace id of a W3C `traceparent` header; None without a valid one."""
    match = _TRACE_PARENT.fullmatch(headers.get(TRACE_PARENT_HEADER, ""))
    return match.group(1) if match and match.group(1) != "0" * 32 else None


def new_trace_parent(trace_id: str | None = None) -> str:
    """Makes a `traceparent` value, continuing a trace where one is given."""
    return f"00-{trace_id or secrets.token_hex(16)}-{secrets.token_hex(8)}-01"


def render_metrics(registry: CollectorRegistry = REGISTRY) -> tuple[bytes, str]:
    """Returns the Prometheus text page and its content type."""
    return generate_latest(registry), CONTENT_TYPE_PLAIN_0_0_4
