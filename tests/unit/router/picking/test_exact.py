"""Exact knowledge in a pick: where engines tell it counts, elsewhere what was sent does."""

from millrace.agent.v1 import node_agent_service_pb2 as messages

from core.block_hash import block_hash, event_hash
from router.picking.contract import CacheKnowledge, RequestContext
from router.picking.registry import build_strategy
from router.picking.selector import Selector
from router.prefix.exact.copy import CacheCopy
from router.prefix.exact.index import ExactIndex
from router.upstream.loads import LoadTable
from router.view.samples import SampleTable
from tests.support.candidates import endpoint, request
from tests.support.clock import ManualClock

ENDPOINTS = tuple(endpoint(f"r{n}") for n in range(3))
PROMPT = list(range(200))


def _copy(*hashes: int, complete: bool = True) -> CacheCopy:
    copy = CacheCopy()
    part = messages.KvSnapshotPart(block_hashes=hashes)
    end = messages.KvSnapshotEnd(
        incarnation="i",
        block_tokens=16,
        hash_scheme=messages.KV_HASH_SCHEME_SHA256_PICKLE,
        complete=complete,
    )
    copy.apply(messages.StreamKvEventsResponse(epoch="e", sequence=1, snapshot_part=part), 0.0)
    copy.apply(messages.StreamKvEventsResponse(epoch="e", sequence=1, snapshot_end=end), 0.0)
    return copy


def _chain(tokens: list[int]) -> list[int]:
    hashes, parent = [], None
    for at in range(0, len(tokens) // 16 * 16, 16):
        parent = block_hash(parent, tokens[at : at + 16])
        hashes.append(event_hash(parent))
    return hashes


def _selector(**copies: CacheCopy) -> Selector:
    clock = ManualClock()
    exact = ExactIndex(token="t", tls=None, clock=clock)
    exact.follower._copies.update(copies)
    return Selector(build_strategy("default"), loads=LoadTable(), samples=SampleTable(clock), exact=exact)


async def _request(selector: Selector, tokens: list[int] = PROMPT) -> RequestContext:
    document = {"prompt": tokens}
    asked = request()
    asked.prompt = selector.read_prompt(document, ENDPOINTS, namespace="a", deployment="d")
    await selector.read_exactly(asked, document, ENDPOINTS)
    return asked


async def test_the_engine_that_says_it_has_the_prompt_gets_it() -> None:
    selector = _selector(r0=_copy(), r1=_copy(*_chain(PROMPT)))
    chosen = selector.choose(await _request(selector), ENDPOINTS)
    assert chosen is not None
    assert chosen.endpoint.replica == "r1"
    assert (chosen.cached_tokens, chosen.cache_knowledge) == (192, CacheKnowledge.EXACT)
    # All but the last token, in whole blocks.
    chosen = selector.choose(await _request(selector, PROMPT[:192]), ENDPOINTS)
    assert chosen is not None
    assert chosen.cached_tokens == 176


async def test_what_was_evicted_counts_no_more_once_it_has_ended() -> None:
    selector = _selector(r0=_copy(), r1=_copy(), r2=_copy())
    context = await _request(selector)
    first = selector.choose(context, ENDPOINTS)
    assert first is not None
    flight = selector.send(context, first)
    again = selector.choose(context, ENDPOINTS)
    # Under way: the engine has not told of it yet, and the next one queues behind it.
    assert again is not None
    decision = selector.decision
    assert decision is not None
    by_replica = {each.endpoint.replica: each for each in decision.candidates()}
    assert by_replica[first.endpoint.replica].cached_tokens == 192
    assert by_replica[first.endpoint.replica].cache_knowledge is CacheKnowledge.APPROXIMATE
    flight.close()
    assert selector.choose(context, ENDPOINTS) is not None
    decision = selector.decision
    assert decision is not None
    assert [each.cached_tokens for each in decision.candidates()] == [0, 0, 0]
    assert {each.cache_knowledge for each in decision.candidates()} == {CacheKnowledge.EXACT}


async def test_each_endpoint_falls_back_by_itself() -> None:
    selector = _selector(r0=_copy(*_chain(PROMPT)[:4]), r1=_copy(complete=False))
    context = await _request(selector)
    for each in ENDPOINTS[1:]:
        selector.index.record(each.identity, context.prompt.chain[:2], capacity_blocks=100)
    assert selector.choose(context, ENDPOINTS) is not None
    decision = selector.decision
    assert decision is not None
    assert [(each.cached_tokens, each.cache_knowledge.value) for each in decision.candidates()] == [
        (64, "exact"),
        (128, "approximate"),
        (128, "approximate"),
    ]


async def test_without_any_copy_nothing_is_read() -> None:
    selector = _selector()
    assert (await _request(selector)).exact is None
