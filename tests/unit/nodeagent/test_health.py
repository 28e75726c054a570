"""Probes against a small HTTP server: what counts as a served token, and what stays unknown."""

from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web
from aiohttp.test_utils import TestServer

from nodeagent.health import EngineProbe, Facts, HealthTracker


class Engine:
    """Answers by path; a missing path is 404."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, Any]] = {}
        self.asked: list[str] = []
        self.url = ""

    async def handle(self, request: web.Request) -> web.Response:
        self.asked.append(request.path)
        status, body = self.answers.get(request.path, (404, {"detail": "Not Found"}))
        if isinstance(body, str):
            return web.Response(status=status, text=body)
        return web.json_response(body, status=status)


@pytest_asyncio.fixture
async def engine() -> AsyncIterator[Engine]:
    engine = Engine()
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", engine.handle)
    async with TestServer(application) as server:
        engine.url = str(server.make_url("")).rstrip("/")
        yield engine


@pytest_asyncio.fixture
async def probe() -> AsyncIterator[EngineProbe]:
    async with aiohttp.ClientSession() as session:
        yield EngineProbe(session)


@pytest.mark.parametrize(
    ("answers", "ok", "reason"),
    [
        ({"/v1/completions": (200, {"choices": [{"text": "x"}]})}, True, ""),
        ({"/v1/completions": (200, {"choices": []})}, False, "without a token"),
        ({"/v1/completions": (200, "ok")}, False, "not JSON"),
        ({"/v1/completions": (500, {"error": "dead"})}, False, "answered 500"),
        ({"/v1/embeddings": (200, {"data": [{"embedding": [1]}]})}, True, ""),
        ({"/v1/chat/completions": (200, {"choices": [{}]})}, True, ""),
        ({}, False, "none of the OpenAI routes serves model 'm'"),
    ],
)
async def test_canary(
    engine: Engine, probe: EngineProbe, answers: dict[str, tuple[int, Any]], ok: bool, reason: str
) -> None:
    engine.answers = answers
    outcome = await probe.canary(engine.url, "m", timeout_seconds=5)
    assert outcome.ok is ok
    assert reason in outcome.reason


async def test_liveness_and_absence(engine: Engine, probe: EngineProbe) -> None:
    assert (await probe.liveness(engine.url)).absent
    engine.answers["/health"] = (200, "")
    assert (await probe.liveness(engine.url)).ok
    engine.answers["/health"] = (503, "")
    assert not (await probe.liveness(engine.url)).absent
    outcome = await probe.liveness("http://127.0.0.1:1")
    assert not outcome.ok
    assert "127.0.0.1:1" in outcome.reason


async def test_facts_are_unknown_where_the_engine_does_not_say(engine: Engine, probe: EngineProbe) -> None:
    assert await probe.facts(engine.url, "m") == Facts(None, None)
    engine.answers = {
        "/version": (200, {"version": "0.32.0"}),
        "/v1/models": (200, {"data": [{"id": "other"}, {"id": "m", "max_model_len": 2048}]}),
    }
    assert await probe.facts(engine.url, "m") == Facts("0.32.0", 2048)
    engine.answers = {"/version": (200, {"version": "<script>"}), "/v1/models": (200, [1])}
    assert await probe.facts(engine.url, "m") == Facts(None, None)


def test_tracker_needs_three_failures_in_a_row() -> None:
    tracker = HealthTracker()
    assert not tracker.failed(1.0)
    assert not tracker.failed(2.0)
    assert not tracker.succeeded()
    assert [tracker.failed(each) for each in (3.0, 4.0, 5.0, 6.0)] == [False, False, True, False]
    assert tracker.unhealthy_since == 5.0
    assert tracker.succeeded()
    assert tracker.healthy
