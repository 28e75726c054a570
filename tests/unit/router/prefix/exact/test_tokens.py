"""Prompts in engines' tokens: what is asked, what is kept, and what is never waited for."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any

import orjson
import pytest
import pytest_asyncio
from aiohttp import web
from aiohttp.test_utils import TestServer

from core.block_hash import block_hash, event_hash
from router.prefix.exact import tokens as module
from router.prefix.exact.tokens import PromptTokenizer
from router.view.view import Endpoint
from tests.support.candidates import endpoint
from tests.support.clock import ManualClock

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "Hello"}


@dataclass
class Engine:
    """Answers `/tokenize` with one token a byte of the prompt or of the messages."""

    endpoint: Endpoint = field(default_factory=lambda: endpoint("r0"))
    asked: list[dict[str, Any]] = field(default_factory=list)
    status: int = 200
    content: bytes | None = None

    async def tokenize(self, request: web.Request) -> web.Response:
        body = orjson.loads(await request.read())
        self.asked.append(body)
        text = orjson.dumps(body.get("messages", body.get("prompt")))
        content = self.content if self.content is not None else orjson.dumps({"tokens": list(text)})
        return web.Response(status=self.status, body=content)


@pytest_asyncio.fixture
async def engine() -> AsyncIterator[Engine]:
    made = Engine()
    application = web.Application()
    application.router.add_post("/tokenize", made.tokenize)
    async with TestServer(application) as server:
        made.endpoint = replace(made.endpoint, url=str(server.make_url("")).rstrip("/"))
        yield made


@pytest_asyncio.fixture
async def tokenizer() -> AsyncIterator[PromptTokenizer]:
    made = PromptTokenizer(ManualClock(), wait_seconds=30.0)
    yield made
    await made.close()


async def test_a_chat_is_asked_with_all_that_its_template_reads(
    engine: Engine, tokenizer: PromptTokenizer
) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    body = {"model": "x", "messages": [USER], "tools": tools, "temperature": 1, "cache_salt": "s"}
    read = await tokenizer.read(body, CHAT, [engine.endpoint], block_tokens={4, 8})
    assert engine.asked == [{"model": "d", "messages": [USER], "tools": tools}]
    text = list(orjson.dumps([USER]))
    assert read is not None
    assert read.tokens == len(text)
    assert {size: len(chain) for size, chain in read.chains.items()} == {
        4: len(text) // 4,
        8: len(text) // 8,
    }
    assert read.chains[8][0] == event_hash(block_hash(None, text[:8], (("cache_salt", "s"),)))
    # Known from now on; another salt is another prompt.
    assert await tokenizer.read(body, CHAT, [engine.endpoint], block_tokens={4, 8}) is read
    assert len(engine.asked) == 1
    other = await tokenizer.read({**body, "cache_salt": "t"}, CHAT, [engine.endpoint], block_tokens={4, 8})
    assert other is not None
    assert other.chains[8][0] != read.chains[8][0]


async def test_token_ids_need_no_engine(engine: Engine, tokenizer: PromptTokenizer) -> None:
    read = await tokenizer.read({"prompt": list(range(40))}, TEXT, [engine.endpoint], block_tokens={16})
    assert not engine.asked
    assert read is not None
    first = block_hash(None, range(16))
    assert read.chains == {16: [event_hash(first), event_hash(block_hash(first, range(16, 32)))]}
    assert (read.tokens, read.hit_tokens_max(16)) == (40, 32)
    read = await tokenizer.read({"prompt": list(range(32))}, TEXT, [engine.endpoint], block_tokens={16})
    assert read is not None
    # The last token is always computed.
    assert read.hit_tokens_max(16) == 16


@pytest.mark.parametrize(
    ("route", "body"),
    [
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}),
        (CHAT, {"messages": [USER], "documents": [{}]}),
        (CHAT, {"messages": [USER], "cache_salt": 5}),
        (CHAT, {"messages": "Hello"}),
        (CHAT, {"messages": ["Hello"]}),
        (TEXT, {"prompt": ["a", "b"]}),
        (TEXT, {"prompt": [1, -2]}),
        (TEXT, {"prompt": [True]}),
        (TEXT, {"prompt": list(range(module.TOKENS_MAX + 1))}),
        (TEXT, {"prompt": "x" * (module.BODY_BYTES_MAX + 1)}),
        (TEXT, {"prompt": "a", "suffix": "b"}),
        ("/v1/embeddings", {"input": "a"}),
    ],
)
async def test_what_cannot_be_known_is_not_asked(
    engine: Engine, tokenizer: PromptTokenizer, route: str, body: dict[str, Any]
) -> None:
    assert await tokenizer.read(body, route, [engine.endpoint], block_tokens={16}) is None
    assert not engine.asked


@pytest.mark.parametrize("content", [b"", b"[]", b'{"tokens": "x"}', b'{"tokens": []}', b'{"tokens": [-1]}'])
async def test_nonsense_is_not_believed(engine: Engine, tokenizer: PromptTokenizer, content: bytes) -> None:
    engine.content = content
    assert await tokenizer.read({"prompt": "a"}, TEXT, [engine.endpoint], block_tokens={16}) is None
    engine.status, engine.content = 404, None
    assert await tokenizer.read({"prompt": "b"}, TEXT, [engine.endpoint], block_tokens={16}) is None


async def test_nobody_waits_for_engines_that_did_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = ManualClock()
    tokenizer = PromptTokenizer(clock, wait_seconds=30.0)
    (gone,) = [replace(endpoint("r0"), url="http://127.0.0.1:1")]
    asked = []
    ask = tokenizer._ask

    async def counted(*arguments: Any) -> Any:
        asked.append(clock.monotonic())
        return await ask(*arguments)

    monkeypatch.setattr(tokenizer, "_ask", counted)
    for _ in range(20):
        assert await tokenizer.read({"prompt": "a"}, TEXT, [gone], block_tokens={16}) is None
        await clock.advance(0.5)
    # Pauses double up to 5 s: 20 requests in 10 s ask a few times.
    assert 2 <= len(asked) <= 9
    await tokenizer.close()


async def test_what_is_kept_is_bounded(tokenizer: PromptTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HASHES_MAX", 100)
    monkeypatch.setattr(module, "PROMPTS_MAX", 10)

    async def tokens(endpoint: Endpoint, asked: bytes) -> list[int]:
        del endpoint
        return list(asked * 8)

    monkeypatch.setattr(tokenizer, "_ask", tokens)
    for number in range(50):
        await tokenizer.read({"prompt": str(number)}, TEXT, [endpoint("r0")], block_tokens={16})
        assert len(tokenizer._known) <= 10
        assert tokenizer._hashes == sum(map(module._size, tokenizer._known.values())) <= 100
    assert tokenizer._known
