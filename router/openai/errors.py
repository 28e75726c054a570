"""Every refusal of the router in OpenAI's shape, with a reason that a machine can read.

    Refusal(status, reason, message, ...) -> {"error": {"message", "type", "param", "code"}}
                                             x-millrace-reason: <reason>, Retry-After where it helps

In comes what went wrong, out comes a `Refusal` to raise and a body to send. Engine errors are not made
here: they pass through as they are. A message never holds a key, and never another tenant's names.
"""

from collections.abc import Mapping
from enum import StrEnum

import orjson

from core.errors import MillraceError

REASON_HEADER = "x-millrace-reason"

# Long enough not to be hammered, short enough that a replacement which is about to serve gets traffic.
RETRY_AFTER_SECONDS = 1


class Reason(StrEnum):
    """Why a request ended as it did: label of metrics, log field, header. A closed set."""

    OK = "ok"
    # The client's.
    API_KEY_MISSING = "api_key_missing"
    API_KEY_INVALID = "api_key_invalid"
    BODY_MALFORMED = "body_malformed"
    BODY_TOO_LARGE = "body_too_large"
    BODY_TIMEOUT = "body_timeout"
    BODY_ENCODED = "body_encoded"
    MODEL_MISSING = "model_missing"
    MODEL_NOT_FOUND = "model_not_found"
    MODEL_AMBIGUOUS = "model_ambiguous"
    ALIAS_WITHOUT_DEPLOYMENT = "alias_without_deployment"
    PARAMETER_INVALID = "parameter_invalid"
    ROUTE_UNKNOWN = "route_unknown"
    RESPONSE_NOT_FOUND = "response_not_found"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    REQUEST_INVALID = "request_invalid"
    DECISION_UNKNOWN = "decision_unknown"
    CLIENT_DISCONNECTED = "client_disconnected"
    CLIENT_STALLED = "client_stalled"
    # The platform's.
    VIEW_NOT_SYNCED = "view_not_synced"
    ROUTER_OVERLOADED = "router_overloaded"
    QUEUE_FULL = "queue_full"
    QUEUE_MEMORY_FULL = "queue_memory_full"
    QUEUE_TIMEOUT = "queue_timeout"
    NO_ENDPOINT_AVAILABLE = "no_endpoint_available"
    START_QUEUE_FULL = "start_queue_full"
    ALL_ENDPOINTS_FAILED = "all_endpoints_failed"
    RETRY_BUDGET_EXHAUSTED = "retry_budget_exhausted"
    INTERNAL_ERROR = "internal_error"
    # The engine's.
    ENGINE_CLIENT_ERROR = "engine_client_error"
    ENGINE_ERROR = "engine_error"
    FIRST_BYTE_TIMEOUT = "first_byte_timeout"
    CONNECT_TIMEOUT = "connect_timeout"
    IDLE_TIMEOUT = "idle_timeout"
    UPSTREAM_BROKEN = "upstream_broken"


class Refusal(MillraceError):
    """A request that the router itself answers with an error.

    Attributes:
        status: HTTP status.
        why: Reason.
        kind: OpenAI's `type`.
        code: OpenAI's `code`.
        param: The wrong parameter of the request, or None.
        headers: Further response headers.
    """

    def __init__(
        self,
        status: int,
        why: Reason,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.why = why
        self.kind = _kind_of(status)
        self.code = code or why.value
        self.param = param
        self.headers: dict[str, str] = dict(headers or {})

    def body(self) -> bytes:
        """Returns the JSON body."""
        return error_body(self.message, kind=self.kind, code=self.code, param=self.param)


def error_body(message: str, *, kind: str, code: str, param: str | None = None) -> bytes:
    """Builds a body of OpenAI's error shape."""
    return orjson.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}})


def _kind_of(status: int) -> str:
    # The names are OpenAI's; its clients branch on them.
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"


def api_key_missing() -> Refusal:
    """No usable `Authorization` header came."""
    return Refusal(
        401,
        Reason.API_KEY_MISSING,
        "You didn't provide an API key. Send it as `Authorization: Bearer sk-...`; a key is shown once, "
        "when a deployment is declared.",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def api_key_invalid() -> Refusal:
    """The key opens nothing."""
    return Refusal(
        401,
        Reason.API_KEY_INVALID,
        "Incorrect API key provided: it is not known here, or its deployment was deleted.",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def body_malformed(detail: str) -> Refusal:
    """The body is not a JSON object."""
    return Refusal(
        400,
        Reason.BODY_MALFORMED,
        f"We could not parse the body of your request: {detail}.",
        code="invalid_json",
    )


def body_too_large(limit_bytes: int) -> Refusal:
    """The body is longer than allowed. The rest of it is not read, so the connection must close."""
    return Refusal(
        413,
        Reason.BODY_TOO_LARGE,
        f"The body of your request is larger than the {limit_bytes} bytes that this router accepts "
        "(option --request-body-bytes-max).",
        code="request_too_large",
        headers={"Connection": "close"},
    )


def body_timeout(limit_seconds: float) -> Refusal:
    """The body did not arrive in time."""
    return Refusal(
        408,
        Reason.BODY_TIMEOUT,
        f"The body of your request did not arrive within {limit_seconds:g} s.",
        code="request_timeout",
        headers={"Connection": "close"},
    )


def body_encoded(encoding: str) -> Refusal:
    """The body is compressed, which no engine reads."""
    return Refusal(
        415,
        Reason.BODY_ENCODED,
        f"Content-Encoding `{encoding[:32]}` is not supported for requests: send the JSON uncompressed.",
        code="unsupported_content_encoding",
    )


def model_missing() -> Refusal:
    """The body names no model."""
    return Refusal(
        400,
        Reason.MODEL_MISSING,
        "You must provide a model parameter: the name of a deployment, as a non-empty string.",
        code="missing_required_parameter",
        param="model",
    )


def parameter_invalid(param: str, expected: str) -> Refusal:
    """A parameter that the router itself reads has the wrong type."""
    return Refusal(
        400,
        Reason.PARAMETER_INVALID,
        f"Invalid type for `{param}`: expected {expected}.",
        code="invalid_type",
        param=param,
    )


def model_not_found(model: str) -> Refusal:
    """The model is not one of this key's."""
    return Refusal(
        404,
        Reason.MODEL_NOT_FOUND,
        f"The model `{model[:200]}` does not exist or you do not have access to it; GET /v1/models lists "
        "what your key may use.",
        code="model_not_found",
        param="model",
    )


def model_ambiguous(model: str, names: tuple[str, ...]) -> Refusal:
    """The declared model id stands for several deployments of the key's own namespace."""
    shown = ", ".join(f"`{name}`" for name in names[:10]) + (", ..." if len(names) > 10 else "")
    return Refusal(
        404,
        Reason.MODEL_AMBIGUOUS,
        f"The model id `{model[:200]}` was declared by {len(names)} deployments; name one of them: {shown}.",
        code="model_not_found",
        param="model",
    )


def alias_without_deployment(alias: str, targets: tuple[str, ...]) -> Refusal:
    """The model is an alias, and nothing that it leads to exists."""
    return Refusal(
        404,
        Reason.ALIAS_WITHOUT_DEPLOYMENT,
        f"The model `{alias[:200]}` is an alias of {', '.join(f'`{each}`' for each in targets[:10])}, and "
        "there is no such deployment: declare it, or change the alias.",
        code="model_not_found",
        param="model",
    )


def decision_unknown(request_id: str) -> Refusal:
    """No worker of this router remembers a request with this id."""
    return Refusal(
        404,
        Reason.DECISION_UNKNOWN,
        f"No decision for the request id `{request_id[:200]}` is kept here: another router served it, it "
        "went to no engine, or later requests have displaced it.",
        code="not_found",
    )


def response_not_found(response_id: str) -> Refusal:
    """No engine of this key's namespace made such a response, or it is gone."""
    return Refusal(
        404,
        Reason.RESPONSE_NOT_FOUND,
        f"Response with id `{response_id[:100]}` was not found: no engine that serves now made it. "
        "Responses live in the engine that made them, as long as it runs, under the id that it gave them.",
        code="response_not_found",
        param="response_id",
    )


def route_unknown(method: str, path: str, supported: tuple[str, ...]) -> Refusal:
    """No such route."""
    return Refusal(
        404,
        Reason.ROUTE_UNKNOWN,
        f"Unknown request URL: {method} {path[:200]}. Supported: {'; '.join(supported)}.",
        code="unknown_url",
    )


def method_not_allowed(method: str, path: str, allowed: tuple[str, ...]) -> Refusal:
    """The route exists under another method."""
    return Refusal(
        405,
        Reason.METHOD_NOT_ALLOWED,
        f"Not allowed to {method} on {path[:200]}: use {' or '.join(allowed)}.",
        code="method_not_supported",
        headers={"Allow": ", ".join(allowed)},
    )


def unavailable(why: Reason, message: str, *, code: str | None = None) -> Refusal:
    """The platform cannot serve this now; the same request may be sent again."""
    return Refusal(503, why, message, code=code, headers={"Retry-After": str(RETRY_AFTER_SECONDS)})


def view_not_synced() -> Refusal:
    """The router has just started and does not know the cluster yet."""
    return unavailable(
        Reason.VIEW_NOT_SYNCED, "The router has just started and has not read the state of the cluster yet."
    )


def router_overloaded(limit: int) -> Refusal:
    """This worker has as many requests as it may hold."""
    return unavailable(
        Reason.ROUTER_OVERLOADED,
        f"This router worker holds {limit} requests, as many as it may (option --requests-in-flight-max).",
    )


def no_endpoint(model: str, states: Mapping[str, int]) -> Refusal:
    """The deployment exists and nothing of it can serve, nor will by itself."""
    return unavailable(
        Reason.NO_ENDPOINT_AVAILABLE,
        f"The model `{model[:200]}` has no endpoint that can serve now ({_counts(states)}).",
    )


def start_queue_full(model: str, *, waiting: int, limit: int, retry_after_seconds: int) -> Refusal:
    """Nothing of the deployment serves yet, and as many requests as may wait for it do."""
    return Refusal(
        503,
        Reason.START_QUEUE_FULL,
        f"The model `{model[:200]}` has no endpoint yet, and {waiting} of at most {limit} requests wait for "
        f"it; it is expected in about {retry_after_seconds} s.",
        code="no_endpoint_available",
        headers={"Retry-After": str(retry_after_seconds)},
    )


def start_timeout(
    model: str, states: Mapping[str, int], *, waited_seconds: float, retry_after_seconds: int
) -> Refusal:
    """Nothing of the deployment came up while the request waited."""
    return Refusal(
        503,
        Reason.NO_ENDPOINT_AVAILABLE,
        f"The model `{model[:200]}` got no endpoint within the {waited_seconds:.1f} s that this request "
        f"waited ({_counts(states)}); it is expected in about {retry_after_seconds} s.",
        code="no_endpoint_available",
        headers={"Retry-After": str(retry_after_seconds)},
    )


def saturated(
    why: Reason, model: str, *, endpoints: int, waiting: int, bound: str, retry_after_seconds: int
) -> Refusal:
    """Every endpoint is saturated, and the request cannot wait, or no longer.

    Args:
        why: Which bound of waiting was reached.
        model: As the client named it.
        endpoints: That could be used if they had room.
        waiting: Requests that wait for them in this worker.
        bound: The bound in words, with its value.
        retry_after_seconds: When there is probably room.
    """
    return Refusal(
        429,
        why,
        f"All {endpoints} endpoint(s) of the model `{model[:200]}` are saturated, and {waiting} request(s) "
        f"wait for them: {bound}. Try again in {retry_after_seconds} s.",
        headers={"Retry-After": str(retry_after_seconds)},
    )


def _counts(states: Mapping[str, int]) -> str:
    counts = ", ".join(f"{count} {state.lower()}" for state, count in sorted(states.items()))
    return counts or "none has started yet"


def all_endpoints_failed(model: str, attempts: int, cause: str) -> Refusal:
    """Every endpoint that could be tried failed before its first byte."""
    return unavailable(
        Reason.ALL_ENDPOINTS_FAILED,
        f"The model `{model[:200]}` could not be reached: {attempts} attempt(s) failed, the last one by "
        f"{cause}; no other endpoint appeared in time.",
        code="no_endpoint_available",
    )


def retry_budget_exhausted(model: str, cause: str) -> Refusal:
    """The endpoint failed and too many requests are being retried already."""
    return unavailable(
        Reason.RETRY_BUDGET_EXHAUSTED,
        f"An endpoint of the model `{model[:200]}` failed by {cause}, and the retry budget of this router "
        "is used up.",
        code="no_endpoint_available",
    )


def first_byte_timeout(limit_seconds: float) -> Refusal:
    """The engine accepted the request and stayed silent."""
    return Refusal(
        504,
        Reason.FIRST_BYTE_TIMEOUT,
        f"The engine did not begin to answer within {limit_seconds:g} s.",
        code="upstream_timeout",
    )


def connect_timeout(limit_seconds: float) -> Refusal:
    """No endpoint accepted a connection."""
    return Refusal(
        504,
        Reason.CONNECT_TIMEOUT,
        f"No engine accepted a connection within {limit_seconds:g} s.",
        code="upstream_timeout",
        headers={"Retry-After": str(RETRY_AFTER_SECONDS)},
    )


def internal_error() -> Refusal:
    """A fault of the router; the log has the details under the request id."""
    return Refusal(
        500,
        Reason.INTERNAL_ERROR,
        "The router failed while handling the request; the request id is in the headers.",
    )
