import json
from datetime import UTC, datetime, timedelta

import pytest
import yaml
from millrace.core.v1 import types_pb2
from millrace.core.v1.deployment_pb2 import Condition
from millrace.core.v1.event_pb2 import Event
from millrace.core.v1.node_pb2 import Device, EngineEnvironment, Node
from millrace.scheduler.v1 import scheduler_service_pb2 as messages

from core import errors as server_errors
from tests.support.fake_resources import sizing
from tests.support.fake_scheduler import FakeScheduler
from tests.unit.clients.conftest import CommandLine


@pytest.fixture
def world(scheduler: FakeScheduler) -> FakeScheduler:
    tiny = scheduler.add("team-ai", "tiny", replicas=2)
    tiny.create_time.FromDatetime(datetime.now(UTC) - timedelta(minutes=5, seconds=2))
    tiny.status.phase = types_pb2.DEPLOYMENT_PHASE_DEGRADED
    tiny.status.ready_replicas = 1
    tiny.status.sizing.CopyFrom(sizing())
    tiny.status.conditions.append(
        Condition(
            type="Available",
            status=types_pb2.CONDITION_STATUS_FALSE,
            reason="ReplicaFailed",
            message="1 of 2 replicas serves",
        )
    )
    replica = tiny.status.replicas.add(
        replica="tiny-aaaaaaaaaa",
        node="node-1",
        state=types_pb2.REPLICA_STATE_READY,
        url="http://127.0.0.1:21000",
        engine_start_ms=1234,
        pid=4711,
        device_ids=["cpu"],
    )
    replica.assign_time.GetCurrentTime()
    failure = tiny.status.last_failure
    failure.message, failure.replica, failure.node = (
        "engine ended with exit code 3",
        "tiny-bbbbbbbbbb",
        "node-2",
    )
    failure.consecutive_failures = 2
    failure.log_tail.extend(["Traceback", "ValueError: [bold]no[/bold] such model\x1b]0;title\x07"])
    scheduler.put(tiny)
    scheduler.add("other", "big", model="org/big", engine=types_pb2.ENGINE_VLLM_ASCEND)
    scheduler.nodes["node-1"] = Node(name="node-1")
    scheduler.nodes["node-1"].status.state = types_pb2.NODE_STATE_READY
    scheduler.nodes["node-1"].status.replicas.append("tiny-aaaaaaaaaa")
    spec = scheduler.nodes["node-1"].spec
    spec.labels["zone"] = "north"
    spec.taints.add(key="dedicated", value="research", effect=types_pb2.TAINT_EFFECT_NO_SCHEDULE)
    inventory = scheduler.nodes["node-1"].status.inventory
    inventory.labels.update({"zone": "south", "disk": "nvme"})
    inventory.version = "0.1.0"
    inventory.devices.append(Device(id="cpu", kind=types_pb2.DEVICE_KIND_CPU, memory_bytes=16 * 1024**3))
    inventory.engines.append(EngineEnvironment(engine=types_pb2.ENGINE_SIMULATOR, version="0.1.0"))
    inventory.engines.append(
        EngineEnvironment(engine=types_pb2.ENGINE_VLLM, unavailable_reason="not installed: run make up")
    )
    for number, (namespace, deployment) in enumerate([("team-ai", "tiny"), ("other", "big")]):
        event = Event(
            id=f"0{number}",
            namespace=namespace,
            deployment=deployment,
            severity=types_pb2.EVENT_SEVERITY_WARNING,
            reason="ReplicaFailed",
            message=f"{deployment} failed:\x1b[2J exit code 3",
        )
        event.time.GetCurrentTime()
        scheduler.emit(event)
    return scheduler


async def test_table_of_deployments(millrace: CommandLine, world: FakeScheduler) -> None:
    outcome = await millrace("get")
    header, row = outcome.stdout.splitlines()
    assert header.split() == ["NAME", "MODEL", "ENGINE", "READY", "PHASE", "AGE"]
    assert row.split() == ["tiny", "/models/tiny", "vllm", "1/2", "DEGRADED", "5m"]


async def test_the_phase_tells_of_a_roll_back_and_of_sleep(
    millrace: CommandLine, world: FakeScheduler
) -> None:
    tiny = world.deployments["team-ai", "tiny"]
    tiny.status.conditions.add(type="Progressing", reason="RolledBack")
    assert "DEGRADED, rolled back" in (await millrace("get", "deployment", "tiny")).stdout
    del tiny.status.conditions[:]
    tiny.spec.autoscale.max_replicas = 2
    tiny.status.phase = types_pb2.DEPLOYMENT_PHASE_STOPPED
    assert "STOPPED, asleep" in (await millrace("get", "deployment", "tiny")).stdout
    assert "STOPPED, asleep" in (await millrace("describe", "tiny")).stdout


async def test_all_namespaces_have_a_column(millrace: CommandLine, world: FakeScheduler) -> None:
    outcome = await millrace("get", "deployments", "-A")
    assert [line.split()[:2] for line in outcome.stdout.splitlines()] == [
        ["NAMESPACE", "NAME"],
        ["team-ai", "tiny"],
        ["other", "big"],
    ] or [line.split()[:2] for line in outcome.stdout.splitlines()] == [
        ["NAMESPACE", "NAME"],
        ["other", "big"],
        ["team-ai", "tiny"],
    ]
    assert "vllm-ascend" in outcome.stdout
    assert (await millrace("get", "-A", "-n", "x")).code == 1


async def test_json_has_the_names_of_the_contract(millrace: CommandLine, world: FakeScheduler) -> None:
    data = json.loads((await millrace("get", "-o", "json")).stdout)
    (tiny,) = data["deployments"]
    assert tiny["status"]["ready_replicas"] == 1
    assert tiny["status"]["replicas"][0]["engine_start_ms"] == "1234"
    assert tiny["spec"]["engine"] == "ENGINE_VLLM"
    assert "max_model_len" not in tiny["spec"], "unknown is absent, not 0"
    one = await millrace("-o", "json", "get", "deployment", "other/big")
    assert json.loads(one.stdout)["name"] == "big"
    as_yaml = await millrace("get", "deployment", "tiny", "-o", "yaml")
    assert yaml.safe_load(as_yaml.stdout) == tiny


async def test_single_deployment_and_missing_one(millrace: CommandLine, world: FakeScheduler) -> None:
    assert "tiny" in (await millrace("get", "deployment", "team-ai/tiny")).stdout
    outcome = await millrace("get", "deployment", "none")
    assert (outcome.code, outcome.stdout) == (3, "")
    assert outcome.stderr == (
        "error: deployment team-ai/none does not exist (`millrace get` lists what there is)\n"
    )
    assert (await millrace("get", "deployment")).code == 2


async def test_empty_list_says_the_remedy(millrace: CommandLine) -> None:
    outcome = await millrace("get")
    assert (outcome.code, outcome.stdout) == (0, "")
    assert "millrace apply -f FILE" in outcome.stderr
    assert json.loads((await millrace("get", "-o", "json")).stdout) == {"deployments": []}


@pytest.mark.parametrize("arguments", [("nodes",), ("get", "nodes")])
async def test_table_of_nodes(
    millrace: CommandLine, world: FakeScheduler, arguments: tuple[str, ...]
) -> None:
    outcome = await millrace(*arguments)
    header, row = outcome.stdout.splitlines()
    assert header.split()[:3] == ["NAME", "STATE", "SCHEDULING"]
    assert row.split() == [
        "node-1",
        "READY",
        "open",
        "dedicated=research:no_schedule",
        "1x",
        "CPU",
        "16.0",
        "GiB",
        "simulator",
        "1",
        "-",
        "0.1.0",
    ]


async def test_one_node_says_why_an_engine_cannot_be_started(
    millrace: CommandLine, world: FakeScheduler
) -> None:
    outcome = await millrace("nodes", "get", "node-1")
    assert "not installed: run make up" in outcome.stdout
    assert "Labels: disk=nvme,zone=north" in outcome.stdout
    data = json.loads((await millrace("nodes", "get", "node-1", "-o", "json")).stdout)
    assert data["status"]["state"] == "NODE_STATE_READY"
    assert (await millrace("nodes", "get", "none")).code == 3


async def test_describe_tells_the_why(millrace: CommandLine, world: FakeScheduler) -> None:
    outcome = await millrace("describe", "tiny")
    assert outcome.code == 0
    text = outcome.stdout
    for expected in (
        "2 wanted, 1 ready",
        "1,000,000 parameters x 2 bytes",
        "ReplicaFailed",
        "1 of 2 replicas serves",
        "4711",
        "http://127.0.0.1:21000",
        "1234 ms",
        "engine ended with exit code 3",
        "ValueError: [bold]no[/bold] such model",
        "1 of 2 nodes can take one more replica",
        "needs 5.0 GiB, 1.0 GiB is free",
        "tiny failed: exit code 3",
    ):
        assert expected in text
    assert "\x1b" not in text
    assert "big failed" not in text


async def test_describe_survives_the_loss_of_a_part(millrace: CommandLine, world: FakeScheduler) -> None:
    world.fail_next("ExplainDeployment", server_errors.FailedPrecondition("no leader"))
    outcome = await millrace("describe", "tiny", "-o", "json")
    data = json.loads(outcome.stdout)
    assert data["explanation"] is None
    assert data["missing"] == {"explanation": "no leader"}
    assert data["deployment"]["name"] == "tiny"
    assert data["events"][0]["reason"] == "ReplicaFailed"


async def test_events_as_table_and_as_lines(millrace: CommandLine, world: FakeScheduler) -> None:
    table = (await millrace("events")).stdout
    assert "tiny failed: exit code 3" in table
    assert "big failed" not in table
    assert "\x1b" not in table
    lines = (await millrace("events", "-A", "-o", "json")).stdout.splitlines()
    assert [json.loads(line)["deployment"] for line in lines] == ["tiny", "big"]
    assert "big failed" in (await millrace("get", "events", "other/big")).stdout


async def test_logs_of_all_and_of_one_replica(millrace: CommandLine, world: FakeScheduler) -> None:
    world.log_lines["team-ai", "tiny"] = [
        messages.StreamDeploymentLogsResponse(
            replica="tiny-aaaaaaaaaa", node="node-1", line="\x1b[32mINFO\x1b[0m up"
        ),
        messages.StreamDeploymentLogsResponse(replica="tiny-cccccccccc", node="node-1", line="other"),
    ]
    assert (await millrace("logs", "tiny")).stdout == "aaaaaaaaaa | INFO up\ncccccccccc | other\n"
    assert (await millrace("logs", "tiny", "--replica", "aaaaaaaaaa")).stdout == "INFO up\n"
    assert (await millrace("logs", "tiny", "--tail", "1")).stdout == "cccccccccc | other\n"
    lines = (await millrace("logs", "tiny", "-o", "json")).stdout.splitlines()
    assert json.loads(lines[1]) == {"replica": "tiny-cccccccccc", "node": "node-1", "line": "other"}
    missing = await millrace("logs", "tiny", "--replica", "zzz")
    assert missing.code == 3
    assert "there are: tiny-aaaaaaaaaa" in missing.stderr


async def test_version_never_fails(millrace: CommandLine, world: FakeScheduler) -> None:
    assert "node    node-1: agent 0.1.0" in (await millrace("version")).stdout
    outcome = await millrace("version", "--server", "127.0.0.1:1", "-o", "json")
    assert outcome.code == 0
    data = json.loads(outcome.stdout)
    assert data["client"]
    assert not data["server"]["reachable"]
    assert "connection refused" in data["server"]["error"]
