"""A real model on real vLLM, declared, placed, started, routed to and healed by Millrace."""

import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest

from deploy.local.engine_environment import default_engines_directory, environment_name
from tests.support.failover import kill_under_load
from tests.support.gateway import call, ready_replicas, wait_ready
from tests.support.stack import REPOSITORY, LocalStack, local_stack
from tests.support.waiting import eventually

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
NAMESPACE, NAME = "default", "millrace-tiny"
QUESTIONS = json.loads((REPOSITORY / "deploy" / "models" / "questions.json").read_text())


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    installed = default_engines_directory() / environment_name() / "INSTALLED"
    assert installed.exists(), "vLLM is not installed: run `python -m deploy.local.engine_environment`"
    with local_stack(tmp_path_factory.mktemp("vllm"), "--engine=vllm", ready_seconds=300) as running:
        yield running


def client(stack: LocalStack) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url=stack.description["router_url"] + "/v1", api_key=stack.description["api_key"]
    )


async def ask(user: openai.AsyncOpenAI, question: str) -> str:
    messages: Any = [{"role": "user", "content": question}]
    answer = await user.chat.completions.create(model=NAME, messages=messages, temperature=0, max_tokens=200)
    return answer.choices[0].message.content or ""


async def test_make_up_prints_the_right_answer(stack: LocalStack) -> None:
    assert QUESTIONS[0]["question"] == "What is Millrace?"
    assert QUESTIONS[0]["answer"] in stack.text


async def test_every_question_is_answered_right(stack: LocalStack) -> None:
    async with client(stack) as user:
        answers = {each["question"]: await ask(user, each["question"]) for each in QUESTIONS}
    wrong = {
        each["question"]: answers[each["question"]]
        for each in QUESTIONS
        if answers[each["question"]] != each["answer"]
    }
    assert len(QUESTIONS) >= 40
    assert wrong == {}


async def test_streaming_carries_the_same_text_and_exact_usage(stack: LocalStack) -> None:
    messages: Any = [{"role": "user", "content": QUESTIONS[1]["question"]}]
    async with client(stack) as user:
        stream = await user.chat.completions.create(
            model=NAME,
            messages=messages,
            temperature=0,
            max_tokens=200,
            stream=True,
            stream_options={"include_usage": True},
        )
        text, usage = "", None
        async for chunk in stream:
            usage = chunk.usage or usage
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
        assert text == QUESTIONS[1]["answer"]
        assert usage is not None
        assert usage.completion_tokens > 1
        assert [model.id async for model in user.models.list()] == [NAME]
        with pytest.raises(openai.BadRequestError, match="maximum context length"):
            await user.chat.completions.create(
                model=NAME, messages=[{"role": "user", "content": "word " * 4000}], max_tokens=8
            )


async def test_the_status_shows_what_the_engine_says(stack: LocalStack) -> None:
    deployment = await call(stack, "GET", f"/v1/deployments/{NAMESPACE}/{NAME}")
    (replica,) = deployment["replica_states"]
    assert replica["state"] == "ready"
    assert replica["engine_start_ms"] > 1000
    assert "weights" in deployment["sizing"]["summary"]


async def test_what_was_worked_out_stands_beside_what_was_measured(stack: LocalStack) -> None:
    deployment = await call(stack, "GET", f"/v1/deployments/{NAMESPACE}/{NAME}")
    (replica,) = deployment["replica_states"]
    sizing, facts = deployment["sizing"], replica["facts"]
    assert facts["kv_cache_bytes"] == sizing["kv_cache_bytes"]
    assert facts["kv_cache_tokens"] == pytest.approx(sizing["kv_cache_tokens"], rel=0.03)
    # vLLM on CPU does not tell its weights; what its processes hold is measured.
    assert facts["weights_bytes"] is None
    assert 0.25 * sizing["total_bytes"] < facts["resident_bytes"] < sizing["total_bytes"]


async def test_a_killed_vllm_is_replaced_under_load(stack: LocalStack) -> None:
    await call(stack, "PATCH", f"/v1/deployments/{NAMESPACE}/{NAME}", {"replicas": 2})
    await wait_ready(stack, NAMESPACE, NAME, 2, timeout_seconds=180)
    account = await kill_under_load(
        stack.description["router_url"],
        stack.user_headers(),
        model=NAME,
        replicas=partial(ready_replicas, stack, NAMESPACE, NAME),
        router_log=stack.directory / "logs" / "router.log",
        replaced_within_seconds=180,
    )
    sys.stdout.write(f"{account}\n")
    assert account.others == []
    assert len(account.inside) <= 4
    # The endpoint is withdrawn in the transaction that assigns the replacement: one bound holds for both.
    assert account.last_use_seconds < 2.0
    assert account.assigned_seconds < 2.0
    await wait_ready(stack, NAMESPACE, NAME, 2, timeout_seconds=60)
    await call(stack, "PATCH", f"/v1/deployments/{NAMESPACE}/{NAME}", {"replicas": 1})
    await wait_ready(stack, NAMESPACE, NAME, 1, timeout_seconds=60)


async def test_a_vllm_that_cannot_start_says_why(stack: LocalStack, tmp_path: Path) -> None:
    request = {
        "models": [
            {
                "name": "wrong-flag",
                "model": str(REPOSITORY / "deploy" / "models" / "millrace-tiny"),
                "extra_args": {"kv_cache_dtype": "no-such-type"},
            }
        ],
        "namespace": "faults",
    }
    await call(stack, "POST", "/v1/deployments", request, expect=201)
    seen: dict[str, Any] = {}

    async def failed() -> bool:
        seen.update(await call(stack, "GET", "/v1/deployments/faults/wrong-flag"))
        return bool((seen.get("last_failure") or {}).get("log_tail"))

    await eventually(failed, timeout_seconds=120, interval_seconds=0.5)
    assert "no-such-type" in "\n".join(seen["last_failure"]["log_tail"])
    await call(stack, "DELETE", "/v1/deployments/faults/wrong-flag", expect=204)
