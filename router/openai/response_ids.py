"""Ids of `/v1/responses` that say which engine made them.

    resp_<24 random digits><8 digits of the replica>

An engine keeps its responses in its own memory, so that looking one up, cancelling it, or going on from it
(`previous_response_id`) must reach the same engine, through whichever router. vLLM takes the id from the
request (`request_id`); the router names it there. No router keeps anything. In come replica ids, out come
response ids, and the endpoint that an id leads to. An id that a client chose itself, or of an engine that
is gone, leads nowhere.
"""

import secrets
from collections.abc import Iterable, Mapping
from typing import Any

import xxhash

from router.view.view import Endpoint

# Engines that take the id of a response from the request.
NAMING_ENGINES = frozenset({"vllm", "vllm_ascend", "simulator"})

_PREFIX = "resp_"
_RANDOM_BYTES = 12
_TAG_DIGITS = 8
_LENGTH = len(_PREFIX) + 2 * _RANDOM_BYTES + _TAG_DIGITS


def _tag(replica: str) -> str:
    return xxhash.xxh32_hexdigest(replica.encode())


def name_response(body: bytes, document: Mapping[str, Any], endpoint: Endpoint) -> bytes:
    """Makes a request name its response; unchanged where the client named it or the engine would not know."""
    if "request_id" in document or endpoint.engine not in NAMING_ENGINES:
        return body
    text = body.rstrip(b" \t\r\n")
    made = f',"request_id":"{_PREFIX}{secrets.token_hex(_RANDOM_BYTES)}{_tag(endpoint.replica)}"'
    return text[:-1] + made.encode() + body[len(text) - 1 :]


def endpoint_of_response(response_id: object, endpoints: Iterable[Endpoint]) -> Endpoint | None:
    """Returns the endpoint that made a response; None where none of these did."""
    if not isinstance(response_id, str) or len(response_id) != _LENGTH:
        return None
    tag = response_id[-_TAG_DIGITS:]
    return next((each for each in endpoints if _tag(each.replica) == tag), None)
