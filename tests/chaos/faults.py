"""The list of faults, as data: what is done to which process, for how long, and what is undone afterwards.

In comes a cluster, out comes a cluster that was hurt and, after `heal`, has everything back that an
operator or an init system would bring back. Whether it converges is judged elsewhere.
"""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from deploy.etcd.members import MemberProcess
from nodeagent.runtimes.base import LABEL_HOME, LABEL_INCARNATION, LABEL_NODE, LABEL_REPLICA
from tests.chaos.cluster import NAMESPACE, AgentNode, ChaosCluster, ControlPlane
from tests.chaos.link import Link
from tests.chaos.processes import ManagedProcess

Heal = Callable[[], Awaitable[None]]
Inject = Callable[[ChaosCluster], Awaitable[Heal]]

HOUR_SECONDS = timedelta(hours=1).total_seconds()


@dataclass(frozen=True, slots=True)
class Fault:
    """One row of the list.

    Attributes:
        name: For people.
        inject: Does the harm; returns what undoes it.
        hold_seconds: How long the harm lasts.
        converge_seconds: Bound of the way back to a cluster in which everything holds.
        loses_replicas: True where the harm itself ends engines, or keeps a machine away for longer than the
            cluster waits for it. Everywhere else the replicas must be the same before and after.
        needs_root: True where the machine must let us mount a file system.
    """

    name: str
    inject: Inject
    hold_seconds: float
    converge_seconds: float = 20.0
    loses_replicas: bool = False
    needs_root: bool = False


async def nothing() -> None:
    """What undoes a fault that the cluster heals by itself."""


# --- whom -------------------------------------------------------------------------------------------


async def leading(cluster: ChaosCluster) -> ControlPlane:
    return await cluster.leader()


async def following(cluster: ChaosCluster) -> ControlPlane:
    return await cluster.follower()


async def first_node(cluster: ChaosCluster) -> AgentNode:
    """A machine whose engines serve."""
    return next(each for each in cluster.nodes if each.engines())


async def router(cluster: ChaosCluster) -> ManagedProcess:
    assert cluster.router is not None
    return cluster.router


def etcd(*, leads: bool) -> Callable[[ChaosCluster], Awaitable[MemberProcess]]:
    return lambda cluster: cluster.etcd_member(leads=leads)


def process_of(
    victim: ControlPlane | AgentNode | ManagedProcess | MemberProcess,
) -> ManagedProcess | MemberProcess:
    return victim.process if isinstance(victim, ControlPlane | AgentNode) else victim


Victim = Callable[[ChaosCluster], Awaitable[ControlPlane | AgentNode | ManagedProcess | MemberProcess]]


# --- what -------------------------------------------------------------------------------------------


def kill(whom: Victim) -> Inject:
    """kill -9; started again by `heal`, as an init system would."""

    async def inject(cluster: ChaosCluster) -> Heal:
        process = process_of(await whom(cluster))
        process.kill()

        async def heal() -> None:
            if isinstance(process, MemberProcess):
                process.spawn()
                await asyncio.to_thread(process.wait_healthy)
            else:
                process.start()

        return heal

    return inject


def pause(whom: Victim) -> Inject:
    """SIGSTOP, then SIGCONT: connections stand, nobody answers, and then it goes on as if nothing was."""

    async def inject(cluster: ChaosCluster) -> Heal:
        process = process_of(await whom(cluster))
        process.signal(signal.SIGSTOP)

        async def heal() -> None:
            process.signal(signal.SIGCONT)

        return heal

    return inject


def engine(number: signal.Signals) -> Inject:
    """A signal to one engine; the cluster heals it, but for one that was paused."""

    async def inject(cluster: ChaosCluster) -> Heal:
        node = await first_node(cluster)
        victim = next(iter(node.engines().values()))
        os.killpg(victim.pid, number)

        async def heal() -> None:
            if number is signal.SIGSTOP:
                # The cluster may have killed it meanwhile.
                with suppress(ProcessLookupError):
                    os.killpg(victim.pid, signal.SIGCONT)

        return heal

    return inject


async def all_etcd_killed(cluster: ChaosCluster) -> Heal:
    for each in cluster.etcd:
        each.kill()

    async def heal() -> None:
        for each in cluster.etcd:
            each.spawn()
        for each in cluster.etcd:
            await asyncio.to_thread(each.wait_healthy)

    return heal


def cut(whom: Callable[[ChaosCluster], Awaitable[ControlPlane | AgentNode]], *directions: str) -> Inject:
    """Cuts the wires of a control plane to etcd, or of an agent to all control planes."""

    async def inject(cluster: ChaosCluster) -> Heal:
        links: Sequence[Link] = (await whom(cluster)).links
        for link in links:
            link.cut(*directions)

        async def heal() -> None:
            for link in links:
                link.mend()

        return heal

    return inject


def clock_jump(whom: Callable[[ChaosCluster], Awaitable[ControlPlane | AgentNode]], seconds: float) -> Inject:
    """Sets the wall clock of a process; the jump back is a second one."""

    async def inject(cluster: ChaosCluster) -> Heal:
        victim = await whom(cluster)
        victim.clock_offset.write_text(str(seconds))

        async def heal() -> None:
            victim.clock_offset.write_text("0")

        return heal

    return inject


async def orphan(cluster: ChaosCluster) -> Heal:
    """Leaves a process behind that carries an agent's label and belongs to no replica."""
    node = await first_node(cluster)
    environment = {
        **os.environ,
        LABEL_HOME: str(node.data),
        LABEL_NODE: node.name,
        LABEL_REPLICA: "forgotten",
        LABEL_INCARNATION: "forgotten",
    }
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    process = await asyncio.create_subprocess_exec(*command, env=environment, start_new_session=True)

    async def heal() -> None:
        await process.wait()

    return heal


def _fill(path: Path) -> None:
    """Writes until the disk takes no more."""
    with suppress(OSError), path.open("wb", buffering=0) as filler:
        while True:
            filler.write(b"x" * 4096)


async def disk_full(cluster: ChaosCluster) -> Heal:
    """Puts a tiny file system in place of an agent's logs, full to the last byte, and kills its engine."""
    node = await first_node(cluster)
    logs = node.data / "logs"
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(logs)]
    await asyncio.to_thread(subprocess.run, mount, check=True)
    await asyncio.to_thread(_fill, logs / "filler")
    for victim in node.engines().values():
        os.killpg(victim.pid, signal.SIGKILL)

    async def heal() -> None:
        # Lazily: engines that were started meanwhile hold their files open.
        await asyncio.to_thread(subprocess.run, ["umount", "--lazy", str(logs)], check=True)

    return heal


def bad_deployment(extra_args: dict[str, object], *, ask: bool) -> Inject:
    """A second deployment with an engine that misbehaves; undone by deleting it, as its owner would."""

    async def inject(cluster: ChaosCluster) -> Heal:
        made = await cluster.declare("bad", extra_args=dict(extra_args))
        asking = asyncio.create_task(_ask(cluster, made["apiKey"]), name="ask-bad") if ask else None

        async def heal() -> None:
            if asking is not None:
                asking.cancel()
                with suppress(asyncio.CancelledError):
                    await asking
            await cluster.call("DELETE", f"/v1/deployments/{NAMESPACE}/bad")

        return heal

    return inject


async def _ask(cluster: ChaosCluster, api_key: str) -> None:
    """Sends it a request now and then; what comes back is its owner's trouble."""
    body = {"model": "bad", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    headers = {"Authorization": f"Bearer {api_key}"}
    while True:
        async with cluster.http.post(
            f"{cluster.router_url}/v1/chat/completions", json=body, headers=headers
        ) as answer:
            await answer.read()
        await asyncio.sleep(0.2)


def slow_start(seconds: float) -> Inject:
    """A rolling change to engines that need long to start, in the middle of which one engine is killed."""

    async def inject(cluster: ChaosCluster) -> Heal:
        await cluster.declare("slow", replicas=2, extra_args={"startup_seconds": seconds})
        node = await first_node(cluster)
        os.killpg(next(iter(node.engines().values())).pid, signal.SIGKILL)

        async def heal() -> None:
            await cluster.call("DELETE", f"/v1/deployments/{NAMESPACE}/slow")

        return heal

    return inject


FAULTS: tuple[Fault, ...] = (
    Fault("control plane that leads: kill -9", kill(leading), 5),
    Fault("control plane that leads: SIGSTOP 10 s", pause(leading), 10),
    Fault("control plane that follows: kill -9", kill(following), 5),
    Fault("control plane that follows: SIGSTOP 10 s", pause(following), 10),
    Fault("agent: kill -9", kill(first_node), 5),
    Fault("agent: SIGSTOP 10 s", pause(first_node), 10),
    Fault("router: kill -9", kill(router), 1),
    Fault("router: SIGSTOP 10 s", pause(router), 10),
    Fault("engine: kill -9", engine(signal.SIGKILL), 0, loses_replicas=True),
    Fault("engine: SIGSTOP 10 s", engine(signal.SIGSTOP), 10, converge_seconds=30),
    Fault("etcd member that follows: kill -9", kill(etcd(leads=False)), 5),
    Fault("etcd member that follows: SIGSTOP 10 s", pause(etcd(leads=False)), 10),
    Fault("etcd member that leads: kill -9", kill(etcd(leads=True)), 5),
    Fault("etcd member that leads: SIGSTOP 10 s", pause(etcd(leads=True)), 10),
    Fault("etcd: all members away 60 s", all_etcd_killed, 60, converge_seconds=30),
    Fault("agent / control planes cut both ways, 60 s", cut(first_node), 60, 30, loses_replicas=True),
    Fault("agent / control planes cut both ways, 20 s", cut(first_node), 20, 30),
    Fault("agent -> control planes cut, 20 s", cut(first_node, "there"), 20, 30),
    Fault("control planes -> agent cut, 20 s", cut(first_node, "back"), 20, 30),
    Fault("leading control plane / etcd cut both ways, 60 s", cut(leading), 60, 30),
    Fault("leading control plane -> etcd cut, 20 s", cut(leading, "there"), 20, 30),
    Fault("etcd -> leading control plane cut, 20 s", cut(leading, "back"), 20, 30),
    Fault("clock of the leading control plane: +1 h, then back", clock_jump(leading, HOUR_SECONDS), 10),
    Fault("clock of the leading control plane: -1 h, then back", clock_jump(leading, -HOUR_SECONDS), 10),
    Fault("clock of an agent: +1 h, then back", clock_jump(first_node, HOUR_SECONDS), 10),
    Fault("clock of an agent: -1 h, then back", clock_jump(first_node, -HOUR_SECONDS), 10),
    Fault("disk full in an agent's log folder", disk_full, 10, loses_replicas=True, needs_root=True),
    Fault("an engine that no replica owns", orphan, 0),
    Fault("engines that start in 15 s, and one killed", slow_start(15), 10, 40, loses_replicas=True),
    Fault(
        "engine that crashes at its first request",
        bad_deployment({"crash_after_requests": 1}, ask=True),
        15,
    ),
    Fault(
        "engine that leaks memory until it is killed",
        bad_deployment({"leak_mebibytes_per_second": 64, "leak_limit_mebibytes": 192}, ask=False),
        15,
    ),
)

# What `make test` runs, with shorter holds, in seconds.
SHORT = {
    "control plane that leads: kill -9": 4,
    "agent: kill -9": 0,
    "engine: kill -9": 0,
    "etcd member that leads: kill -9": 1,
    "leading control plane / etcd cut both ways, 60 s": 4,
}
