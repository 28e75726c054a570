"""LoRA affinity: the engine that has the request's adapter loaded.

Formula, for each candidate:

    1.0   the adapter is loaded
    0.8   it is not, and there is room for one more
    0.6   requests in the engine's queue wait for it
    0.0   no room: something would be thrown out

Loaded means in the running batch, and room is for one more in it: that is what vLLM tells. Without an adapter
in the request, and for engines that do not tell theirs, all are 0.8: neither the best nor the worst.
"""

from collections.abc import Sequence

from router.picking.contract import Candidate, RequestContext

_LOADED, _ROOM, _WAITING, _NONE = 1.0, 0.8, 0.6, 0.0
_NEUTRAL = _ROOM


class LoraAffinity:
    """Scorer that prefers loaded adapters."""

    affine = True

    def score(self, request: RequestContext, candidates: Sequence[Candidate]) -> Sequence[float]:
        """Returns 1.0, 0.8, 0.6 or 0 for each candidate."""
        if not request.adapter:
            return [_NEUTRAL] * len(candidates)
        return [_score(request.adapter, each) for each in candidates]


def _score(adapter: str, candidate: Candidate) -> float:
    sample = candidate.sample
    if sample is None or sample.adapters is None:
        return _NEUTRAL
    if adapter in sample.adapters:
        return _LOADED
    if sample.adapters_max is None or len(sample.adapters) < sample.adapters_max:
        return _ROOM
    if sample.adapters_waiting is not None and adapter in sample.adapters_waiting:
        return _WAITING
    return _NONE
