"""Judges which nodes are silent and which are lost.

In come the node records and what was heard in this process; out come state changes for the writer. A
node is judged only by silence that this process has itself witnessed: after its own start, and after the
store has been away, every node gets the full grace period again. Nothing here kills or moves anything:
what a lost node means for its replicas is the scheduler's decision.
"""

from dataclasses import dataclass

from core.states import NodeState

# A node is called silent after so many heartbeats were missed in a row.
SILENT_HEARTBEATS = 3
# A view of the store older than this is not trusted: no silence is judged by it, and agents are sent to
# another control plane. Word comes every 5 s, and a dead watch is noticed after 10 s.
STORE_AGE_SECONDS_MAX = 15.0


@dataclass(frozen=True, slots=True)
class Witness:
    """What this process has seen of a node's record.

    Attributes:
        heartbeat_stamp: The record's heartbeat time, as an opaque value.
        seen_at: Monotonic seconds at which that value appeared here.
    """

    heartbeat_stamp: int
    seen_at: float


def judge(
    *,
    state: NodeState,
    heard_at: float | None,
    witness: Witness,
    trusted_since: float,
    now: float,
    silent_after_seconds: float,
    lost_after_seconds: float,
) -> NodeState:
    """Returns the state that a node deserves. All times are monotonic seconds.

    Args:
        state: State in its record.
        heard_at: When its session was last heard here; None without a session here.
        witness: When its record's heartbeat last moved, as seen here.
        trusted_since: Since when this process has had an uninterrupted view of the store.
        now: The present.
        silent_after_seconds: Silence after which it is called silent.
        lost_after_seconds: Silence after which it is called lost.
    """
    if heard_at is not None and now - heard_at < silent_after_seconds:
        return NodeState.READY
    if state is NodeState.LOST:
        return NodeState.LOST
    silence = now - max(heard_at or 0.0, witness.seen_at, trusted_since)
    if silence >= lost_after_seconds:
        return NodeState.LOST
    # Records are refreshed less often than heartbeats come, so only the process that holds the session
    # can tell a short silence.
    if heard_at is not None and silence >= silent_after_seconds:
        return NodeState.SILENT
    return state
