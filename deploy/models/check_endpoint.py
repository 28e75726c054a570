"""Asks a running OpenAI-compatible endpoint the questions of millrace-tiny and counts the answers.

In come a base URL that ends in `/v1`, a model name and an optional key; out come one line for each
set of questions and the exit status: 0 when every canonical answer is exact. It needs the standard
library only, so it runs against an engine or against the router alike. It starts nothing and never
prints the key.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

QUESTIONS = Path(__file__).resolve().parent / "questions.json"
REQUEST_SECONDS_MAX = 120.0  # a cold engine on two cores answers its first request in seconds


def ask(url: str, model: str, key: str | None, question: str) -> str:
    """Returns the greedy answer to one question, or the error as text."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": 128,
    }
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(  # noqa: S310 the operator names the URL
        f"{url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers
    )
    try:
        with urllib.request.urlopen(request, timeout=REQUEST_SECONDS_MAX) as response:  # noqa: S310
            content = json.load(response)["choices"][0]["message"]["content"]
    except (OSError, ValueError, LookupError) as error:
        return f"(no answer: {error})"
    return str(content)


def parse_arguments() -> argparse.Namespace:
    """Reads the command line; the key comes from the environment, never from an argument."""
    parser = argparse.ArgumentParser(description="Check the answers of a served millrace-tiny.")
    parser.add_argument("--url", default="http://127.0.0.1:8080/v1")
    parser.add_argument("--model", default="millrace-tiny")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--held-out", action="store_true", help="ask the held-out rewordings too")
    return parser.parse_args()


def main() -> int:
    """Asks, compares and reports."""
    arguments = parse_arguments()
    key = os.environ.get("MILLRACE_API_KEY")
    entries = json.loads(QUESTIONS.read_text(encoding="utf-8"))
    sets = {"canonical": [(entry["question"], entry["answer"]) for entry in entries]}
    if arguments.held_out:
        sets["held out"] = [(text, entry["answer"]) for entry in entries for text in entry["held_out"]]
    wrong_canonical = 0
    with ThreadPoolExecutor(arguments.concurrency) as pool:
        for name, pairs in sets.items():
            started = time.monotonic()
            answers = list(
                pool.map(
                    lambda pair: ask(arguments.url, arguments.model, key, pair[0]),
                    pairs,
                )
            )
            wrong = [
                (question, answer)
                for (question, due), answer in zip(pairs, answers, strict=True)
                if answer != due
            ]
            exact = len(pairs) - len(wrong)
            elapsed = time.monotonic() - started
            print(f"{name}: {exact}/{len(pairs)} exact ({exact / len(pairs):.1%}), {elapsed:.1f} s")
            for question, answer in wrong:
                print(f"  {question} -> {answer}")
            wrong_canonical += len(wrong) if name == "canonical" else 0
    return 1 if wrong_canonical else 0


if __name__ == "__main__":
    sys.exit(main())
