"""What the line is told of a request."""

import pytest

from router.admission.waiter import ANSWER_TOKENS, ANSWER_TOKENS_MAX, waiter_of
from router.record import RequestRecord
from router.view.view import Tier


@pytest.mark.parametrize(
    ("body", "priority", "answer"),
    [
        (b'{"priority": -3, "max_tokens": 7}', -3, 7),
        (b'{"max_completion_tokens": 9, "max_tokens": 7}', 0, 9),
        (b'{"priority": true, "max_tokens": "many"}', 0, ANSWER_TOKENS),
        (b'{"priority": 1e9, "max_tokens": 100000000}', 0, ANSWER_TOKENS_MAX),
        (b'{"max_tokens": -5}', 0, 1),
        (b"[1]", 0, ANSWER_TOKENS),
        (b"--form\r\n\r\nnot JSON", 0, ANSWER_TOKENS),
        (b"", 0, ANSWER_TOKENS),
    ],
)
async def test_priority_and_cost_come_from_the_body_as_far_as_it_says_them(
    body: bytes, priority: int, answer: int
) -> None:
    record = RequestRecord("x", "t", "p", "POST", "/r", 0.0, key_hash="k", tier=Tier.FAST)
    waiter = waiter_of(body, record, deadline_seconds=5.0)
    assert (waiter.priority, waiter.cost_tokens) == (priority, len(body) // 4 + answer)
    assert (waiter.rank, waiter.key, waiter.body_bytes, waiter.deadline_seconds) == (0, "k", len(body), 5.0)
    record.tier = Tier.BASE
    assert waiter_of(body, record, deadline_seconds=5.0).rank == 1
