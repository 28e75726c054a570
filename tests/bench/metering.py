"""What metering costs an event of a stream and a request: `python -m tests.bench.metering`.

In comes nothing, out goes a table: the least time of several rounds, on one core, without any I/O. The events
are those of vLLM 0.32's chat, with usage in every chunk as the router asks for it, and without.
"""

import timeit
from collections.abc import Callable

import orjson

from router.metering.ask import Asked, ask_usage
from router.metering.stream import CompletionMeter

ROUNDS = 7
CALLS = 50_000

USAGE = (
    b',"usage":{"prompt_tokens":16,"total_tokens":19,"completion_tokens":3,"completion_tokens_details":null}'
)
CHUNK = (
    b'data: {"id":"chatcmpl-813bf3cd3066cf3f","object":"chat.completion.chunk","created":1795222094,'
    b'"model":"tiny","choices":[{"index":0,"delta":{"content":" t"},"logprobs":null,"finish_reason":null,'
    b'"token_ids":null}]%b}\n\n'
)


def microseconds(call: Callable[[], object]) -> float:
    return min(timeit.repeat(call, number=CALLS, repeat=ROUNDS)) / CALLS * 1e6


def main() -> None:
    told, bare = CHUNK % USAGE, CHUNK % b""
    meter = CompletionMeter(Asked(), asking=True)
    assert meter.feed(told) == bare
    body = orjson.dumps(
        {"model": "chat", "messages": [{"role": "user", "content": "x" * 2000}], "stream": True}
    )
    document = orjson.loads(body)
    rows = [
        ("event with usage, taken out", len(told), microseconds(lambda: meter.feed(told))),
        ("event without usage, counted", len(bare), microseconds(lambda: meter.feed(bare))),
        ("event with usage, two a piece", len(told), microseconds(lambda: meter.feed(told + told)) / 2),
        ("request made to ask", len(body), microseconds(lambda: ask_usage(body, document, continuous=True))),
    ]
    print("| what | bytes | us |")
    print("|---|---|---|")
    for name, size_bytes, cost_us in rows:
        print(f"| {name} | {size_bytes} | {cost_us:.2f} |")


if __name__ == "__main__":
    main()
