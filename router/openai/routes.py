"""Which routes go to engines, and what is particular about each: a table, and nothing else.

In comes a route's template, out comes how its bodies are read, whether its answers tell usage, and in whose
shape its clients expect errors. A route that is not here is answered with 404 and a list of what is.
"""

from dataclasses import dataclass
from enum import Enum


class Shape(Enum):
    """Whose clients use a route, and so how errors look on it."""

    OPENAI = "openai"
    RESPONSES = "responses"
    ANTHROPIC = "anthropic"


@dataclass(frozen=True, slots=True)
class Route:
    """A route that goes to engines.

    Attributes:
        path: As clients and engines call it.
        shape: Of its errors.
        metered: Its answers tell how many tokens they cost.
        multipart: Its bodies may be forms with files.
    """

    path: str
    shape: Shape = Shape.OPENAI
    metered: bool = True
    multipart: bool = False


CHAT = Route("/v1/chat/completions")
RESPONSES = Route("/v1/responses", shape=Shape.RESPONSES)
_ALL = (
    CHAT,
    Route("/v1/completions"),
    Route("/v1/embeddings"),
    RESPONSES,
    Route("/v1/messages", shape=Shape.ANTHROPIC),
    Route("/v1/messages/count_tokens", shape=Shape.ANTHROPIC, metered=False),
    *map(Route, ("/rerank", "/v1/rerank", "/v2/rerank", "/score", "/v1/score")),
    *(Route(path, metered=False) for path in ("/tokenize", "/detokenize")),
    *(Route(f"/v1/audio/{name}", multipart=True) for name in ("transcriptions", "translations")),
    Route("/v1/audio/speech"),
    Route("/v1/images/generations"),
    *(Route(f"/v1/images/{name}", multipart=True) for name in ("edits", "variations")),
)
INFERENCE_ROUTES = {route.path: route for route in _ALL}

# These two find the engine that made the response by its id.
RESPONSE_ROUTE = "/v1/responses/{response_id}"
RESPONSE_CANCEL_ROUTE = "/v1/responses/{response_id}/cancel"


def shape_of(path: str) -> Shape:
    """Returns the shape of errors on a route, OpenAI's where it is none of these."""
    if path in (RESPONSE_ROUTE, RESPONSE_CANCEL_ROUTE):
        return Shape.RESPONSES
    route = INFERENCE_ROUTES.get(path)
    return Shape.OPENAI if route is None else route.shape
