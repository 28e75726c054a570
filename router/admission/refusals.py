"""Why a request was not let in, in words, with counts and when to come again.

In come what the gate said and the state of the lane, out comes the `Refusal`: 429 while engines are busy, 503
while there is none. Pure.
"""

from collections import Counter

from router.admission.gate import Gate, NotServed
from router.admission.lane import Lane
from router.admission.waiter import Word
from router.openai import errors
from router.openai.errors import Reason, Refusal
from router.view.view import Deployment


def states_of(deployment: Deployment) -> Counter[str]:
    """Returns how many endpoints a deployment has in each state."""
    return Counter(each.state.name for each in deployment.endpoints)


def refusal_of(
    refused: NotServed,
    *,
    model: str,
    deployment: Deployment,
    lane: Lane,
    gate: Gate,
    usable: int,
    now_seconds: float,
) -> Refusal:
    """Builds the refusal.

    Args:
        refused: What the gate said.
        model: As the client named it.
        deployment: Where the request was to go.
        lane: Of the deployment.
        gate: Which the request did not pass.
        usable: Endpoints that could be used if they had room.
        now_seconds: On the monotonic clock.
    """
    waiting, limit = len(lane.line), lane.line.size_max
    if refused.word is Word.GONE:
        return errors.no_endpoint(model, {})
    if not usable:
        retry_seconds = lane.start_retry_seconds(
            now_seconds,
            measured_seconds=deployment.start_seconds,
            default_seconds=gate.bounds.start_seconds,
        )
        if refused.word is Word.LATE:
            return errors.start_timeout(
                model,
                states_of(deployment),
                waited_seconds=refused.waited_seconds,
                retry_after_seconds=retry_seconds,
            )
        return errors.start_queue_full(model, waiting=waiting, limit=limit, retry_after_seconds=retry_seconds)
    why, bound = {
        "time": (Reason.QUEUE_TIMEOUT, f"this one has waited {refused.waited_seconds:.1f} s, its limit"),
        "bytes": (
            Reason.QUEUE_MEMORY_FULL,
            f"bodies take {gate.waiting_bytes} of {gate.bounds.bytes_max} bytes (option --queue-bytes-max)",
        ),
    }.get(refused.bound, (Reason.QUEUE_FULL, f"at most {limit} may (option --queue-requests-max)"))
    return errors.saturated(
        why,
        model,
        endpoints=usable,
        waiting=waiting,
        bound=bound,
        retry_after_seconds=lane.drain.retry_after_seconds(waiting),
    )
