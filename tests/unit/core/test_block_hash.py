"""Digests computed with vLLM 0.32's own functions, and what makes a chain a chain."""

import pytest

from core.block_hash import ROOT_HASH, ExtraKeys, block_hash, event_hash, extra_keys

ADAPTER = ("a", "/p")


def test_chains_start_where_vllms_start() -> None:
    assert ROOT_HASH.hex() == "066b1e8987e027138e98701c46128929378935f9b6cd1549105ae6b4f0d71198"


def test_a_chain_of_two_blocks() -> None:
    first = block_hash(None, range(16))
    second = block_hash(first, range(16, 32))
    assert first.hex() == "fe8fa5dda3210d0ca2031e37cbe3b001186773cd1c710beb2d45fcb51d434798"
    assert second.hex() == "8be7aaa33831156d316f1f463ae57e643deb63f42e633e2d631df88815cc4629"
    assert (event_hash(first), event_hash(second)) == (3262291359910021016, 7142137847444424233)


@pytest.mark.parametrize(
    ("extra", "digest"),
    [
        (
            extra_keys(first=True, cache_salt="tenant"),
            "becd92828345ee4d06c1166c27360c470049395b0ebb51ca69a627dee601d952",
        ),
        (
            extra_keys(first=True, lora=ADAPTER),
            "01b483228123b76d78e2a0a644be08162de7711534d747b7a80952b9168a28ae",
        ),
        (
            extra_keys(first=True, cache_salt="tenant", lora=ADAPTER),
            "4323ec6c498c62c9703d6e1d4ebe2d863d5fc09d23c0b29b7f43f5836abd4084",
        ),
    ],
)
def test_salt_and_adapter(extra: ExtraKeys, digest: str) -> None:
    assert block_hash(None, range(16), extra).hex() == digest


def test_the_salt_enters_the_first_block_only_and_the_adapter_every_block() -> None:
    assert extra_keys(first=False, cache_salt="tenant") is None
    assert extra_keys(first=False, lora=ADAPTER) == (("lora", "a", "/p"),)
    assert extra_keys(first=True) is None
