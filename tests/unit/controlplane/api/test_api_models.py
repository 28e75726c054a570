"""Models: directories, limits, the hub's cache, and remedies."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from aiohttp import web
from aiohttp.test_utils import TestServer
from huggingface_hub import constants

from controlplane.api import limits, models
from controlplane.api.models import FileModelSource
from controlplane.knowledge import load_knowledge
from core.errors import InvalidArgument
from tests.support.api_harness import TINY_CONFIG


def write_model(directory: Path, *, config: object = TINY_CONFIG) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


async def refusal(model: str) -> InvalidArgument:
    with pytest.raises(InvalidArgument) as refused:
        await FileModelSource().facts(model)
    assert refused.value.violations[0].field == "model"
    return refused.value


async def test_directory_with_weights(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "model-1.safetensors").write_bytes(b"x" * 1000)
    (tmp_path / "model-2.safetensors").write_bytes(b"x" * 24)
    facts = await FileModelSource().facts(str(tmp_path))
    assert facts.weight_file_bytes == 1024
    assert facts.max_positions == 2048


async def test_index_tells_the_size(tmp_path: Path) -> None:
    write_model(tmp_path)
    index = {"metadata": {"total_size": 123456}, "weight_map": {}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert (await FileModelSource().facts(str(tmp_path))).weight_file_bytes == 123456


async def test_directory_without_weights_is_sized_by_parameters(tmp_path: Path) -> None:
    assert (await FileModelSource().facts(str(write_model(tmp_path)))).weight_file_bytes is None


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{", "no valid JSON"),
        ("[]", "no JSON object"),
        (" " * (limits.MODEL_CONFIG_BYTES_MAX + 1), "at most"),
        ('{"model_type": "alien"}', "not supported"),
        ('{"model_type": "llama"}', "lacks"),
    ],
)
async def test_useless_configuration(tmp_path: Path, content: str, part: str) -> None:
    (tmp_path / "config.json").write_text(content)
    assert part in (await refusal(str(tmp_path))).message


async def test_missing_things_say_what_to_do(tmp_path: Path) -> None:
    gone = await refusal(str(tmp_path / "none"))
    assert gone.reason == "ERROR_REASON_MODEL_NOT_FOUND"
    assert gone.metadata["model"].endswith("none")
    assert "does not exist" in gone.message
    assert "holds no config.json" in (await refusal(str(tmp_path))).message
    file = tmp_path / "file"
    file.write_text("")
    assert "is a file" in (await refusal(str(file))).message


async def test_hub_id_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "snapshot")

    def cached(_model: str, _file: str) -> Path:
        return tmp_path / "snapshot" / "config.json"

    monkeypatch.setattr(models, "_cached", cached)
    assert (await FileModelSource().facts("org/tiny")).max_positions == 2048


@pytest_asyncio.fixture
async def hub(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[TestServer]:
    """A hub that knows one model, refuses one and never answers for another."""

    released = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        match request.match_info["name"], request.match_info["file"]:
            case "indexed", "model.safetensors.index.json":
                return web.json_response({"metadata": {"total_size": 4321}})
            case "tiny" | "indexed", "config.json":
                return web.json_response(TINY_CONFIG)
            case "large", _:
                return web.Response(text=" " * (limits.MODEL_CONFIG_BYTES_MAX + 1))
            case "slow", _:
                await released.wait()
            case _:
                pass
        raise web.HTTPNotFound

    app = web.Application()
    app.router.add_get("/{name}/{file}", answer)
    server = TestServer(app)
    await server.start_server()
    base = server.make_url("/")

    def url(model: str, file: str) -> str:
        return str(base / model.rpartition("/")[2] / file)

    monkeypatch.setattr(models, "hf_hub_url", url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    released.set()
    await server.close()


async def test_hub_id_from_the_hub(hub: TestServer) -> None:
    facts = await FileModelSource().facts("millrace-tests/tiny")
    assert (facts.max_positions, facts.weight_file_bytes) == (2048, None)


async def test_the_hubs_index_tells_the_size(hub: TestServer) -> None:
    assert (await FileModelSource().facts("millrace-tests/indexed")).weight_file_bytes == 4321


@pytest.mark.parametrize(
    ("name", "part"), [("gone", "HTTP 404"), ("large", "beyond"), ("slow", "did not answer within")]
)
async def test_useless_hub(hub: TestServer, monkeypatch: pytest.MonkeyPatch, name: str, part: str) -> None:
    monkeypatch.setattr(limits, "HUB_TIMEOUT_SECONDS", 0.3)
    error = await refusal(f"millrace-tests/{name}")
    assert error.reason == "ERROR_REASON_MODEL_NOT_FOUND"
    assert part in error.message
    assert "absolute path" in error.message


async def test_unreachable_hub(hub: TestServer) -> None:
    await hub.close()
    assert "cannot be reached" in (await refusal("millrace-tests/tiny")).message


async def test_offline_hub_id_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    error = await refusal("millrace-tests/does-not-exist")
    assert error.reason == "ERROR_REASON_MODEL_NOT_FOUND"
    assert "absolute path" in error.message
    assert "HF_HUB_OFFLINE" in error.message


async def test_a_known_model_needs_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(models, "try_to_load_from_cache", lambda _model, _file: None)
    facts = await FileModelSource(load_knowledge()).facts("Qwen/Qwen2.5-72B-Instruct")
    assert (facts.parameters, facts.weight_file_bytes) == (72_706_203_648, None)


async def test_a_known_model_takes_its_weights_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_model(tmp_path) / "config.json"
    (tmp_path / "model.safetensors").write_bytes(b"x" * 512)
    monkeypatch.setattr(models, "try_to_load_from_cache", lambda _model, _file: str(config))
    facts = await FileModelSource(load_knowledge()).facts("Qwen/Qwen2.5-7B-Instruct")
    # Its configuration is that of the knowledge base all the same.
    assert (facts.parameters, facts.weight_file_bytes) == (7_615_616_512, 512)
