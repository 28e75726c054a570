"""`millrace plan`, `label` and `taint` against the control plane's own API."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.support.api_harness import ADMIN_TOKEN, ApiHarness, running_api
from tests.unit.clients.conftest import CommandLine


@pytest_asyncio.fixture
async def api(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ApiHarness]:
    async with running_api() as harness:
        monkeypatch.setenv("MILLRACE_SERVER", f"127.0.0.1:{harness.server.port}")
        monkeypatch.setenv("MILLRACE_TOKEN", ADMIN_TOKEN)
        yield harness


@pytest.fixture
def millrace(
    api: ApiHarness,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> CommandLine:
    return CommandLine(capsys, monkeypatch)


def write(folder: Path, **fields: object) -> str:
    path = folder / "tiny.json"
    models = [{"name": "tiny", "model": "/models/tiny", **fields}]
    path.write_text(json.dumps({"models": models, "namespace": "team"}))
    return str(path)


async def test_plan_shows_nodes_devices_and_bytes(
    api: ApiHarness, millrace: CommandLine, tmp_path: Path
) -> None:
    await api.add_node()
    outcome = await millrace("plan", write(tmp_path, replicas=2, priority=7))
    assert outcome.code == 0, outcome.stderr
    assert "team/tiny would be created" in outcome.stdout
    assert outcome.stdout.count("node-1") == 2
    assert "cpu " in outcome.stdout
    as_json = await millrace("plan", write(tmp_path), "-o", "json")
    (planned,) = json.loads(as_json.stdout)["deployments"]
    assert planned["replicas"][0]["devices"][0]["device_id"] == "cpu"
    assert not api.view.deployments.items


async def test_plan_says_why_one_would_wait(api: ApiHarness, millrace: CommandLine, tmp_path: Path) -> None:
    await api.add_node()
    selector = {"node_selector": {"zone": "north"}}
    outcome = await millrace("plan", write(tmp_path, placement=selector))
    assert "1 would have to wait" in outcome.stdout
    assert "1 without the label zone=north" in outcome.stdout
    labelled = await millrace("label", "node-1", "zone=north")
    assert labelled.stdout == "node node-1 labels: zone=north; taints: none\n"
    outcome = await millrace("plan", write(tmp_path, placement=selector))
    assert "would have to wait" not in outcome.stdout


async def test_labels_and_taints_come_and_go(api: ApiHarness, millrace: CommandLine) -> None:
    await api.add_node()
    await millrace("label", "node-1", "zone=north", "disk=nvme")
    outcome = await millrace("label", "node-1", "disk-")
    assert "labels: zone=north;" in outcome.stdout
    outcome = await millrace("taint", "node-1", "dedicated=lab:no_schedule", "maintenance:NoExecute")
    assert outcome.code != 0
    assert "write KEY=VALUE:no_schedule" in outcome.stderr
    await millrace("taint", "node-1", "dedicated=lab:no_schedule", "maintenance:no_execute")
    outcome = await millrace("taint", "node-1", "maintenance-")
    assert outcome.stdout == "node node-1 labels: zone=north; taints: dedicated=lab:no_schedule\n"


async def test_a_wrong_placement_is_named_with_its_path(millrace: CommandLine, tmp_path: Path) -> None:
    wrong = {"node_selectors": {}, "tolerations": [{"value": "x"}], "device_pins": [{"node": "a"}]}
    outcome = await millrace("plan", write(tmp_path, placement=wrong))
    assert outcome.code == 1
    for words in (
        "models[0].placement.node_selectors: unknown field, did you mean `node_selector`?",
        "models[0].placement.tolerations[0]: has to be an object with `key`",
        "models[0].placement.device_pins[0].device_ids: has to be a list of device ids (",
    ):
        assert words in outcome.stderr
