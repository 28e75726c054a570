"""The loop: lead, look, plan, commit, wait until the own writes are visible, look again.

In come changes of the store, which only say that something changed: every round reads everything anew
and no decision depends on what woke it. Out go guarded transactions and events. It decides nothing
itself, that is the scheduler's part, and it never writes without the leader's key among the conditions.
"""

import asyncio
import base64
import secrets
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Protocol

import structlog
from prometheus_client import Counter, Gauge, Histogram

from controlplane.events import SYSTEM_NAMESPACE, EventSink
from controlplane.knowledge.environments import Environments
from controlplane.reconciler.autoscaler import Autoscaler
from controlplane.reconciler.snapshot import follow
from controlplane.reconciler.translate import Transaction, translate
from controlplane.reconciler.view import ClusterView
from controlplane.scheduler import Plan, Planner, Policy
from core.backoff import Backoff, BackoffPolicy
from core.clock import Clock
from core.store import Compare, Store, StoreError
from core.store.waiting import is_set_within
from core.tasks import cancel_and_wait

_log = structlog.get_logger(__name__)

SOURCE = "reconciler"

# A round without any change costs little, and covers whatever a missed wake-up could hide.
RESYNC_SECONDS = 30.0
# A first listing of a healthy store takes milliseconds; after this the lead is better held by another.
SYNC_SECONDS = 15.0
# Own writes come back within milliseconds; a watch that is slower has lost its connection.
ECHO_SECONDS = 5.0
# Handing over the lead is a courtesy: the lease ends by itself.
RESIGN_SECONDS = 2.0
# A conflict is over once its cause is visible, which takes milliseconds.
_CONFLICT = BackoffPolicy(initial_seconds=0.005, maximum_seconds=1.0)
_AWAY = BackoffPolicy(initial_seconds=0.1, maximum_seconds=5.0)

_loop_seconds = Histogram(
    "millrace_reconciler_loop_seconds",
    "Time from a snapshot to the commit of its plan",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
_actions = Counter("millrace_reconciler_plans_total", "Planned actions that were committed", ["bucket"])
_conflicts = Counter(
    "millrace_reconciler_conflicts_total", "Transactions refused because a record had changed"
)
_rounds_failed = Counter(
    "millrace_reconciler_rounds_failed_total", "Rounds that ended in an error", ["cause"]
)
_is_leader = Gauge("millrace_reconciler_is_leader", "1 while this process leads")
_pending = Gauge("millrace_reconciler_pending_replicas", "Replicas that are wanted and not placed")


_BUCKETS = {
    "Scheduled": "place",
    "Draining": "drain",
    "Preempted": "drain",
    "Removed": "remove",
    "ReplicaFailed": "remove",
    "ReplicaLost": "remove",
}


class Leader(Protocol):
    """What the loop needs of `core.store.election.Leadership`."""

    lost: asyncio.Event

    async def acquire(self) -> int:
        """Waits until we lead; returns the fencing token."""
        ...

    async def resign(self) -> None:
        """Gives the lead back."""
        ...

    def compare(self) -> Compare:
        """The condition that holds only while we lead."""
        ...


@dataclass(frozen=True, slots=True)
class ReconcilerSettings:
    """Bounds of the loop.

    Attributes:
        drain_seconds: How long a draining replica may finish its requests.
        policy: Everything else that the scheduler keeps to.
    """

    drain_seconds: float = 30.0
    policy: Policy = Policy()  # noqa: RUF009 - frozen, so sharing one is safe

    def effective_policy(self) -> Policy:
        """The policy with the drain time in it."""
        return replace(self.policy, drain=timedelta(seconds=self.drain_seconds))


def new_replica_id(deployment: str) -> str:
    """Makes an identifier from `namespace/name`: 50 random bits behind the name."""
    name = deployment.rpartition("/")[2]
    return f"{name}-{base64.b32encode(secrets.token_bytes(7)).decode().lower()[:10]}"


class Reconciler:
    """Leads the cluster towards what users want.

    Attributes:
        rounds: Completed rounds, for those who watch it work.
        leading: True while it decides.
    """

    def __init__(
        self,
        store: Store,
        clock: Clock,
        leadership: Leader,
        events: EventSink,
        *,
        drain_seconds: float = 30.0,
        settings: ReconcilerSettings | None = None,
        environments: Environments | None = None,
    ) -> None:
        settings = settings or ReconcilerSettings(drain_seconds=drain_seconds)
        self.rounds = 0
        self.leading = False
        self._store = store
        self._clock = clock
        self._leadership = leadership
        self._events = events
        self._environments = environments or Environments()
        self._policy = settings.effective_policy()
        self._frozen = ""
        self._wake = asyncio.Event()
        self._planner = Planner(self._policy)
        self._unsettled: set[str] = set()

    async def run(self) -> None:
        """Campaigns and leads, for ever; gives the lead back when it is cancelled.

        A write whose outcome is not known ends the lead: with a new token it can no longer take effect
        late, and new mirrors show whether it did.
        """
        away = Backoff(_AWAY)
        try:
            while True:
                fencing_token = await self._leadership.acquire()
                try:
                    await self._lead(fencing_token)
                    away.succeeded()
                except StoreError as error:
                    _rounds_failed.labels(cause="store").inc()
                    _log.warning("lead interrupted, the store is away", error=str(error))
                    await self._resign()
                    await self._clock.sleep(away.failed())
                finally:
                    self.leading = False
                    _is_leader.set(0)
        finally:
            await self._resign()

    async def _resign(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(RESIGN_SECONDS):
                await self._leadership.resign()

    async def _lead(self, fencing_token: int) -> None:
        """Decides until the lead is lost.

        The mirrors are made after the election: what the leader before us wrote last is in their first
        listing, so that no claim is overlooked.
        """
        self._wake = asyncio.Event()
        cluster = ClusterView(self._store, self._clock)
        self._planner, self._unsettled = Planner(self._policy), set()
        cluster.subscribe(self._wake.set)
        mirrors = asyncio.create_task(cluster.run(), name="reconciler-mirrors")
        sentinel = asyncio.create_task(self._wake_when_lost(), name="reconciler-lead-lost")
        helpers = [mirrors]
        try:
            await cluster.wait_synced(SYNC_SECONDS)
            self.leading = True
            _is_leader.set(1)
            _log.info("reconciler leads", fencing_token=fencing_token)
            autoscaler = Autoscaler(self._store, self._clock, self._leadership, self._events, cluster)
            helpers.append(asyncio.create_task(autoscaler.run(), name="reconciler-autoscaler"))
            helpers[-1].add_done_callback(lambda _task: self._wake.set())
            await self._rounds(cluster, helpers, fencing_token)
        finally:
            await cancel_and_wait(*helpers, sentinel)

    async def _wake_when_lost(self) -> None:
        await self._leadership.lost.wait()
        self._wake.set()

    async def _rounds(
        self, cluster: ClusterView, helpers: "list[asyncio.Task[None]]", fencing_token: int
    ) -> None:
        conflict, broken = Backoff(_CONFLICT), Backoff(_AWAY)
        while not self._leadership.lost.is_set():
            for helper in helpers:
                if helper.done():
                    await helper
            self._wake.clear()
            try:
                due_seconds = await self._round(cluster, fencing_token)
                broken.succeeded()
            except StoreError:
                raise
            except Exception:  # noqa: BLE001 - one odd record must not take the whole control plane down
                _rounds_failed.labels(cause="bug").inc()
                _log.exception("round failed")
                # Half of the changes may have been taken in: everything is read again.
                self._planner = Planner(self._policy)
                cluster.forget_changes()
                await self._clock.sleep(broken.failed())
                continue
            finally:
                self.rounds += 1
            if due_seconds is None:
                due_seconds = conflict.failed()
            else:
                conflict.succeeded()
            await is_set_within(self._clock, min(RESYNC_SECONDS, due_seconds), self._wake)
        _log.warning("reconciler no longer leads")

    async def _round(self, cluster: ClusterView, fencing_token: int) -> float | None:
        """One look at everything.

        Returns:
            Seconds after which time alone calls for the next look; None after a conflict.
        """
        started = self._clock.monotonic()
        now = self._clock.now()
        changed = cluster.take_changes()
        view = cluster.take()
        planner = self._planner
        touched = follow(planner.books, view, changed) | self._unsettled
        planner.look_again(self._unsettled)
        made = planner.plan(now, new_replica_id)
        self._tell_frozen(made.frozen)
        _pending.set(sum(each.pending for each in planner.conclusions.values()))
        transactions = translate(
            made,
            view,
            now=now,
            fencing_token=fencing_token,
            touched=touched,
            environments=self._environments,
        )
        # Whatever is not committed below has to be looked at again.
        self._unsettled = {each.deployment for each in transactions}
        settled = await self._commit(cluster, transactions)
        if transactions:
            _loop_seconds.observe(self._clock.monotonic() - started)
            _log_plan(made, settled=settled)
        if not settled:
            return None
        if made.retry_after is None:
            return RESYNC_SECONDS
        return max(0.0, (made.retry_after - self._clock.now()).total_seconds())

    async def _commit(self, cluster: ClusterView, transactions: list[Transaction]) -> bool:
        """Commits each transaction, then waits until all of it is visible; False after a conflict."""
        settled, written, refused = True, dict[str, int](), set[str]()
        for transaction in transactions:
            if self._leadership.lost.is_set():
                return False
            if transaction.rests_on & refused:
                # It replaces replicas that, as the records now say, are to stay.
                settled = False
                refused.add(transaction.deployment)
                continue
            outcome = await self._store.commit(
                transaction.operations,
                compares=[*transaction.compares, self._leadership.compare()],
            )
            if not outcome.succeeded:
                _conflicts.inc()
                settled = False
                refused.add(transaction.deployment)
                continue
            written.update({operation.key: outcome.revision for operation in transaction.operations})
            self._announce(transaction)
        self._unsettled = refused
        if written:
            await cluster.wait_for(written, ECHO_SECONDS)
        return settled

    def _announce(self, transaction: Transaction) -> None:
        for notice in transaction.notices:
            bucket = _BUCKETS.get(notice.reason)
            if bucket is not None:
                _actions.labels(bucket=bucket).inc()
            self._events.emit(
                namespace=notice.namespace,
                deployment=notice.deployment,
                replica=notice.replica,
                node=notice.node,
                reason=notice.reason,
                message=notice.message,
                source=SOURCE,
                warning=notice.warning,
            )

    def _tell_frozen(self, frozen: str) -> None:
        """Says once that rescheduling is frozen, and once that it goes on."""
        if bool(frozen) == bool(self._frozen):
            self._frozen = frozen
            return
        self._frozen = frozen
        reason = "ReschedulingFrozen" if frozen else "ReschedulingResumed"
        self._events.emit(
            namespace=SYSTEM_NAMESPACE,
            reason=reason,
            message=frozen or "enough nodes answer again; replicas of lost nodes are replaced",
            source=SOURCE,
            warning=bool(frozen),
        )


def _log_plan(made: Plan, *, settled: bool) -> None:
    if not made.empty:
        _log.info(
            "plan committed" if settled else "plan committed in part",
            place=len(made.place),
            drain=len(made.drain),
            remove=len(made.remove),
        )
