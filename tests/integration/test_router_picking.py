"""Picking between real sockets: affinity to what is cached, to sessions, and its end with the engine."""

from collections import Counter
from contextlib import AsyncExitStack

from tests.support.fake_engine import FakeEngine, answers
from tests.support.router_cluster import DEPLOYMENT, Cluster, cluster, endpoint_record

OK = b'{"id": "chatcmpl-1", "choices": []}'


async def _ask(it: Cluster, content: str, *, session: str = "", user: str = "") -> str:
    body = {"model": DEPLOYMENT, "messages": [{"role": "user", "content": content}]}
    headers = {**it.headers, **({"x-session-id": session} if session else {})}
    url = f"{it.url}/v1/chat/completions"
    async with it.client.post(url, json=body | ({"user": user} if user else {}), headers=headers) as response:
        assert response.status == 200
        return response.headers["x-millrace-endpoint"]


async def test_the_default_goes_where_the_prompt_is_cached_until_the_engine_restarts() -> None:
    async with AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(FakeEngine(answers(200, OK))) for _ in range(3)]
        it = await stack.enter_async_context(cluster(strategy="default", urls=[each.url for each in engines]))
        homes = {}
        for topic in ("apples", "pears", "plums", "figs"):
            homes[topic] = await _ask(it, f"Tell me all about {topic}. " * 100)
        assert len(set(homes.values())) == 3
        for topic, home in homes.items():
            for turn in range(3):
                assert await _ask(it, f"Tell me all about {topic}. " * 100 + "And then? " * turn) == home
        selector = it.router.director.candidates.selectors.default
        assert selector.ledger.pending_tokens("chat-0") == 0
        assert await it.metric("millrace_router_prefix_index_blocks") == len(selector.index) > 0
        for number, engine in enumerate(engines):
            await it.publish(endpoint_record(f"chat-{number}", engine.url, incarnation="run-2"))
        assert len(selector.index) == 0


async def test_sessions_stay_by_header_and_by_user() -> None:
    async with AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(FakeEngine(answers(200, OK))) for _ in range(3)]
        it = await stack.enter_async_context(
            cluster(strategy="session-affinity", urls=[each.url for each in engines])
        )
        homes: Counter[str] = Counter()
        for number in range(12):
            first = await _ask(it, "Hello", session=f"s-{number}")
            assert await _ask(it, "Something else", session=f"s-{number}") == first
            # The body's `user` names a session, too; the header goes first.
            assert await _ask(it, "Hello", user=f"s-{number}") == first
            assert await _ask(it, "Hello", session=f"s-{number}", user="other") == first
            homes[first] += 1
        assert len(homes) == 3
