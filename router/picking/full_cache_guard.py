"""Full-cache guard: leaves out engines whose KV cache is nearly full, as long as others have room.

Formula: a candidate stays when k < 0.98 or k is unknown; when none would stay, all do. At a full cache an
engine preempts: it throws computed tokens away and computes them again.
"""

from collections.abc import Sequence

from router.picking.contract import Candidate, RequestContext

KV_USAGE_MAX = 0.98


class FullCacheGuard:
    """Filter that never empties the list."""

    def keep(self, request: RequestContext, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        """Returns the candidates with room, or all of them."""
        del request
        return [each for each in candidates if _has_room(each)] or candidates


def _has_room(candidate: Candidate) -> bool:
    usage = None if candidate.sample is None else candidate.sample.kv_usage_ratio
    return usage is None or usage < KV_USAGE_MAX
