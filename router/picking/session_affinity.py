"""Session affinity: one session, one engine, without a table and without cookies.

Formula: score = rank(session, replica), 0 to 1, by rendezvous hashing; 0 for all without a session. The
session is the `x-session-id` header, else the body's `user`. Every router and worker ranks alike; when an
endpoint comes or goes only the sessions that it wins or held move.
"""

from collections.abc import Sequence

from router.picking.contract import Candidate, RequestContext
from router.prefix.rendezvous import rank, text_key


class SessionAffinity:
    """Scorer that keeps sessions together."""

    affine = True

    def score(self, request: RequestContext, candidates: Sequence[Candidate]) -> Sequence[float]:
        """Returns the rendezvous rank of each candidate for the request's session."""
        if not request.session:
            return [0.0] * len(candidates)
        # Tenants choose their session ids by themselves.
        key = text_key(f"{request.namespace}\0{request.session}")
        return [rank(key, each.endpoint.replica) for each in candidates]
