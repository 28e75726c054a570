"""The table of open agent sessions: which node is behind which session, and when it was last heard.

In come session ids, out come sessions. It lives in memory only: a control plane that restarts knows no
session, its agents are told so and open new ones. It does no I/O.
"""

import asyncio
import secrets
from dataclasses import dataclass, field

from core.clock import Clock
from core.errors import FailedPrecondition


@dataclass(slots=True)
class Session:
    """One open session.

    Attributes:
        session_id: Identifier that the agent's calls carry.
        node: Node behind it.
        agent_incarnation: Run of the agent.
        heard_at: Monotonic seconds of its last call.
        assignments_changed: Set when the node's assignments may have changed.
        replaced: Set once a newer session of the node has been opened.
        opened_revision: Revision of the node's record that first named this session; 0 until it is written.
    """

    session_id: str
    node: str
    agent_incarnation: str
    heard_at: float
    assignments_changed: asyncio.Event = field(default_factory=asyncio.Event)
    replaced: asyncio.Event = field(default_factory=asyncio.Event)
    opened_revision: int = 0


class SessionTable:
    """Open sessions, at most one a node."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._by_id: dict[str, Session] = {}
        self._by_node: dict[str, Session] = {}

    def open(self, node: str, agent_incarnation: str) -> Session:
        """Opens a session and ends the node's earlier one."""
        session = Session(secrets.token_hex(16), node, agent_incarnation, self._clock.monotonic())
        earlier = self._by_node.get(node)
        if earlier is not None:
            self.close(earlier)
        self._by_id[session.session_id] = session
        self._by_node[node] = session
        return session

    def close(self, session: Session) -> None:
        """Ends a session; its calls are refused from now on."""
        session.replaced.set()
        session.assignments_changed.set()
        self._by_id.pop(session.session_id, None)
        if self._by_node.get(session.node) is session:
            del self._by_node[session.node]

    def hear(self, session_id: str) -> Session:
        """Returns a session and notes that its agent lives.

        Raises:
            FailedPrecondition: The session is unknown or was replaced.
        """
        session = self._by_id.get(session_id)
        if session is None:
            raise FailedPrecondition(
                "the session is unknown here or was replaced: open a new one",
                reason="ERROR_REASON_SESSION_INVALID",
                metadata={"session_id": session_id[:64]},
            )
        session.heard_at = self._clock.monotonic()
        return session

    def of_node(self, node: str) -> Session | None:
        """Returns the node's open session."""
        return self._by_node.get(node)

    def all(self) -> tuple[Session, ...]:
        """Returns every open session."""
        return tuple(self._by_id.values())
