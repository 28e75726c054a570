"""Errors that a client gets, in vLLM's shape.

In: a status, a message, the parameter at fault. Out: the JSON of an answer or a stream event.
Must not: be raised by the engine model; only the HTTP front knows statuses.
"""

import http
from typing import Any


class RequestError(Exception):
    """A request that is refused.

    Attributes:
        status: HTTP status, repeated as `code` in the body.
        kind: vLLM's `type`, such as `NotFoundError` or `Bad Request`.
        parameter: The field at fault, None if there is no single one.
    """

    def __init__(self, status: int, message: str, *, kind: str, parameter: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.parameter = parameter

    def body(self) -> dict[str, Any]:
        """The answer's JSON."""
        return {
            "error": {
                "message": str(self),
                "type": self.kind,
                "param": self.parameter,
                "code": self.status,
            }
        }


def model_not_found(model: str) -> RequestError:
    """The 404 for a model that is not served."""
    return RequestError(404, f"The model `{model}` does not exist.", kind="NotFoundError", parameter="model")


def bad_request(message: str, parameter: str | None = None) -> RequestError:
    """The 400 for a value that the engine refuses (`BadRequestError`)."""
    return RequestError(400, message, kind="BadRequestError", parameter=parameter)


def validation_error(message: str, parameter: str | None = None) -> RequestError:
    """The 400 for a body that does not have the right shape (`Bad Request`)."""
    return RequestError(400, message, kind=http.HTTPStatus.BAD_REQUEST.phrase, parameter=parameter)


def context_overflow(max_model_length_tokens: int, prompt_tokens: int) -> RequestError:
    """The 400 for a prompt that leaves no room for output."""
    return bad_request(
        f"This model's maximum context length is {max_model_length_tokens} tokens. However, "
        f"your prompt contains {prompt_tokens} input tokens. Please reduce the length of the "
        "input prompt.",
        "input_tokens",
    )


def too_many_characters(max_model_length_tokens: int, characters: int, max_characters: int) -> RequestError:
    """The 400 for a text that cannot fit, found before it is cut into tokens."""
    return bad_request(
        f"You passed {characters} input characters. However, the model's context length is only "
        f"{max_model_length_tokens} tokens (at most {max_characters} characters). Please reduce "
        "the length of the input prompt.",
        "input_text",
    )


def engine_dead(message: str) -> RequestError:
    """The 500 of a dead engine, also the event in a broken stream."""
    return RequestError(500, message, kind="InternalServerError")


def shutting_down() -> RequestError:
    """The 500 that vLLM gives to requests which arrive while it drains."""
    return RequestError(500, "cannot schedule new futures after shutdown", kind="InternalServerError")


def queue_full(reason: str) -> RequestError:
    """The 503 of an engine whose queue limits are reached."""
    what = (
        "is currently busy and cannot accept new requests."
        if reason == "max_num_queued_reqs"
        else "has reached its prefill token backlog limit."
    )
    message = f"The engine {what} Please try again later or on a different instance."
    return RequestError(503, message, kind="Service Unavailable")
