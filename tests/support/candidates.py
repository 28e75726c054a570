"""Endpoints, candidates and requests for tests of picking."""

from typing import Any

from router.picking.contract import Candidate, RequestContext
from router.prefix.prompt import Prompt
from router.view.samples import Sample
from router.view.view import Endpoint, EndpointState


def endpoint(
    replica: str,
    state: EndpointState = EndpointState.READY,
    *,
    weight: int = 1,
    deployment: str = "d",
    incarnation: str = "i",
) -> Endpoint:
    return Endpoint("a", deployment, replica, "http://h", "d", "m", state, incarnation, weight, "n")


def sample(
    *, running: int | None = None, waiting: int | None = None, kv: float | None = None, **more: Any
) -> Sample:
    return Sample("i", 0.0, running, waiting, kv, more.pop("own_in_flight", 0), **more)


def candidate(
    replica: str,
    *,
    in_flight: int = 0,
    weight: int = 1,
    seen: Sample | None = None,
    cached: int = 0,
    pending: int = 0,
    alike: int = 0,
) -> Candidate:
    return Candidate(endpoint(replica, weight=weight), seen, in_flight, cached, pending, alike)


def request(
    *, tokens: int = 0, chain: tuple[int, ...] = (), session: str = "", adapter: str = ""
) -> RequestContext:
    prompt = Prompt(tokens=tokens, chain=chain)
    return RequestContext(
        "id", "/v1/completions", "a", "d", "d", False, b"{}", prompt, session=session, adapter=adapter
    )
