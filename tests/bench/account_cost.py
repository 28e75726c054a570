"""Measures what a request's account costs: identifiers, record, decision, usage, metrics, log line.

    python -m tests.bench.account_cost [--rounds 20000]
    PYTHONPATH=.millrace/native:. python -P -m tests.bench.account_cost

In comes nothing, out goes a Markdown table in microseconds, for answers in one piece and for streams; bodies
are small, lines are JSON as in production. Each figure is the least of several means, so that other work on
the machine shows as little as can be. This module itself is never compiled, the router's callers are: what
it does between the calls is part of every figure, about a microsecond of a whole account.
"""

import argparse
import asyncio
import gc
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import orjson

from core.clock import SystemClock
from core.logging import configure
from core.telemetry import new_identifiers
from router.access_log import AccessLog
from router.decisions.log import DecisionLog, Step
from router.metering.request import RequestMeter
from router.metering.usage import Usage, UsageOutcome
from router.metrics import RouterMetrics
from router.openai.errors import Reason
from router.picking.columns import Columns
from router.picking.contract import Candidate, RequestContext
from router.picking.decision import Decision
from router.picking.registry import build_strategy
from router.prefix.prompt import NO_PROMPT
from router.record import RequestRecord
from router.view.view import Endpoint, EndpointState, Tier

SHARES = 20
ROUTE = "/v1/chat/completions"
ENGINE = "vllm"
BODY_BYTES = 2000
CHUNKS = 8

_USAGE = {"prompt_tokens": 511, "total_tokens": 528, "completion_tokens": 17, "prompt_tokens_details": None}
_ANSWER = orjson.dumps(
    {
        "id": "chatcmpl-813bf3cd3066cf3f", "object": "chat.completion", "created": 1795222094,
        "model": "chat", "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant", "content": "A millrace carries the stream to the wheel. " * 2,
                    "refusal": None, "annotations": None, "audio": None, "function_call": None,
                    "tool_calls": [], "reasoning": None,
                },
                "logprobs": None, "finish_reason": "stop", "stop_reason": None, "token_ids": None,
            }
        ],
        "service_tier": None, "system_fingerprint": None, "usage": _USAGE, "prompt_logprobs": None,
        "prompt_token_ids": None, "kv_transfer_params": None,
    }
)  # fmt: skip
_HEAD = (
    b'data: {"id":"chatcmpl-813bf3cd3066cf3f","object":"chat.completion.chunk","created":1795222094,'
    b'"model":"chat","choices":['
)
_CHOICE = b'{"index":0,"delta":{"content":" t"},"logprobs":null,"finish_reason":%b,"token_ids":null}'
_TOLD = b',"usage":{"prompt_tokens":511,"total_tokens":528,"completion_tokens":17}}\n\n'
_PIECES = (
    *[_HEAD + _CHOICE % b"null" + b"]" + _TOLD for _ in range(CHUNKS)],
    _HEAD + _CHOICE % b'"stop"' + b"]" + _TOLD,
    _HEAD + b"]" + _TOLD + b"data: [DONE]\n\n",
)


class Account:
    """One worker's books, and requests to be entered into them."""

    def __init__(self) -> None:
        self.clock = SystemClock()
        self.metrics = RouterMetrics()
        self.log = AccessLog()
        self.decisions = DecisionLog()
        self.strategy = build_strategy("default")
        endpoints = [
            Endpoint("tenant", "chat", f"chat-{n}", "http://e", "chat", "m", EndpointState.READY, "i", 1, "n")
            for n in range(8)
        ]
        self.columns = Columns(endpoints)
        self.endpoints = tuple(endpoints)
        self.body = orjson.dumps(
            {"model": "chat", "messages": [{"role": "user", "content": "x" * BODY_BYTES}], "stream": True}
        )
        self.document: dict[str, Any] = orjson.loads(self.body)
        self.record = self.open()
        self.step = self.choose(self.record)
        self.meter = self.read(stream=False)

    def open(self) -> RequestRecord:
        """Opens the account of a request, as `router.serving` does, and fills it in."""
        request_id, trace_parent = new_identifiers()
        record = RequestRecord(
            request_id=request_id,
            trace_id=trace_parent[3:35],
            trace_parent=trace_parent,
            method="POST",
            route=ROUTE,
            started_seconds=self.clock.monotonic(),
        )
        self.metrics.request_started()
        record.namespace, record.key_hash, record.tier = "tenant", "0123456789abcdef" * 4, Tier.BASE
        record.model = record.deployment = "chat"
        record.endpoint, record.node, record.why = "chat-3", "node-17", "least-cost"
        record.attempts, record.status, record.stream = 1, 200, True
        return record

    def choose(self, record: RequestRecord) -> Step:
        """Makes what a choice leaves, as `router.candidates` does; the selector's part is made here, too."""
        context = RequestContext(
            record.request_id, ROUTE, "tenant", "chat", "chat", True, bytes(bytearray(self.body)), NO_PROMPT
        )
        seen = Decision(
            self.columns, [None] * 8, [1, 2, 3, 4, 5, 6, 7, 8], [0] * 8, None, None, None, None, 3
        )
        candidate = Candidate(self.endpoints[3], None, 4)
        return Step(
            context, self.strategy, self.endpoints, self.endpoints, self.endpoints, seen, candidate,
            "least-cost", record.started_seconds,
        )  # fmt: skip

    def read(self, *, stream: bool) -> RequestMeter:
        """Meters an answer, as `router.delivery` and `router.upstream.relay` do."""
        meter = RequestMeter(ROUTE, self.document, stream=stream, metered=True)
        meter.body_for(self.body, ENGINE)
        if stream:
            reading = meter.begin(200, "text/event-stream; charset=utf-8", "")
            assert reading is not None
            for piece in _PIECES:
                reading.feed(piece)
        else:
            reading = meter.begin(200, "application/json", "")
            assert reading is not None
            reading.feed(_ANSWER)
        reading.finish()
        assert not meter.failure[0]
        meter.outcome = UsageOutcome.COMPLETE
        return meter

    def settle(self, meter: RequestMeter, record: RequestRecord) -> None:
        """Hands on what a request used, as `router.director` does."""
        record.counts = meter.counts()
        self.metrics.take(
            Usage(
                request_id=record.request_id,
                namespace=record.namespace,
                key_hash_prefix=record.key_hash[:12],
                deployment=record.deployment,
                model=record.model,
                route=ROUTE,
                tier=record.tier.name.lower(),
                counts=record.counts,
                outcome=meter.outcome,
                latency_ms=(self.clock.monotonic() - record.started_seconds) * 1000,
            )
        )

    def end(self, record: RequestRecord) -> None:
        """Closes the account."""
        record.first_byte_seconds = 0.0731
        record.reason = Reason.OK
        record.end(self.metrics, self.log, self.clock)

    def whole(self) -> None:
        """Everything, for an answer in one piece."""
        record = self.open()
        self.decisions.open(record, self.choose(record))
        self.settle(self.read(stream=False), record)
        self.end(record)

    def streamed(self) -> None:
        """Everything, for a stream."""
        record = self.open()
        self.decisions.open(record, self.choose(record))
        self.settle(self.read(stream=True), record)
        self.end(record)

    def open_and_end(self) -> None:
        """A record from its beginning to its line in the log."""
        self.end(self.open())


def least_microseconds(action: Callable[[], object], rounds: int) -> float:
    """Returns the least of several means."""
    found = []
    for _ in range(SHARES):
        began = time.perf_counter_ns()
        for _ in range(rounds // SHARES):
            action()
        found.append((time.perf_counter_ns() - began) / (rounds // SHARES) / 1000)
    return min(found)


def table(account: Account, rounds: int) -> str:
    """Measures all rows."""
    answered = account.read(stream=False)
    rows: list[tuple[str, Callable[[], object]]] = [
        ("identifiers", new_identifiers),
        ("record opened, ended, logged", account.open_and_end),
        ("choice made", lambda: account.choose(account.record)),
        (
            "choice made and kept",
            lambda: account.decisions.open(account.record, account.choose(account.record)),
        ),
        ("answer in one piece metered", lambda: account.read(stream=False)),
        (f"stream of {CHUNKS + 2} pieces metered", lambda: account.read(stream=True)),
        ("usage settled", lambda: account.settle(answered, account.record)),
        ("all, answer in one piece", account.whole),
        ("all, stream", account.streamed),
    ]
    lines = ["| what | us |", "|---|---|"]
    for name, action in rows:
        least_microseconds(action, rounds // 4)
        lines.append(f"| {name} | {least_microseconds(action, rounds):.2f} |")
    return "\n".join(lines)


async def _measure(rounds: int, profiled_seconds: float) -> str:
    """Measures inside a loop, whose timers the log uses; they never fire, so batches are written by size."""
    account = Account()
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    until = time.monotonic() + profiled_seconds
    while time.monotonic() < until:
        for _ in range(1000):
            account.whole()
    return "" if profiled_seconds else table(account, rounds)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40_000)
    parser.add_argument("--only-whole-seconds", type=float, default=0, help="for a profiler; prints no table")
    options = parser.parse_args()
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123 - there is nothing to a path here
        stderr, sys.stderr = sys.stderr, nowhere
        try:
            configure(service="router", style="json")
            print(asyncio.run(_measure(options.rounds, options.only_whole_seconds)))
        finally:
            sys.stderr = stderr


if __name__ == "__main__":
    main()
