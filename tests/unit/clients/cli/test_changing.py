import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from millrace.core.v1 import types_pb2
from millrace.core.v1.node_pb2 import Node
from millrace_client.cli import local

from core import errors as server_errors
from tests.support.fake_scheduler import ADMIN_TOKEN, VIEWER_TOKEN, FakeScheduler
from tests.support.waiting import eventually
from tests.unit.clients.conftest import CommandLine


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(f"{ADMIN_TOKEN}\n")
    return path


async def test_scale(millrace: CommandLine, scheduler: FakeScheduler) -> None:
    scheduler.add("team-ai", "tiny")
    outcome = await millrace("scale", "tiny", "--replicas", "3")
    assert (outcome.code, outcome.stdout) == (0, "team-ai/tiny scaled to 3\n")
    assert scheduler.deployments["team-ai", "tiny"].spec.replicas == 3
    assert "autoscaler" not in outcome.stderr
    scheduler.deployments["team-ai", "tiny"].spec.autoscale.max_replicas = 4
    assert "autoscaler goes on from there" in (await millrace("scale", "tiny", "--replicas", "2")).stderr
    scheduler.deployments["team-ai", "tiny"].spec.ClearField("autoscale")
    scheduler.ready_at_once = True
    outcome = await millrace("scale", "team-ai/tiny", "--replicas", "0", "--wait", "-o", "json")
    assert json.loads(outcome.stdout)["status"]["phase"] == "DEPLOYMENT_PHASE_STOPPED"
    assert (await millrace("scale", "none", "--replicas", "1")).code == 3
    assert (await millrace("scale", "tiny", "--replicas", "1001")).code == 2


async def test_delete_is_idempotent_when_asked(millrace: CommandLine, scheduler: FakeScheduler) -> None:
    scheduler.add("team-ai", "tiny")
    assert (await millrace("delete", "tiny")).stdout == "team-ai/tiny deleted\n"
    assert scheduler.deployments == {}
    assert (await millrace("delete", "tiny")).code == 3
    outcome = await millrace("delete", "tiny", "--ignore-not-found", "-o", "json")
    assert outcome.code == 0
    assert json.loads(outcome.stdout)["result"] == "absent"


async def test_delete_waits_until_no_node_holds_a_replica(
    millrace: CommandLine, scheduler: FakeScheduler
) -> None:
    tiny = scheduler.add("team-ai", "tiny")
    tiny.status.replicas.add(replica="tiny-a", state=types_pb2.REPLICA_STATE_READY)
    scheduler.put(tiny)
    scheduler.nodes["node-1"] = Node(name="node-1")
    scheduler.nodes["node-1"].status.replicas.append("tiny-a")
    outcome = await millrace("delete", "tiny", "--wait", "--timeout", "0.2")
    assert outcome.code == 5
    assert "replicas still run: tiny-a" in outcome.stderr
    scheduler.put(tiny)
    run = asyncio.create_task(millrace("delete", "tiny", "--wait"))
    await eventually(lambda: len(scheduler.requests["ListNodes"]) >= 2)
    assert not run.done()
    del scheduler.nodes["node-1"].status.replicas[:]
    assert (await run).stdout == "team-ai/tiny deleted\n"


async def test_delete_asks_a_person(millrace: CommandLine, scheduler: FakeScheduler) -> None:
    scheduler.add("team-ai", "tiny")
    outcome = await millrace("delete", "tiny", stdin="n\n", terminal=True)
    assert outcome.code == 1
    assert "Delete team-ai/tiny and its keys?" in outcome.stderr
    assert ("team-ai", "tiny") in scheduler.deployments
    assert (await millrace("delete", "tiny", "--yes", terminal=True)).code == 0
    scheduler.add("team-ai", "tiny")
    assert (await millrace("delete", "tiny", stdin="y\n", terminal=True)).code == 0
    assert scheduler.deployments == {}


async def test_nodes_are_operated_at_the_top_and_in_the_group(
    millrace: CommandLine, scheduler: FakeScheduler
) -> None:
    scheduler.nodes["node-1"] = Node(name="node-1")
    tiny = scheduler.add("team-ai", "tiny")
    tiny.status.replicas.add(replica="tiny-a", node="node-1")
    scheduler.put(tiny)
    assert (await millrace("cordon", "node-1")).stdout == "node node-1 is cordoned\n"
    assert scheduler.nodes["node-1"].spec.cordoned
    assert (await millrace("drain", "node-1")).stdout == "node node-1 is draining\n  team-ai/tiny moves\n"
    assert "draining" in (await millrace("nodes")).stdout
    outcome = await millrace("nodes", "-o", "json", "uncordon", "node-1")
    assert json.loads(outcome.stdout)["spec"]["cordoned"] is False
    assert (await millrace("nodes", "drain", "none")).code == 3


async def test_refused_credentials_have_their_code(
    millrace: CommandLine, scheduler: FakeScheduler, monkeypatch: pytest.MonkeyPatch, token_file: Path
) -> None:
    scheduler.add("team-ai", "tiny")
    monkeypatch.setenv("MILLRACE_TOKEN", "wrong-token")
    outcome = await millrace("get")
    assert outcome.code == 4
    assert outcome.stderr == (
        "error: the credential is not known: the control plane takes its admin token; API keys, which begin "
        "with sk-, are for the router (give --token-file FILE or set MILLRACE_TOKEN)\n"
    )
    monkeypatch.setenv("MILLRACE_TOKEN", VIEWER_TOKEN)
    assert (await millrace("get")).code == 0
    outcome = await millrace("delete", "tiny")
    assert outcome.code == 4
    assert "role viewer may not call" in outcome.stderr
    assert (await millrace("delete", "tiny", "--token-file", str(token_file))).code == 0


async def test_unreachable_has_its_code(millrace: CommandLine, scheduler: FakeScheduler) -> None:
    outcome = await millrace("get", "--server", "127.0.0.1:1")
    assert outcome.code == 5
    assert outcome.stderr.startswith(
        "error: cannot reach the control plane at 127.0.0.1:1: connection refused"
    )
    assert outcome.stderr.count("\n") == 1
    scheduler.hanging.add("ListDeployments")
    outcome = await millrace("get", "--timeout", "0.1")
    assert outcome.code == 5
    assert "--timeout" in outcome.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("bogus",), "No such command 'bogus'"),
        (("get", "bogus"), "'bogus' is not one of"),
        (("scale", "tiny"), "Missing option '--replicas'"),
        (("get", "--bogus"), "No such option: --bogus"),
        (("logs", "tiny", "--tail", "0"), "--tail"),
    ],
)
async def test_usage_errors_are_one_line(
    millrace: CommandLine, arguments: tuple[str, ...], expected: str
) -> None:
    outcome = await millrace(*arguments)
    assert outcome.code == 2
    assert outcome.stderr.startswith("error: ")
    assert expected in outcome.stderr
    assert "--help`)" in outcome.stderr
    assert outcome.stderr.count("\n") == 1


async def test_names_that_contradict_the_namespace(millrace: CommandLine, scheduler: FakeScheduler) -> None:
    scheduler.add("other", "tiny")
    assert (await millrace("scale", "other/tiny", "--replicas", "1")).code == 0
    assert "contradict" in (await millrace("scale", "other/tiny", "-n", "x", "--replicas", "1")).stderr
    assert (await millrace("scale", "a/b/c", "--replicas", "1")).code == 1
    assert (await millrace("-n", "other", "scale", "tiny", "--replicas", "1")).code == 0


async def test_traceback_only_with_debug(millrace: CommandLine, scheduler: FakeScheduler) -> None:
    scheduler.fail_next("ListDeployments", server_errors.FailedPrecondition("not now"))
    outcome = await millrace("get")
    assert (outcome.code, outcome.stderr) == (1, "error: not now\n")
    scheduler.fail_next("ListDeployments", server_errors.FailedPrecondition("not now"))
    with pytest.raises(Exception, match="not now"):
        await millrace("get", "--debug")


async def test_up_without_the_server_distribution_says_so(
    millrace: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "PROGRAM", "millrace-local-that-is-not-there")
    outcome = await millrace("up", "--engine", "simulator")
    assert outcome.code == 2
    assert "install the `millrace` distribution" in outcome.stderr


def test_up_passes_everything_through(tmp_path: Path) -> None:
    program = tmp_path / "millrace-local-of-the-test"
    program.write_text('#!/bin/sh\necho "$@"\n')
    program.chmod(0o755)
    script = (
        f"import sys; from millrace_client.cli import execute, local; local.PROGRAM = {program.name!r}; "
        "sys.exit(execute(sys.argv[1:]))"
    )
    finished = subprocess.run(
        [sys.executable, "-c", script, "up", "--engine", "simulator", "--help", "x"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    assert (finished.returncode, finished.stdout) == (0, "up --engine simulator --help x\n")
