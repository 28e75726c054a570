"""Which endpoints may be used for a request at all, before any plug-in has a say.

In come the endpoints of a deployment, those already tried, and what is known of failures; out comes the
best class that is not empty. DRAINING and unknown states are never used. Pure.
"""

from collections.abc import Callable, Collection, Sequence

from router.view.view import Endpoint, EndpointState


def eligible(
    endpoints: Sequence[Endpoint],
    *,
    tried: Collection[tuple[str, str]],
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
    ready = [each for each in endpoints if each.state is EndpointState.READY]
    if len(ready) == len(endpoints) and not tried and not any(map(is_ejected, endpoints)):
        # The very sequence, so that what was worked out for it before is found again.
        return endpoints
    for usable in (ready, [each for each in endpoints if each.state is EndpointState.UNHEALTHY]):
        left = [each for each in usable if each.identity not in tried]
        if not left:
            continue
        kept = [each for each in left if not is_ejected(each)]
        return kept or [min(left, key=last_failure_seconds)]
    return ()
