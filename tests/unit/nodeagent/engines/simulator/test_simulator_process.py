import asyncio
import signal
import sys
from pathlib import Path

import aiohttp
import pytest

from nodeagent.engines.simulator.faults import CRASH_EXIT_CODE
from tests.support.waiting import eventually
from tests.unit.nodeagent.engines.simulator.conftest import REPOSITORY, Launch

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}


async def chat(url: str, **fields: object) -> tuple[int, str]:
    async with (
        aiohttp.ClientSession() as client,
        client.post(f"{url}/v1/chat/completions", json={**CHAT, **fields}) as response,
    ):
        return response.status, await response.text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_it_starts_answers_and_stops_cleanly(launch: Launch, number: signal.Signals) -> None:
    simulator = await launch()
    status, text = await chat(simulator.url)
    assert status == 200
    assert "hello" in text
    assert await simulator.stop(number) == 0


async def test_running_requests_end_within_the_shutdown_timeout(launch: Launch) -> None:
    simulator = await launch("--shutdown-timeout", "10", "--inter-token-latency-ms", "10")
    asking = asyncio.create_task(chat(simulator.url, max_tokens=30))
    await eventually(lambda: _running(simulator.url))
    assert await simulator.stop() == 0
    status, text = await asking
    assert status == 200
    assert '"completion_tokens":30' in text


async def test_without_a_timeout_running_requests_are_cut(launch: Launch) -> None:
    simulator = await launch("--inter-token-latency-ms", "10")
    asking = asyncio.create_task(chat(simulator.url, max_tokens=3000))
    await eventually(lambda: _running(simulator.url))
    assert await simulator.stop() == 0
    with pytest.raises(aiohttp.ClientError):
        await asking


async def _running(url: str) -> bool:
    async with aiohttp.ClientSession() as client, client.get(f"{url}/metrics") as response:
        text = await response.text()
    return 'vllm:num_requests_running{engine="0",model_name="tiny"} 1.0' in text


async def test_a_crash_breaks_the_request_after_the_served_ones(launch: Launch) -> None:
    simulator = await launch("--crash-after-requests", "1")
    assert (await chat(simulator.url))[0] == 200
    with pytest.raises(aiohttp.ClientError):
        await chat(simulator.url, stream=True)
    async with asyncio.timeout(5):
        assert await simulator.process.wait() == CRASH_EXIT_CODE


async def test_a_dead_engine_takes_the_process_with_it(launch: Launch) -> None:
    simulator = await launch("--mid-stream-death-after-tokens", "2", "--death-linger-seconds", "0.1")
    status, text = await chat(simulator.url, stream=True)
    assert status == 200
    assert text.endswith("data: [DONE]\n\n")
    assert '"code":500' in text
    async with asyncio.timeout(5):
        assert await simulator.process.wait() == 1


async def run(*flags: str) -> tuple[int | None, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "nodeagent.engines.simulator", "--model", "tiny", *flags),
        cwd=REPOSITORY,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(10):
        _, error = await process.communicate()
    return process.returncode, error.decode()


async def test_fail_at_start_exits_with_an_error_text() -> None:
    code, error = await run("--fail-at-start")
    assert code == 1
    assert "Engine core initialization failed" in error


async def test_unknown_flags_exit_with_a_clear_error() -> None:
    code, error = await run("--tensor-parallel-size", "2")
    assert code == 2
    assert "unrecognized arguments: --tensor-parallel-size" in error


async def test_a_taken_port_is_named(launch: Launch) -> None:
    simulator = await launch()
    port = simulator.url.rpartition(":")[2]
    code, error = await run("--host", "127.0.0.1", "--port", port)
    assert code == 1
    assert f"cannot listen on 127.0.0.1:{port}" in error


async def test_a_signal_during_start_up_ends_it() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "nodeagent.engines.simulator", "--model", "tiny", "--port", "0"),
        *("--startup-seconds", "60"),
        cwd=REPOSITORY,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )

    def catches_signals() -> bool:
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
        caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
        return bool(int(caught.split()[1], 16) & (1 << (signal.SIGTERM - 1)))

    await eventually(catches_signals)
    process.terminate()
    async with asyncio.timeout(5):
        output, _ = await process.communicate()
    assert process.returncode == 0
    assert b"startup complete" not in output


async def test_start_up_imports_nothing_heavy() -> None:
    heavy = (
        "{'aiohttp', 'pydantic', 'structlog', 'typer', 'prometheus_client', 'grpc', 'zmq', 'msgspec',"
        "'importlib.metadata', 'core.rpc', 'core.clock'}"
    )
    code = (
        "import sys, nodeagent.engines.simulator.__main__, nodeagent.engines.simulator.process;"
        f"print(sorted({heavy} & set(sys.modules)))"
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code), cwd=REPOSITORY, stdout=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(10):
        output, _ = await process.communicate()
    assert output.decode().strip() == "[]"


async def test_a_fleet_is_one_process_with_engines_of_their_own(launch: Launch) -> None:
    simulator = await launch("--fleet", "3")
    urls = [line.split()[-1] for line in simulator.lines if "http://" in line]
    assert len(set(urls)) == 3
    for url in urls:
        assert (await chat(url))[0] == 200
        assert await _prompts(url) == 1
    assert await simulator.stop() == 0


async def test_the_death_of_one_engine_leaves_the_rest_of_its_fleet(launch: Launch) -> None:
    flags = ("--fleet", "2", "--mid-stream-death-after-tokens", "2", "--death-linger-seconds", "0")
    simulator = await launch(*flags)
    first, second = [line.split()[-1] for line in simulator.lines if "http://" in line]
    await chat(first, stream=True)
    await eventually(lambda: _refuses(first))
    async with aiohttp.ClientSession() as client, client.get(f"{second}/health") as response:
        assert response.status == 200
    await chat(second, stream=True)
    async with asyncio.timeout(5):
        assert await simulator.process.wait() == 1


async def test_while_it_drains_it_is_healthy_and_refuses_with_500(launch: Launch) -> None:
    simulator = await launch("--shutdown-timeout", "10", "--inter-token-latency-ms", "10")
    asking = asyncio.create_task(chat(simulator.url, max_tokens=50))
    await eventually(lambda: _running(simulator.url))
    simulator.process.terminate()

    async def refused() -> bool:
        status, text = await chat(simulator.url, max_tokens=1)
        return status == 500 and "cannot schedule new futures after shutdown" in text

    await eventually(refused)
    async with aiohttp.ClientSession() as client, client.get(f"{simulator.url}/health") as response:
        assert response.status == 200
    assert (await asking)[0] == 200
    async with asyncio.timeout(10):
        assert await simulator.process.wait() == 0


async def _refuses(url: str) -> bool:
    try:
        await chat(url)
    except aiohttp.ClientConnectorError:
        return True
    except aiohttp.ClientError:
        return False
    return False


async def _prompts(url: str) -> float:
    async with aiohttp.ClientSession() as client, client.get(f"{url}/metrics") as response:
        lines = (await response.text()).splitlines()
    line = next(line for line in lines if line.startswith("vllm:request_prompt_tokens_count"))
    return float(line.rpartition(" ")[2])


async def test_a_leak_grows_until_the_process_is_killed(launch: Launch) -> None:
    simulator = await launch("--leak-mebibytes-per-second", "100", "--leak-limit-mebibytes", "20")
    assert (await chat(simulator.url))[0] == 200
    async with asyncio.timeout(10):
        assert await simulator.process.wait() == -signal.SIGKILL
