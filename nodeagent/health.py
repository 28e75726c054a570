"""Is an engine well? A served token says so, not a 200 on /health.

`EngineProbe` asks an engine over HTTP: liveness, a one-token canary, its own facts, its metrics page.
`HealthTracker` turns a row of outcomes into a judgement. Neither changes a replica; the state machine in
`nodeagent.replica` decides what an outcome means.
"""

import asyncio
import os
import re
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson
from millrace.core.v1 import replica_pb2

from core import errors

LIVENESS_TIMEOUT_SECONDS = 2.0
# A warm engine answers one token in milliseconds; behind a full queue it may take seconds.
CANARY_TIMEOUT_SECONDS = 10.0
# The very first token of a cold engine may come with compilation.
FIRST_CANARY_TIMEOUT_SECONDS = 120.0
FACTS_TIMEOUT_SECONDS = 2.0
SCRAPE_TIMEOUT_SECONDS = 2.0
# Pages of engines are a few hundred KiB; anything beyond this is not a metrics page.
ANSWER_BYTES_MAX = 8 * 1024 * 1024
_EXCERPT_LENGTH = 200

# Failures in a row before an engine counts as unhealthy: one lost answer under load is no illness.
FAILURES_UNTIL_UNHEALTHY = 3
_VERSION = re.compile(r"[A-Za-z0-9._+-]{1,64}")


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of a probe: well, or why not."""

    ok: bool
    reason: str = ""
    # The route does not exist, which for optional routes is neither good nor bad.
    absent: bool = False


@dataclass(frozen=True, slots=True)
class Facts:
    """What an engine says of itself; None is unknown."""

    version: str | None = None
    max_model_len: int | None = None


class EngineProbe:
    """Asks engines over HTTP. Every question has a time limit; no answer raises."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        """Takes the session, which belongs to the caller."""
        self._session = session

    async def liveness(self, url: str) -> Outcome:
        """Asks GET /health."""
        outcome, _ = await self._ask("GET", f"{url}/health", timeout_seconds=LIVENESS_TIMEOUT_SECONDS)
        return outcome

    async def canary(self, url: str, model: str, *, timeout_seconds: float) -> Outcome:
        """Has one token generated, or one text embedded where the model generates none."""
        first: Outcome | None = None
        for path, body in _canary_requests(model):
            outcome, answer = await self._ask(
                "POST", f"{url}{path}", timeout_seconds=timeout_seconds, json_body=body
            )
            if not outcome.absent:
                return _judge_canary(outcome, answer, path)
            first = first or outcome
        reason = first.reason if first else "no route"
        return Outcome(ok=False, reason=f"none of the OpenAI routes serves model {model!r}: {reason}")

    async def served_models(self, url: str) -> Outcome:
        """Asks GET /v1/models: the liveness of engines without /health."""
        outcome, _ = await self._ask("GET", f"{url}/v1/models", timeout_seconds=LIVENESS_TIMEOUT_SECONDS)
        return outcome

    async def facts(self, url: str, model: str) -> Facts:
        """Asks for version and context length."""
        (_, version), (_, models) = await asyncio.gather(
            self._ask("GET", f"{url}/version", timeout_seconds=FACTS_TIMEOUT_SECONDS),
            self._ask("GET", f"{url}/v1/models", timeout_seconds=FACTS_TIMEOUT_SECONDS),
        )
        return Facts(version=_read_version(version), max_model_len=_read_max_model_len(models, model))

    async def metrics(self, url: str) -> tuple[Outcome, str]:
        """Reads GET /metrics."""
        outcome, body = await self._ask("GET", f"{url}/metrics", timeout_seconds=SCRAPE_TIMEOUT_SECONDS)
        return outcome, body.decode("utf-8", "replace") if outcome.ok else ""

    async def kv_event_sources(self, url: str) -> Any:
        """Asks where the engine publishes KV events; None for an engine that does not know the question.

        Raises:
            Unavailable: The engine does not answer.
            ValueError: The answer is no JSON.
        """
        outcome, body = await self._ask(
            "GET", f"{url}/kv_event_sources", timeout_seconds=FACTS_TIMEOUT_SECONDS
        )
        if outcome.absent:
            return None
        if not outcome.ok:
            raise errors.Unavailable(outcome.reason)
        return orjson.loads(body)

    async def _ask(
        self, method: str, url: str, *, timeout_seconds: float, json_body: dict[str, Any] | None = None
    ) -> tuple[Outcome, bytes]:
        try:
            async with (
                asyncio.timeout(timeout_seconds),
                self._session.request(
                    method,
                    url,
                    data=orjson.dumps(json_body) if json_body is not None else None,
                    headers={"content-type": "application/json"} if json_body is not None else None,
                    allow_redirects=False,
                ) as response,
            ):
                body = await _read_bounded(response)
                if response.status == 200:
                    return Outcome(ok=True), body
                excerpt = body[:_EXCERPT_LENGTH].decode("utf-8", "replace")
                reason = f"{method} {response.url.path} answered {response.status} {excerpt}".rstrip()
                return Outcome(ok=False, reason=reason, absent=response.status in {404, 405}), body
        except TimeoutError:
            return Outcome(ok=False, reason=f"{method} {url} gave no answer in {timeout_seconds:g} s"), b""
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return Outcome(ok=False, reason=f"{method} {url}: {_in_words(error)}"), b""


def _in_words(error: Exception) -> str:
    """Says what went wrong as a person would: `connection refused`, not the library's own account."""
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    if isinstance(cause, OSError) and cause.errno is not None:
        return os.strerror(cause.errno).lower()
    return str(error) or type(error).__name__


async def _read_bounded(response: aiohttp.ClientResponse) -> bytes:
    data = bytearray()
    async for chunk in response.content.iter_any():
        data += chunk
        if len(data) > ANSWER_BYTES_MAX:
            raise ValueError(f"the answer is longer than {ANSWER_BYTES_MAX} bytes")
    return bytes(data)


def _canary_requests(model: str) -> list[tuple[str, dict[str, Any]]]:
    """Requests to try in turn: engines of pooling models, and chat-only services, lack the first routes."""
    once = {"max_tokens": 1, "temperature": 0}
    return [
        ("/v1/completions", {"model": model, "prompt": "1", **once}),
        ("/v1/embeddings", {"model": model, "input": "1"}),
        ("/v1/chat/completions", {"model": model, "messages": [{"role": "user", "content": "1"}], **once}),
    ]


def _judge_canary(outcome: Outcome, answer: bytes, path: str) -> Outcome:
    if not outcome.ok:
        return outcome
    try:
        body = orjson.loads(answer)
    except orjson.JSONDecodeError:
        return Outcome(ok=False, reason=f"POST {path} answered 200 with a body that is not JSON")
    served = isinstance(body, dict) and bool(body.get("choices") or body.get("data"))
    return Outcome(ok=served, reason="" if served else f"POST {path} answered 200 without a token")


def _load_object(body: bytes) -> dict[str, Any]:
    try:
        loaded = orjson.loads(body)
    except orjson.JSONDecodeError:
        return {}
    return loaded if isinstance(loaded, dict) else {}


def _read_version(body: bytes) -> str | None:
    version = _load_object(body).get("version")
    return version if isinstance(version, str) and _VERSION.fullmatch(version) else None


def _read_max_model_len(body: bytes, model: str) -> int | None:
    listed = _load_object(body).get("data")
    for entry in listed if isinstance(listed, list) else []:
        if isinstance(entry, dict) and entry.get("id") == model:
            length = entry.get("max_model_len")
            return length if isinstance(length, int) and 0 < length < 2**31 else None
    return None


def apply_facts(observation: replica_pb2.ReplicaObservation, facts: Facts) -> None:
    """Writes what is known into an observation and leaves the rest unknown."""
    if facts.version is not None:
        observation.engine_version = facts.version
    if facts.max_model_len is not None:
        observation.facts.max_model_len = facts.max_model_len


@dataclass(slots=True)
class HealthTracker:
    """Counts outcomes in a row.

    Attributes:
        healthy: The present judgement.
        failures: Failures since the last success.
        unhealthy_since: Monotonic time of the change to unhealthy; None while healthy.
    """

    healthy: bool = True
    failures: int = 0
    unhealthy_since: float | None = None

    def succeeded(self) -> bool:
        """Counts a success; tells whether the judgement changed."""
        changed = not self.healthy
        self.healthy, self.failures, self.unhealthy_since = True, 0, None
        return changed

    def failed(self, now: float) -> bool:
        """Counts a failure at a monotonic time; tells whether the judgement changed."""
        self.failures += 1
        if not self.healthy or self.failures < FAILURES_UNTIL_UNHEALTHY:
            return False
        self.healthy, self.unhealthy_since = False, now
        return True
