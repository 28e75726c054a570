"""Waiting for deployments, with the wait shown.

In comes a client and the generations that are waited for, out come the last states: ready, or failed with
the reason. On a terminal a live table is shown on stderr, anywhere else one line for each change; stdout
is left to results. Every wait has a limit, and its end says what was still missing.
"""

import asyncio
import sys
from collections.abc import AsyncGenerator, Collection, Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, Self

from millrace.core.v1 import types_pb2
from millrace.core.v1.deployment_pb2 import Deployment

from millrace_client import errors
from millrace_client.cli.render import enum_name, printable, styled, table
from millrace_client.following import ChangeKind, DeploymentChange

if TYPE_CHECKING:
    from millrace_client.client import MillraceClient

# A large model takes minutes to load; a wait that is meant to be longer says so.
WAIT_SECONDS = 600.0
LOG_TAIL_LINES = 15
# Quick enough for a person, slow enough for a server.
POLL_SECONDS = 0.5

Key = tuple[str, str]


class ProgressView(Protocol):
    """Where progress goes."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *details: object) -> None: ...
    def update(self, states: Mapping[Key, Deployment | None]) -> None:
        """Shows the states; None where nothing is known yet."""


class LineView:
    """One line on stderr for each change: for logs and pipes."""

    def __init__(self) -> None:
        self._last: dict[Key, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        return

    def update(self, states: Mapping[Key, Deployment | None]) -> None:
        """Writes what is new."""
        for key, deployment in states.items():
            if deployment is None:
                continue
            line = "  ".join(each for each in _columns(key, deployment) if each)
            if self._last.get(key) != line:
                self._last[key] = line
                print(line, file=sys.stderr, flush=True)


class LiveView:
    """A table on the terminal that is drawn again with every change."""

    def __init__(self, *, color: bool) -> None:
        from rich.console import Console
        from rich.live import Live

        console = Console(stderr=True, no_color=True if not color else None, highlight=False, markup=False)
        self._live = Live(console=console, refresh_per_second=8, transient=False)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._live.stop()

    def update(self, states: Mapping[Key, Deployment | None]) -> None:
        """Draws the states."""
        rows = [
            _columns(key, deployment) if deployment is not None else (_label(key), "", "", "")
            for key, deployment in states.items()
        ]
        self._live.update(table(("NAME", "PHASE", "READY", "MESSAGE"), rows))


def progress_view(*, color: bool) -> ProgressView:
    """Chooses the view that stderr can show."""
    return LiveView(color=color) if sys.stderr.isatty() else LineView()


@dataclass(slots=True)
class WaitResult:
    """How a wait ended.

    Attributes:
        states: Last known state of each deployment.
        failures: Why a deployment did not become ready; empty when all did.
    """

    states: dict[Key, Deployment | None]
    failures: dict[Key, str] = field(default_factory=dict)

    def raise_failure(self) -> None:
        """Raises the first failure.

        Raises:
            FailedPrecondition: A deployment did not become ready.
        """
        for key, why in self.failures.items():
            raise errors.FailedPrecondition(f"{_label(key)} did not become ready: {why}")


async def wait_ready(
    client: "MillraceClient", generations: Mapping[Key, int], view: ProgressView, *, timeout_seconds: float
) -> WaitResult:
    """Waits until each deployment serves what was asked for, or has failed.

    Args:
        client: Where to watch.
        generations: The generation that each deployment has to reach.
        view: Where progress goes.
        timeout_seconds: Limit of the whole wait; what is not ready by then counts as failed.
    """
    result = WaitResult(dict.fromkeys(generations))
    open_keys = set(generations)

    async def follow(namespace: str, name: str) -> None:
        async with aclosing(client.watch(namespace, name, patience_seconds=timeout_seconds)) as changes:
            await consume(changes, namespace)

    async def consume(changes: AsyncGenerator[DeploymentChange, None], namespace: str) -> None:
        async for change in changes:
            if change.deployment is None:
                # The snapshot is complete: what it did not hold does not exist.
                for key in [
                    each for each in open_keys if each[0] == namespace and result.states[each] is None
                ]:
                    result.failures[key] = "it does not exist any more"
                    open_keys.discard(key)
            else:
                key = (change.deployment.namespace, change.deployment.name)
                if key not in open_keys:
                    continue
                _take(result, open_keys, key, change.kind, change.deployment, generations[key])
            view.update(result.states)
            if not any(each[0] == namespace for each in open_keys):
                return

    view.update(result.states)
    try:
        async with asyncio.timeout(timeout_seconds), asyncio.TaskGroup() as group:
            for namespace in {each[0] for each in generations}:
                names = [each[1] for each in generations if each[0] == namespace]
                group.create_task(
                    follow(namespace, names[0] if len(names) == 1 else ""), name=f"wait for {namespace}"
                )
    except TimeoutError:
        for key in sorted(open_keys):
            result.failures[key] = f"not within {timeout_seconds:g} s: {_standing(result.states[key])}"
    except ExceptionGroup as group_error:
        raise _first(group_error) from group_error
    return result


async def wait_stopped(
    client: "MillraceClient", replicas: Collection[str], *, timeout_seconds: float
) -> None:
    """Waits until no node holds any of the replicas.

    A deleted deployment is gone from the API at once, while its replicas drain; the nodes know them. The
    contract has no watch of nodes, so they are asked again and again.

    Raises:
        DeadlineExceeded: Some are still there.
    """
    left = set(replicas)
    try:
        async with asyncio.timeout(timeout_seconds):
            while left:
                left &= {replica for node in await client.nodes() for replica in node.status.replicas}
                if left:
                    await asyncio.sleep(POLL_SECONDS)
    except TimeoutError as error:
        raise errors.DeadlineExceeded(
            f"after {timeout_seconds:g} s replicas still run: {', '.join(sorted(left))}"
        ) from error


def log_tail(deployment: Deployment | None) -> list[str]:
    """Returns the last lines of the engine that failed last."""
    if deployment is None or not deployment.status.HasField("last_failure"):
        return []
    return [printable(line) for line in deployment.status.last_failure.log_tail[-LOG_TAIL_LINES:]]


def _take(
    result: WaitResult,
    open_keys: set[Key],
    key: Key,
    kind: ChangeKind,
    deployment: Deployment,
    generation: int,
) -> None:
    if kind is ChangeKind.DELETED:
        result.failures[key] = "it was deleted meanwhile"
        open_keys.discard(key)
        return
    result.states[key] = deployment
    status = deployment.status
    if status.observed_generation < generation:
        return
    if status.rollout.rolled_back_reason:
        result.failures[key] = f"it was rolled back: {status.rollout.rolled_back_reason}"
        open_keys.discard(key)
    elif status.phase in {types_pb2.DEPLOYMENT_PHASE_READY, types_pb2.DEPLOYMENT_PHASE_STOPPED}:
        # Replicas of the spec before may make it ready: the wait is for those of the present one.
        if not status.rollout.outdated_replicas:
            open_keys.discard(key)
    elif status.phase == types_pb2.DEPLOYMENT_PHASE_FAILED:
        result.failures[key] = status.last_failure.message or _standing(deployment)
        open_keys.discard(key)


def _columns(key: Key, deployment: Deployment) -> tuple[str, str, str, str]:
    status = deployment.status
    return (
        _label(key),
        enum_name(status, "phase"),
        f"{status.ready_replicas}/{status.desired_replicas}",
        current_message(deployment),
    )


def current_message(deployment: Deployment) -> str:
    """Returns what a person would want to know now: the failure, the obstacle, or what is under way."""
    status = deployment.status
    if status.phase == types_pb2.DEPLOYMENT_PHASE_FAILED and status.last_failure.message:
        return status.last_failure.message
    for condition in status.conditions:
        if condition.type == "Scheduled" and condition.status == types_pb2.CONDITION_STATUS_FALSE:
            return condition.message
    for condition in status.conditions:
        if condition.type == "Progressing" and (
            condition.status == types_pb2.CONDITION_STATUS_FALSE or status.rollout.outdated_replicas
        ):
            return condition.message
    if status.phase in {types_pb2.DEPLOYMENT_PHASE_READY, types_pb2.DEPLOYMENT_PHASE_STOPPED}:
        return ""
    for replica in reversed(status.replicas):
        if replica.state < types_pb2.REPLICA_STATE_READY:
            state = enum_name(replica, "state").lower()
            return f"{state}: {replica.message}" if replica.message else state
    return ""


def _standing(deployment: Deployment | None) -> str:
    if deployment is None:
        return "nothing was heard of it"
    _, phase, ready, message = _columns(("", ""), deployment)
    return f"{phase}, {ready} ready" + (f", {message}" if message else "")


def _label(key: Key) -> str:
    return "/".join(key)


def _first(group: BaseExceptionGroup[Any]) -> BaseException:
    first: BaseException = group
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    return first


def failure_report(result: WaitResult) -> Iterable[Any]:
    """Returns what is shown of the failures before the error line: the log tails."""
    for key in result.failures:
        lines = log_tail(result.states.get(key))
        if lines:
            yield styled(f"last lines of {_label(key)}'s log:", "bold")
            for line in lines:
                yield styled(f"  {line}")
