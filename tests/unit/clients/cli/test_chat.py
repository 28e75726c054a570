import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web

from tests.support.waiting import eventually
from tests.unit.clients.conftest import CommandLine

KEY = "sk-of-the-test"


class FakeRouter:
    """Streams what the test asks for, as an OpenAI-compatible server does."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.pieces = ["Millrace ", "turns\nmachines", " into endpoints."]
        self.refusal: tuple[int, str, dict[str, str]] | None = None
        self.refused_questions: dict[str, tuple[int, str, dict[str, str]]] = {}
        self.breaks_off = False
        self.stalls = False
        self.open_answers = 0
        self.url = ""

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("authorization") != f"Bearer {KEY}":
            return web.json_response({"error": {"message": "unknown key"}}, status=401)
        self.requests.append(await request.json())
        question = self.requests[-1]["messages"][-1]["content"]
        refusal = self.refused_questions.get(question, self.refusal)
        if refusal is not None:
            status, message, headers = refusal
            return web.json_response({"error": {"message": message}}, status=status, headers=headers)
        self.open_answers += 1
        try:
            return await self._stream(request)
        finally:
            self.open_answers -= 1

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for piece in self.pieces:
            await self._send(response, {"choices": [{"delta": {"content": piece}}]})
        while self.stalls:
            # Until the client goes away: the server notices it when it writes.
            await response.write(b": still here\n\n")
            await asyncio.sleep(0.02)
        if self.breaks_off:
            assert request.transport is not None
            request.transport.close()
            return response
        await self._send(response, {"choices": [{"delta": {}, "finish_reason": "stop"}]})
        await self._send(response, {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 3}})
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _send(self, response: web.StreamResponse, chunk: dict[str, Any]) -> None:
        await response.write(f"data: {json.dumps(chunk)}\n\n".encode())


@pytest_asyncio.fixture
async def router(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeRouter]:
    fake = FakeRouter()
    application = web.Application()
    application.router.add_post("/v1/chat/completions", fake.answer)
    runner = web.AppRunner(application, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    monkeypatch.setenv("MILLRACE_ROUTER_URL", fake.url)
    monkeypatch.setenv("MILLRACE_API_KEY", KEY)
    yield fake
    await runner.cleanup()


async def test_one_question(millrace: CommandLine, router: FakeRouter) -> None:
    outcome = await millrace(
        "chat", "team-ai/tiny", "-m", "What is Millrace?", "--system", "Be brief.", "--temperature", "0"
    )
    assert (outcome.code, outcome.stdout) == (0, "Millrace turns\nmachines into endpoints.\n")
    assert router.requests == [
        {
            "model": "tiny",
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "What is Millrace?"},
            ],
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0.0,
        }
    ]


async def test_question_from_a_pipe_and_answer_as_json(millrace: CommandLine, router: FakeRouter) -> None:
    outcome = await millrace("chat", "tiny", "-o", "json", stdin="Hello\n")
    assert json.loads(outcome.stdout) == {
        "model": "tiny",
        "content": "Millrace turns\nmachines into endpoints.",
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 5, "completion_tokens": 3},
    }
    assert router.requests[0]["messages"] == [{"role": "user", "content": "Hello"}]
    assert "temperature" not in router.requests[0]
    assert (await millrace("chat", "tiny")).code == 1


async def test_conversation_keeps_its_history_and_survives_a_refusal(
    millrace: CommandLine, router: FakeRouter
) -> None:
    router.refused_questions["refused"] = (503, "no endpoint is ready", {"retry-after": "5"})
    outcome = await millrace("chat", "tiny", stdin="first\n\nrefused\nsecond\n", terminal=True)
    assert outcome.code == 0
    assert "no endpoint is ready (try again in 5 s)" in outcome.stderr
    assert outcome.stdout.count("turns\nmachines into endpoints.\n") == 2
    messages = router.requests[-1]["messages"]
    assert [each["role"] for each in messages] == ["user", "assistant", "user"]
    assert [messages[0]["content"], messages[-1]["content"]] == ["first", "second"]


async def test_ctrl_c_ends_the_answer_and_twice_leaves(router: FakeRouter) -> None:
    router.stalls = True
    terminal, terminal_of_the_process = os.openpty()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        "from millrace_client.cli import main; main()",
        *("chat", "tiny"),
        stdin=terminal_of_the_process,
        stdout=PIPE,
        stderr=PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        async with asyncio.timeout(20):
            os.write(terminal, b"What is Millrace?\n")
            await process.stdout.readuntil(b"into endpoints.")
            process.send_signal(signal.SIGINT)
            await process.stderr.readuntil(b"(ended; Ctrl-C again leaves)")
            process.send_signal(signal.SIGINT)
            assert await process.wait() == 130
            assert b"Traceback" not in await process.stderr.read()
    finally:
        os.close(terminal)
        os.close(terminal_of_the_process)
    await eventually(lambda: router.open_answers == 0)


@pytest.mark.parametrize(
    ("refusal", "code", "text"),
    [
        ((404, "no deployment `tiny`", {}), 3, "no deployment `tiny`"),
        ((403, "not yours", {}), 4, "not yours"),
        ((429, "saturated", {"retry-after": "1"}), 1, "saturated (try again in 1 s)"),
        ((503, "no endpoint", {"retry-after": "5"}), 1, "no endpoint (try again in 5 s)"),
        ((400, "temperature", {}), 1, "temperature"),
        ((502, "engine broke", {}), 1, "the router answers 502: engine broke"),
    ],
)
async def test_refusals(
    millrace: CommandLine, router: FakeRouter, refusal: tuple[int, str, dict[str, str]], code: int, text: str
) -> None:
    router.refusal = refusal
    outcome = await millrace("chat", "tiny", "-m", "x")
    assert (outcome.code, outcome.stdout) == (code, "")
    assert text in outcome.stderr
    assert outcome.stderr.count("\n") == 1


async def test_wrong_key_is_not_shown(
    millrace: CommandLine, router: FakeRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILLRACE_API_KEY", "sk-wrong-secret")
    outcome = await millrace("chat", "tiny", "-m", "x")
    assert outcome.code == 4
    assert "--api-key-file" in outcome.stderr
    assert "sk-wrong-secret" not in outcome.stderr


async def test_answer_that_breaks_off(millrace: CommandLine, router: FakeRouter) -> None:
    router.breaks_off = True
    outcome = await millrace("chat", "tiny", "-m", "x")
    assert outcome.code == 5
    assert outcome.stdout.startswith("Millrace turns")
    assert "broke off" in outcome.stderr


async def test_unreachable_router(millrace: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLRACE_API_KEY", KEY)
    outcome = await millrace("chat", "tiny", "-m", "x", "--router-url", "http://127.0.0.1:1")
    assert outcome.code == 5
    assert "cannot reach the router at http://127.0.0.1:1/v1/chat/completions" in outcome.stderr
