"""Why an endpoint was chosen, in one token: `x-millrace-reason` of every answer that an engine gave.

    retry            another endpoint failed this request before
    fallback         its own deployment could not serve it
    only-endpoint    there was no other with room
    prefix           it has some of the prompt cached, and the strategy reads prompts
    <strategy>       what the strategy goes by otherwise: `least-cost` for the default, else its own name

The first row that applies wins. Pure.
"""

import re

from router.picking.contract import Candidate, Strategy
from router.picking.registry import ALIASES, BUNDLES

RETRY = "retry"
FALLBACK = "fallback"
ONLY_ENDPOINT = "only-endpoint"
PREFIX = "prefix"
# A sum of several scores has no better name.
SCORES = "scores"

_NAME = re.compile(r"[a-z0-9-]{1,64}")


def why_of(
    candidate: Candidate, *, attempts: int, diverted: bool, candidates: int, strategy: Strategy
) -> str:
    """Returns the token.

    Args:
        candidate: Who was chosen.
        attempts: Endpoints that have failed the request.
        diverted: True where a fall-back serves it.
        candidates: Among how many was chosen.
        strategy: By which.
    """
    if attempts:
        return RETRY
    if diverted:
        return FALLBACK
    if candidates == 1:
        return ONLY_ENDPOINT
    if candidate.cached_tokens:
        return PREFIX
    return _names.get(strategy.name) or _name_of(strategy.name)


def _name_of(strategy: str) -> str:
    return ALIASES.get(strategy, strategy) if _NAME.fullmatch(strategy) else SCORES


_names = {bundle: plugins.rsplit(",", 1)[-1] for bundle, plugins in BUNDLES.items()}
