"""The fail-over experiment: kill an engine under load and account for everything that follows.

Shared by the tests, which assert on the account, and the benchmark, which prints it.
"""

import asyncio
import json
import os
import signal
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.support.load import Outcome, steady_load
from tests.support.waiting import eventually

Replicas = Callable[[], Awaitable[list[dict[str, Any]]]]


@dataclass(frozen=True)
class Failover:
    """What followed the kill; times in seconds after it.

    Attributes:
        requests: Requests of the whole load.
        inside: Failed requests that were inside the killed engine.
        others: Failed requests that were not.
        last_use_seconds: The router's last attempt to send it a request; 0 where it made none. An answer
            cannot tell: a dead engine gives none, and the request is answered by another.
        last_failure_seconds: End of the last failed request.
        assigned_seconds: When the replacement was assigned.
        serves_seconds: When a request was first answered by the replacement.
    """

    requests: int
    inside: list[Outcome]
    others: list[Outcome]
    last_use_seconds: float
    last_failure_seconds: float
    assigned_seconds: float
    serves_seconds: float


def _last_attempt_seconds(router_log: Path, replica: str, killed_at: datetime) -> float:
    """Reads from the router's log when it last tried an engine in vain, in seconds after the kill."""
    lines = (json.loads(line) for line in router_log.read_text().splitlines() if line.startswith("{"))
    attempts = (
        (datetime.fromisoformat(line["time"]) - killed_at).total_seconds()
        for line in lines
        if line["message"] == "attempt failed" and line["endpoint"] == replica
    )
    return max(attempts, default=0.0)


async def kill_under_load(
    router_url: str,
    headers: Mapping[str, str],
    *,
    model: str,
    replicas: Replicas,
    router_log: Path,
    clients: int = 4,
    max_tokens: int = 8,
    replaced_within_seconds: float = 30.0,
    stream: bool = False,
) -> Failover:
    """Kills the process group leader of one replica under load and waits for its replacement to serve."""
    before = {each["replica"] for each in await replicas()}
    victim = (await replicas())[0]
    async with steady_load(
        router_url, headers, model=model, clients=clients, max_tokens=max_tokens, stream=stream
    ) as load:
        await eventually(lambda: load.last_use_of(victim["replica"]), timeout_seconds=20)
        killed, killed_at = time.monotonic(), datetime.now(UTC)
        os.kill(victim["pid"], signal.SIGKILL)
        replacement: dict[str, Any] = {}

        async def replaced() -> bool:
            fresh = [each for each in await replicas() if each["replica"] not in before]
            replacement.update(fresh[0] if fresh else {})
            return bool(fresh)

        await eventually(replaced, timeout_seconds=replaced_within_seconds, interval_seconds=0.02)
        await eventually(lambda: load.last_use_of(replacement["replica"]), timeout_seconds=20)
        await asyncio.sleep(0.1)
    served = [each for each in load.outcomes if each.endpoint == replacement["replica"] and not each.failed]
    assigned = datetime.fromisoformat(replacement["assign_time"])
    return Failover(
        requests=len(load.outcomes),
        inside=[each for each in load.failures if each.began <= killed <= each.ended],
        others=[each for each in load.failures if not each.began <= killed <= each.ended],
        last_use_seconds=max(0.0, _last_attempt_seconds(router_log, victim["replica"], killed_at)),
        last_failure_seconds=max((each.ended - killed for each in load.failures), default=0.0),
        assigned_seconds=(assigned - killed_at).total_seconds(),
        serves_seconds=min(each.ended for each in served) - killed,
    )
