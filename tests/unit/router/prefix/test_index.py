"""The approximate index against a model of it, and its bounds."""

from collections import OrderedDict
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from router.prefix.index import BYTES_PER_BLOCK, REMEMBERED, PrefixIndex

A, B = ("a", "1"), ("b", "1")
MEBIBYTE = 1024 * 1024


def _index(blocks_max: int = 1_000_000) -> PrefixIndex:
    return PrefixIndex(bytes_max=blocks_max * BYTES_PER_BLOCK)


def test_it_tells_how_much_each_endpoint_holds() -> None:
    index = _index()
    index.record(A, (1, 2, 3), capacity_blocks=10)
    index.record(B, (1, 2, 9), capacity_blocks=10)
    assert index.match((1, 2, 3, 4)) == {A: 3, B: 2}
    assert index.match((1, 2, 9)) == {A: 2, B: 3}
    assert index.match((7, 1)) == {}
    assert index.match(()) == {}
    assert (len(index), index.distinct_blocks) == (6, 4)


def test_the_least_recently_used_goes_first_and_its_tail_before_its_head() -> None:
    index = _index()
    assert REMEMBERED == 2
    index.record(A, (1, 2, 3), capacity_blocks=3)
    index.record(A, (11, 12), capacity_blocks=3)
    index.record(A, (1, 2), capacity_blocks=3)
    index.record(A, (21, 22), capacity_blocks=3)
    # Block 3 has not been used since the first request.
    assert index.match((1, 2, 3)) == {A: 2}
    index.record(A, (23,), capacity_blocks=3)
    assert index.match((11, 12)) == {A: 1}
    assert index.match((1, 2)) == {A: 2}


def _depth(index: PrefixIndex, chain: Sequence[int]) -> int:
    (bit,) = index.bits([A])
    return index.expected(chain).get(bit, 0)


def test_what_has_probably_left_the_cache_counts_half() -> None:
    index = _index()
    for at in range(8):
        index.record(A, [10 * at + each for each in range(10)], capacity_blocks=40)
    # Eighty blocks are remembered, forty are in the cache: those of the latest four requests.
    assert [_depth(index, range(10 * at, 10 * at + 10)) for at in range(8)] == [5, 5, 5, 5, 10, 10, 10, 10]
    # A head that others use still counts in full, the tail behind it by half; its last block is forgotten.
    index.record(A, [0, 1, 90], capacity_blocks=40)
    assert _depth(index, range(10)) == (2 + 9) // 2


def test_pressure_tells_how_fast_a_cache_turns_over() -> None:
    index = _index()
    assert index.pressures([0, 1]) == [0.0, 0.0]
    for at in range(30):
        index.record(A if at % 3 else B, [10 * at + each for each in range(10)], capacity_blocks=50)
    a, b = index.pressures(index.bits([A, B]))
    # Both caches are full; one gets two of three requests.
    assert 1.6 < a / b < 2.4
    # Room for a whole cache lasts twice as long as for half of one.
    index.record(A, [1000], capacity_blocks=100)
    assert index.pressures(index.bits([A]))[0] < 0.6 * a
    for at in range(100):
        index.record(A, [2000 + at], capacity_blocks=50)
    # Nothing comes to the other one meanwhile: what it holds grows old.
    assert index.pressures(index.bits([B]))[0] < 0.4 * b
    index.retain([])
    assert index.pressures([1, 2]) == [0.0, 0.0]


def test_a_restarted_engine_holds_nothing() -> None:
    index = _index()
    index.record(A, (1, 2), capacity_blocks=10)
    index.record(B, (1,), capacity_blocks=10)
    index.retain([("a", "2"), B])
    assert index.match((1, 2)) == {B: 1}
    index.record(("a", "2"), (5,), capacity_blocks=10)
    assert index.match((1,)) == {B: 1}
    index.retain([])
    assert (len(index), index.distinct_blocks) == (0, 0)


def test_repeated_use_takes_no_more_room() -> None:
    index = _index()
    for _ in range(1000):
        index.record(A, range(1, 50), capacity_blocks=100)
    assert len(index) == 49
    assert index._holdings[A].logged <= 4 * 49


def test_a_chain_that_was_given_is_never_changed() -> None:
    index = _index()
    chains = [[10 * at + each for each in range(7)] for at in range(10)]
    for chain in chains:
        # What is remembered ends within a chain.
        index.record(A, chain, capacity_blocks=5)
    assert chains == [[10 * at + each for each in range(7)] for at in range(10)]
    assert len(index) == 10


_requests = st.lists(
    st.tuples(st.sampled_from([A, B]), st.integers(0, 3), st.integers(1, 6), st.integers(0, 3)), max_size=60
)


def _chain(family: int, length: int, fork: int) -> Sequence[int]:
    """Chains of a family share a head; a number is reached by one path only, as hashes are."""
    return [family * 1000 + at + (100 * fork if at >= 3 else 0) for at in range(length)]


@settings(max_examples=200, deadline=None)
@given(_requests, st.integers(1, 12))
def test_it_is_an_lru_for_each_endpoint(
    requests: list[tuple[tuple[str, str], int, int, int]], capacity: int
) -> None:
    index = _index()
    model: dict[tuple[str, str], OrderedDict[int, None]] = {A: OrderedDict(), B: OrderedDict()}
    for identity, family, length, fork in requests:
        chain = _chain(family, length, fork)
        index.record(identity, chain, capacity_blocks=capacity)
        held = model[identity]
        for digest in reversed(chain):
            held.pop(digest, None)
            held[digest] = None
        while len(held) > REMEMBERED * capacity:
            held.popitem(last=False)
        for each in (A, B):
            assert index.blocks_at(each) == len(model[each]) <= REMEMBERED * capacity
            matched = index.match(chain).get(each, 0)
            expected = next((at for at, digest in enumerate(chain) if digest not in model[each]), len(chain))
            assert matched == expected
            counted = index.expected(chain).get(index.bits([each])[0], 0)
            assert matched // 2 <= counted <= matched
            if len(model[each]) <= capacity:
                assert counted == matched
    assert len(index) == sum(map(len, model.values()))
    assert index.distinct_blocks == len({*model[A], *model[B]})


@settings(deadline=None)
@given(_requests, st.integers(1, 20))
def test_it_never_exceeds_its_bytes(
    requests: list[tuple[tuple[str, str], int, int, int]], blocks_max: int
) -> None:
    index = _index(blocks_max)
    for identity, family, length, fork in requests:
        index.record(identity, _chain(family, length, fork), capacity_blocks=1000)
        assert index.estimated_bytes <= blocks_max * BYTES_PER_BLOCK
