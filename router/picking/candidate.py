"""What plug-ins may know of an endpoint: part of the contract of picking, apart because it can be compiled.

In come the facts of one endpoint at the moment of a choice, out goes what filters, scorers and pickers read.
It is data only; whoever writes a plug-in finds it in `picking.contract`.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Final

from router.view.samples import Sample
from router.view.view import Endpoint


class CacheKnowledge(Enum):
    """Where `Candidate.cached_tokens` comes from."""

    APPROXIMATE = "approximate"
    EXACT = "exact"


APPROXIMATE: Final = CacheKnowledge.APPROXIMATE


# `__init__` is written out here and in everything else that each request makes: the one that `dataclass`
# generates stays interpreted where the module is compiled.
@dataclass(init=False, slots=True)
class Candidate:
    """An endpoint that may be used for this request; nobody changes it once it is made.

    Attributes:
        endpoint: Where it is.
        sample: Latest fresh sample of its engine; None is unknown.
        in_flight: Requests that this process has there now.
        cached_tokens: Leading tokens of this prompt that the engine has probably cached.
        pending_prefill_tokens: Uncached prompt tokens that this process has sent there and that have not
            brought a first byte yet.
        alike_in_flight: Those of `in_flight` whose prompts begin like this one (`prefix_key`).
        cache_knowledge: Whether `cached_tokens` is what this process has sent there, or what the engine
            itself says.
        cache_pressure: How fast its cache turns over, in caches for each request that any endpoint gets; 0
            where nothing was sent there. Only its ratio to others' means something.
    """

    endpoint: Endpoint
    sample: Sample | None
    in_flight: int
    cached_tokens: int
    pending_prefill_tokens: int
    alike_in_flight: int
    cache_knowledge: CacheKnowledge
    cache_pressure: float

    def __init__(
        self,
        endpoint: Endpoint,
        sample: Sample | None,
        in_flight: int,
        cached_tokens: int = 0,
        pending_prefill_tokens: int = 0,
        alike_in_flight: int = 0,
        cache_knowledge: CacheKnowledge = APPROXIMATE,
        cache_pressure: float = 0.0,
    ) -> None:
        self.endpoint = endpoint
        self.sample = sample
        self.in_flight = in_flight
        self.cached_tokens = cached_tokens
        self.pending_prefill_tokens = pending_prefill_tokens
        self.alike_in_flight = alike_in_flight
        self.cache_knowledge = cache_knowledge
        self.cache_pressure = cache_pressure
