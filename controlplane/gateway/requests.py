"""What handlers take from a request: who calls, under which id, with which body."""

from collections.abc import Callable
from typing import Any, TypeVar

from aiohttp import web
from pydantic import BaseModel

from controlplane.gateway.backend import Backend
from controlplane.gateway.bodies import parse_body
from core.errors import FailedPrecondition, FieldViolation, InvalidArgument

Model = TypeVar("Model", bound=BaseModel)


class Sockets(set[web.WebSocketResponse]):
    """Open WebSockets, which are told when the server goes."""


BACKEND: web.AppKey[Backend] = web.AppKey("backend", Backend)
READY: web.AppKey[Callable[[], bool]] = web.AppKey("ready")
STOPPING: web.AppKey[Sockets] = web.AppKey("stopping")
REQUEST_ID: web.RequestKey[str] = web.RequestKey("request_id", str)

IDEMPOTENCY_HEADER = "Idempotency-Key"
_AS_WRITTEN = {"page_size": "pageSize", "page_token": "pageToken", "request_id": IDEMPOTENCY_HEADER}


async def body_of(request: web.Request, model: type[Model]) -> Model:
    """Reads a request's body.

    Raises:
        InvalidArgument: With every wrong field.
        web.HTTPRequestEntityTooLarge: It is larger than the application takes.
    """
    return parse_body(await request.read(), model)


async def call(request: web.Request, method: str, message: Any) -> Any:
    """Makes a call with the caller's own credential.

    Raises:
        MillraceError: What the service refused with.
    """
    try:
        return await request.app[BACKEND].call(
            method,
            message,
            authorization=request.headers.get("Authorization", ""),
            request_id=request[REQUEST_ID],
        )
    except InvalidArgument as error:
        raise InvalidArgument(
            [FieldViolation(_as_written(each.field), each.description) for each in error.violations],
            reason=error.reason,
            metadata={**error.metadata, "field": _as_written(error.metadata.get("field", ""))},
        ) from error
    except FailedPrecondition as error:
        field = error.metadata.get("field", "")
        written, text = _as_written(field), error.message.removeprefix(f"{field}: ")
        raise FailedPrecondition(
            f"{written}: {text}" if written else text,
            reason=error.reason,
            metadata={**error.metadata, "field": written},
        ) from error


def _as_written(field: str) -> str:
    """Names a field as HTTP callers write it."""
    return _AS_WRITTEN.get(field, field.removeprefix("spec."))


def etag_of(request: web.Request) -> str:
    """Returns the etag of `If-Match`; empty where any version will do.

    Raises:
        InvalidArgument: It names several.
    """
    given = request.headers.get("If-Match", "").strip()
    if given in {"", "*"}:
        return ""
    if "," in given:
        raise InvalidArgument.of(
            "If-Match", "names several versions; give the one that the change is based on"
        )
    return given.removeprefix("W/").strip('"')


def answer(model: BaseModel, *, status: int = 200, etag: str = "") -> web.Response:
    """Makes an answer."""
    headers = {"ETag": f'"{etag}"'} if etag else {}
    return web.Response(
        status=status,
        text=model.model_dump_json(by_alias=True),
        content_type="application/json",
        headers=headers,
    )
