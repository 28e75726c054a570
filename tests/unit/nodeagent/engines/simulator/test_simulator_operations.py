"""Sleep, queue limits, adapters and data-parallel ranks."""

import asyncio
from typing import Any

from tests.support.waiting import eventually
from tests.unit.nodeagent.engines.simulator.conftest import Serve, Simulator

SLOW = ("--inter-token-latency-ms", "20")


async def ask(simulator: Simulator, **fields: Any) -> tuple[int, dict[str, Any]]:
    headers = fields.pop("headers", {})
    body = {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 2, **fields}
    async with simulator.client.post(
        f"{simulator.url}/v1/completions", json=body, headers=headers
    ) as response:
        return response.status, await response.json()


async def call(simulator: Simulator, method: str, path: str, body: Any = None) -> tuple[int, str]:
    async with simulator.client.request(method, f"{simulator.url}{path}", json=body) as response:
        return response.status, await response.text()


async def test_a_sleeping_engine_is_healthy_and_hangs(serve: Serve) -> None:
    simulator = await serve("--server-dev-mode")
    assert (await ask(simulator))[0] == 200
    assert (await call(simulator, "POST", "/sleep?level=1"))[0] == 200
    assert (await call(simulator, "GET", "/is_sleeping"))[1] == '{"is_sleeping":true}'
    asking = asyncio.create_task(ask(simulator))
    await eventually(lambda: simulator.engine.active_requests == 1)
    assert (await call(simulator, "GET", "/health"))[0] == 200
    assert await simulator.metric("vllm:num_requests_waiting{") == 0
    asleep = 'vllm:engine_sleep_state{engine="0",model_name="tiny",sleep_state="weights_offloaded"}'
    assert await simulator.metric(asleep) == 1
    assert not asking.done()
    assert (await call(simulator, "POST", "/wake_up"))[0] == 200
    assert (await asking)[0] == 200
    assert await simulator.metric(asleep) == 0


async def test_going_to_sleep_ends_what_runs(serve: Serve) -> None:
    simulator = await serve("--server-dev-mode", *SLOW)
    asking = asyncio.create_task(ask(simulator, max_tokens=1000))
    await eventually(lambda: simulator.model.running_count == 1)
    await call(simulator, "POST", "/sleep?level=2&mode=abort")
    status, content = await asking
    assert (status, content["choices"][0]["finish_reason"]) == (200, "abort")
    assert simulator.model.pool.cached_blocks == 0


async def test_routes_of_the_development_mode_are_closed_by_default(serve: Serve) -> None:
    simulator = await serve()
    for path in ("/sleep", "/wake_up", "/reset_prefix_cache", "/v1/load_lora_adapter"):
        assert (await call(simulator, "POST", path))[0] == 404


async def test_the_queue_is_limited_by_requests(serve: Serve) -> None:
    simulator = await serve("--max-num-queued-reqs", "1", *SLOW)
    asking = asyncio.create_task(ask(simulator, max_tokens=20))
    await eventually(lambda: simulator.engine.active_requests == 1)
    status, content = await ask(simulator)
    assert (status, content["error"]["type"]) == (503, "Service Unavailable")
    assert (await asking)[0] == 200
    assert (await ask(simulator))[0] == 200
    rejected = 'vllm:admission_rejections_total{model_name="tiny",reason="max_num_queued_reqs"}'
    assert await simulator.metric(rejected) == 1


async def test_the_queue_is_limited_by_prompt_tokens(serve: Serve) -> None:
    simulator = await serve("--max-num-queued-tokens", "100", "--prefill-tokens-per-second", "1000")
    asking = asyncio.create_task(ask(simulator, prompt=list(range(300))))
    await eventually(lambda: simulator.engine.active_requests == 1)
    assert (await ask(simulator))[0] == 503
    assert (await asking)[0] == 200
    assert (await ask(simulator))[0] == 200


LORA = ("--enable-lora", "--allow-runtime-lora-updating", "--lora-modules", "first=/adapters/first")


async def test_adapters_come_and_go(serve: Serve) -> None:
    simulator = await serve(*LORA)
    assert (await ask(simulator, model="second"))[0] == 404
    load = {"lora_name": "second", "lora_path": "/adapters/second"}
    status, text = await call(simulator, "POST", "/v1/load_lora_adapter", load)
    assert (status, text) == (200, "Success: LoRA adapter 'second' added successfully.")
    assert (await call(simulator, "POST", "/v1/load_lora_adapter", load))[0] == 400
    status, content = await ask(simulator, model="second")
    assert (status, content["model"]) == (200, "second")
    async with simulator.client.get(f"{simulator.url}/v1/models") as response:
        models = {each["id"]: each for each in (await response.json())["data"]}
    assert models["second"]["parent"] == "tiny"
    assert models["second"]["root"] == "/adapters/second"
    assert models["second"]["max_model_len"] is None
    assert (await call(simulator, "POST", "/v1/unload_lora_adapter", {"lora_name": "second"}))[0] == 200
    assert (await call(simulator, "POST", "/v1/unload_lora_adapter", {"lora_name": "second"}))[0] == 404
    assert (await ask(simulator, model="second"))[0] == 404


async def test_an_engine_without_adapters_refuses_to_load_one(serve: Serve) -> None:
    simulator = await serve("--allow-runtime-lora-updating")
    body = {"lora_name": "x", "lora_path": "/x"}
    assert (await call(simulator, "POST", "/v1/load_lora_adapter", body))[0] == 500


async def test_prefixes_are_not_shared_between_adapters(serve: Serve) -> None:
    simulator = await serve(*LORA)
    prompt = list(range(40))
    await ask(simulator, prompt=prompt)
    await ask(simulator, prompt=prompt, model="first")
    assert simulator.model.counters.prefix_hits_tokens == 0
    await ask(simulator, prompt=prompt, model="first")
    assert simulator.model.counters.prefix_hits_tokens == 32


async def test_one_adapter_runs_at_a_time_and_its_series_go_stale(serve: Serve) -> None:
    simulator = await serve(*LORA, "second=/adapters/second", *SLOW)
    asking = [
        asyncio.create_task(ask(simulator, model=name, max_tokens=5)) for name in ("first", "second", "tiny")
    ]
    await eventually(lambda: simulator.model.running_count == 2)
    assert simulator.model.deferred_count == 1
    assert [(await each)[0] for each in asking] == [200, 200, 200]
    async with simulator.client.get(f"{simulator.url}/metrics") as response:
        lines = [line for line in (await response.text()).splitlines() if "lora_requests_info{" in line]
    times = {line.rpartition(" ")[0].partition("{")[2]: float(line.rpartition(" ")[2]) for line in lines}
    assert len(times) >= 3
    newest = max(times, key=lambda labels: times[labels])
    assert 'running_lora_adapters="",waiting_lora_adapters=""' in newest


async def test_ranks_have_series_of_their_own_behind_one_port(serve: Serve) -> None:
    simulator = await serve("--data-parallel-size", "2")
    assert (await ask(simulator, headers={"x-data-parallel-rank": "1"}))[0] == 200
    status, content = await ask(simulator, headers={"x-data-parallel-rank": "2"})
    assert (status, content["error"]["param"]) == (400, "data_parallel_rank")
    assert await simulator.metric('vllm:prompt_tokens_total{engine="0"') == 0
    assert await simulator.metric('vllm:prompt_tokens_total{engine="1"') == 3
    shared = 'vllm:admission_rejections_total{model_name="tiny",reason="max_num_queued_reqs"}'
    assert await simulator.metric(shared) == 0


async def test_requests_without_a_rank_are_spread(serve: Serve) -> None:
    simulator = await serve("--data-parallel-size", "2", *SLOW)
    asking = [asyncio.create_task(ask(simulator, max_tokens=10)) for _ in range(4)]
    await eventually(lambda: [each.active_requests for each in simulator.engine.drivers] == [2, 2])
    assert {(await each)[0] for each in asking} == {200}
