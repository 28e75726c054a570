"""Hash chains and rendezvous."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh64_intdigest

from router.prefix.chain import BLOCKS_MAX, hash_chain, root_hash, routing_block_tokens
from router.prefix.rendezvous import KEY_BLOCKS_MAX, preference, prefix_key, rank

ROOT = root_hash("team", "chat")


def test_every_process_hashes_alike() -> None:
    # Fixed values: a change here makes routers of two versions disagree.
    assert root_hash("team", "chat") == 0xDC80BF08E9C333A7
    assert hash_chain(ROOT, b"x" * 128, 64) == [0x99C7760C99726709, 0x4314C0CF7972F572]


@settings(deadline=None)
@given(st.binary(max_size=400), st.binary(max_size=400), st.sampled_from([1, 16, 64]))
def test_common_prefix_is_common_chain(first: bytes, second: bytes, block: int) -> None:
    chains = [list(hash_chain(ROOT, each, block)) for each in (first, second)]
    blocks = [
        [each[at : at + block] for at in range(0, len(each) // block * block, block)]
        for each in (first, second)
    ]
    common = 0
    for one, two in zip(*blocks, strict=False):
        if one != two:
            break
        common += 1
    assert [len(each) for each in chains] == [len(each) for each in blocks]
    assert chains[0][:common] == chains[1][:common]
    assert not set(chains[0][common:]) & set(chains[1][common:])


def test_tenants_models_adapters_and_salts_share_nothing() -> None:
    roots = {
        root_hash("team", "chat"),
        root_hash("other", "chat"),
        root_hash("team", "code"),
        root_hash("team", "chat", adapter="x"),
        root_hash("team", "chat", salt="x"),
    }
    assert len(roots) == 5
    assert len({hash_chain(root, b"x" * 64, 64)[0] for root in roots}) == 5


def test_the_chain_is_bounded() -> None:
    assert len(hash_chain(ROOT, b"x" * (BLOCKS_MAX + 100), 1)) == BLOCKS_MAX


@settings(deadline=None)
@given(st.binary(max_size=3000), st.sampled_from([1, 7, 64]))
def test_every_hash_is_the_seed_of_the_next(prompt: bytes, block: int) -> None:
    expected = []
    parent = ROOT
    for at in range(0, min(len(prompt) // block, BLOCKS_MAX) * block, block):
        parent = xxh64_intdigest(prompt[at : at + block], parent)
        expected.append(parent)
    assert hash_chain(ROOT, prompt, block) == expected


def test_routing_counts_in_whole_engine_blocks() -> None:
    assert [routing_block_tokens(each) for each in (1, 16, 32, 48, 64, 128)] == [64, 64, 64, 96, 64, 128]


def test_the_key_of_a_prompt_stays_as_it_grows() -> None:
    chain = list(range(100, 200))
    assert prefix_key(()) is None
    assert prefix_key(chain[:1]) == chain[0]
    assert prefix_key(chain[:3]) == chain[1]
    assert {prefix_key(chain[:length]) for length in range(KEY_BLOCKS_MAX, 100)} == {chain[3]}


def test_rendezvous_spreads_evenly_and_moves_only_what_it_must() -> None:
    names = [f"replica-{n}" for n in range(8)]
    before = [preference((key,), names)[0] for key in range(4000)]
    assert all(400 < count < 600 for count in Counter(before).values())
    after = [preference((key,), names[:7])[0] for key in range(4000)]
    assert all(one == two for one, two in zip(before, after, strict=True) if one != 7)
    assert preference((), names) == ()


@settings(deadline=None)
@given(st.integers(0, 2**64 - 1), st.text())
def test_ranks_lie_between_0_and_1(key: int, name: str) -> None:
    assert 0 <= rank(key, name) <= 1
