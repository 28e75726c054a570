"""Which endpoints may be used for a request at all, before any plug-in has a say.

In come the endpoints of a deployment, those already tried, and what is known of failures; out comes the
best class that is not empty. DRAINING and unknown states are never used. Pure.
"""

from collections.abc import Callable, Container, Sequence

from router.view.view import Endpoint, EndpointState


def eligible(
    endpoints: Sequence[Endpoint],
    *,
    tried: Container[tuple[str, str]],
    is_ejected: Callable[[Endpoint], bool],
    last_failure_seconds: Callable[[Endpoint], float],
) -> Sequence[Endpoint]:
    """Returns the endpoints among which plug-ins choose.

    In order of preference: ready ones; the ready one that failed least recently, where all are ejected
    (ejection alone refuses nothing); then the same for unhealthy ones.

    Args:
        endpoints: Of one deployment.
        tried: Identities that this request has tried already.
        is_ejected: Tells whether an endpoint is left alone for now.
        last_failure_seconds: When an endpoint failed last, on any clock.
    """
    for state in (EndpointState.READY, EndpointState.UNHEALTHY):
        usable = [each for each in endpoints if each.state is state and each.identity not in tried]
        if not usable:
            continue
        kept = [each for each in usable if not is_ejected(each)]
        return kept or [min(usable, key=last_failure_seconds)]
    return ()
