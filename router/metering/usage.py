"""What a request used, and who is told.

In come the counts that a meter has read from an engine's answer and the facts of the request; out goes one
`Usage` a request to a `UsageSink`. Nothing here guesses: a number that no engine told is None, and a number
that was counted by other means than the engine's own is marked as not exact (law 1).
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, Protocol

# Numbers beyond this are no counts of tokens, whatever field they stand in.
_TOKENS_MAX: Final = 2**48


# The constructor that `dataclass` would write stays interpreted where all else is compiled, and `frozen` goes
# through `object.__setattr__`: every request makes one. `Final` keeps it from being changed.
@dataclass(init=False, slots=True)
class TokenCounts:
    """Tokens of one answer; nobody changes them once they are made.

    Attributes:
        prompt: Tokens of the prompt, cached ones included; None where the engine did not tell.
        completion: Tokens produced; None where they are not known.
        cached: Tokens of the prompt that came from the engine's prefix cache; None where it did not tell.
        exact: The numbers are the engine's own, up to the last byte that it sent. False where they were
            counted by pieces of the answer, or are missing although something was produced.
    """

    prompt: Final[int | None]
    completion: Final[int | None]
    cached: Final[int | None]
    exact: Final[bool]

    def __init__(
        self,
        prompt: int | None = None,
        completion: int | None = None,
        cached: int | None = None,
        exact: bool = False,
    ) -> None:
        self.prompt = prompt
        self.completion = completion
        self.cached = cached
        self.exact = exact


UNKNOWN: Final = TokenCounts()


class UsageOutcome(StrEnum):
    """How a metered request ended. A closed set: label of metrics."""

    COMPLETE = "complete"
    CLIENT_GONE = "client_gone"
    FAILED = "failed"


# A member is looked up in its class, a name of a module is at hand.
COMPLETE: Final = UsageOutcome.COMPLETE
FAILED: Final = UsageOutcome.FAILED


# As with the counts: a constructor that is compiled with the rest.
@dataclass(init=False, slots=True)
class Usage:
    """What one request used; nobody changes it once it is made.

    Attributes:
        request_id: Of the request; a usage is applied once for each.
        namespace: Tenant.
        key_hash_prefix: Beginning of the key's hash, enough to tell keys of a tenant apart.
        deployment: That served it.
        model: As the client named it.
        route: Template of the route.
        tier: Of the key.
        counts: Tokens.
        outcome: How it ended: complete, left by the client part-way, or failed.
        latency_ms: From the request's headers to its end.
    """

    request_id: str
    namespace: str
    key_hash_prefix: str
    deployment: str
    model: str
    route: str
    tier: str
    counts: TokenCounts
    outcome: UsageOutcome
    latency_ms: float

    def __init__(
        self,
        request_id: str,
        namespace: str,
        key_hash_prefix: str,
        deployment: str,
        model: str,
        route: str,
        tier: str,
        counts: TokenCounts,
        outcome: UsageOutcome,
        latency_ms: float,
    ) -> None:
        self.request_id = request_id
        self.namespace = namespace
        self.key_hash_prefix = key_hash_prefix
        self.deployment = deployment
        self.model = model
        self.route = route
        self.tier = tier
        self.counts = counts
        self.outcome = outcome
        self.latency_ms = latency_ms


class UsageSink(Protocol):
    """Takes usage onward."""

    def take(self, usage: Usage) -> None:
        """Takes the usage of one request; called exactly once for each that was sent to an engine."""
        ...


def counts_of(usage: object) -> TokenCounts | None:
    """Reads a usage object in any of the shapes that engines write.

    Chat, completions, embeddings, score and rerank have `prompt_tokens`, `completion_tokens` and
    `prompt_tokens_details.cached_tokens`; responses and Anthropic's messages have `input_tokens` and
    `output_tokens`. Anthropic counts cached tokens beside `input_tokens`
    (`cache_read_input_tokens`, `cache_creation_input_tokens`), all others within the prompt.

    Args:
        usage: The parsed JSON.

    Returns:
        The counts, or None where this is no usage object.
    """
    # What parsing makes of an object is a dict, and nothing else.
    if not isinstance(usage, dict):
        return None
    prompt = _tokens(usage, "prompt_tokens")
    if prompt is not None:
        completion = _tokens(usage, "completion_tokens")
        if completion is None and "completion_tokens" not in usage:
            # Embeddings, score and rerank produce none.
            completion = 0
        return TokenCounts(prompt, completion, _cached(usage, "prompt_tokens_details"), exact=True)
    prompt = _tokens(usage, "input_tokens")
    completion = _tokens(usage, "output_tokens")
    if prompt is None and completion is None:
        return None
    cached = _cached(usage, "input_tokens_details")
    if "cache_read_input_tokens" in usage or "cache_creation_input_tokens" in usage:
        cached = _tokens(usage, "cache_read_input_tokens")
        if prompt is not None:
            prompt += (cached or 0) + (_tokens(usage, "cache_creation_input_tokens") or 0)
    return TokenCounts(prompt, completion, cached, exact=True)


def _tokens(usage: dict[str, Any], name: str) -> int | None:
    value = usage.get(name)
    # `isinstance` would take a truth value for a number.
    if type(value) is int and 0 <= value < _TOKENS_MAX:
        return value
    return None


def _cached(usage: dict[str, Any], name: str) -> int | None:
    details = usage.get(name)
    return _tokens(details, "cached_tokens") if isinstance(details, dict) else None
