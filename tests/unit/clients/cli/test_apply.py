import asyncio
import json
from pathlib import Path

from millrace.core.v1 import types_pb2
from millrace.core.v1.deployment_pb2 import Condition, Deployment

from core import errors as server_errors
from tests.support.fake_scheduler import FakeScheduler
from tests.support.waiting import eventually
from tests.unit.clients.conftest import CommandLine

TINY = '{"models": [{"name": "tiny", "model": "/models/tiny"}]}'


def write(text: str, name: str = "x.json") -> str:
    Path(name).write_text(text)
    return name


async def test_created_prints_endpoint_and_key_once(millrace: CommandLine, scheduler: FakeScheduler) -> None:
    outcome = await millrace("apply", "-f", write(TINY))
    assert outcome.code == 0
    assert outcome.stderr == ""
    assert outcome.stdout.splitlines()[0] == "team-ai/tiny created"
    assert "endpoint  http://127.0.0.1:8080/v1" in outcome.stdout
    assert "api key   sk-" in outcome.stdout
    assert "shown once" in outcome.stdout

    again = await millrace("apply", "-f", "x.json")
    assert (again.code, again.stdout) == (0, "team-ai/tiny unchanged\n")
    assert scheduler.requests["UpdateDeployment"] == []


async def test_only_what_differs_is_configured(millrace: CommandLine, scheduler: FakeScheduler) -> None:
    scheduler.add("team-ai", "tiny", replicas=3)
    text = TINY.replace("}", ', "max_model_len": 4096, "extra_args": {"a": 1}}', 1)
    outcome = await millrace("apply", "-f", write(text))
    assert outcome.stdout == "team-ai/tiny configured\n  changed: max_model_len, extra_args\n"
    stored = scheduler.deployments["team-ai", "tiny"]
    assert (stored.spec.max_model_len, stored.spec.replicas, stored.generation) == (4096, 3, 2)
    assert (await millrace("apply", "-f", "x.json")).stdout == "team-ai/tiny unchanged\n"
    # What the file takes back is cleared, replicas excepted.
    outcome = await millrace("apply", "-f", write(TINY))
    assert "changed: max_model_len, extra_args" in outcome.stdout
    stored = scheduler.deployments["team-ai", "tiny"]
    assert not stored.spec.HasField("max_model_len")
    assert stored.spec.replicas == 3


async def test_conflicts_are_read_again_and_bounded(millrace: CommandLine, scheduler: FakeScheduler) -> None:
    scheduler.add("team-ai", "tiny")
    text = '{"models": [{"name": "tiny", "model": "/models/other"}]}'
    scheduler.fail_next("UpdateDeployment", server_errors.Conflict("etag"), server_errors.Conflict("etag"))
    assert (await millrace("apply", "-f", write(text))).code == 0
    assert scheduler.deployments["team-ai", "tiny"].spec.model == "/models/other"
    scheduler.fail_next("UpdateDeployment", *[server_errors.Conflict("etag moved")] * 3)
    outcome = await millrace("apply", "-f", write(TINY))
    assert outcome.code == 1
    assert outcome.stderr == "error: etag moved (it changed meanwhile: run the command again)\n"


async def test_new_and_existing_in_several_files_and_stdin(
    millrace: CommandLine, scheduler: FakeScheduler
) -> None:
    scheduler.add("team-ai", "tiny")
    yaml = "namespace: other\nmodels:\n  - {name: b, model: org/b}\n  - {name: c, model: org/c}\n"
    outcome = await millrace("apply", "-f", write(TINY), "-f", write(yaml, "y.yaml"), "-f", "-", "-o", "json",
                             stdin='{"models": [{"name": "d", "model": "./d"}]}')  # fmt: skip
    data = json.loads(outcome.stdout)["deployments"]
    assert [(each["namespace"], each["name"], each["result"]) for each in data] == [
        ("team-ai", "tiny", "unchanged"),
        ("other", "b", "created"),
        ("other", "c", "created"),
        ("team-ai", "d", "created"),
    ]
    assert data[1]["api_key"].startswith("sk-")
    assert data[3]["deployment"]["spec"]["model"] == str(Path.cwd() / "d")
    assert len(scheduler.requests["DeclareDeployments"]) == 2


async def test_nothing_is_declared_when_one_file_is_wrong(
    millrace: CommandLine, scheduler: FakeScheduler
) -> None:
    outcome = await millrace("apply", "-f", write(TINY), "-f", write('{"models": [{"nam": 1}]}', "y.json"))
    assert outcome.code == 1
    assert outcome.stderr.startswith("error: y.json: models[0].nam: unknown field, did you mean `name`?")
    assert outcome.stderr.count("\n") == 1
    assert scheduler.deployments == {}


async def test_namespaces_that_contradict_each_other(millrace: CommandLine) -> None:
    outcome = await millrace(
        "apply", "-n", "a", "-f", write('{"namespace": "b", "models": [{"name": "x", "model": "m"}]}')
    )
    assert outcome.code == 1
    assert "is for namespace b, and -n says a" in outcome.stderr


async def test_dry_run_sizes_and_changes_nothing(millrace: CommandLine, scheduler: FakeScheduler) -> None:
    outcome = await millrace("apply", "--dry-run", "-f", write(TINY))
    assert outcome.code == 0
    assert "team-ai/tiny created (dry run: nothing was changed)" in outcome.stdout
    assert "sk-" not in outcome.stdout
    assert "kv_cache  1.0 GiB" in outcome.stdout
    assert "total     5.0 GiB" in outcome.stdout
    assert scheduler.deployments == {}


async def test_server_errors_name_the_field(millrace: CommandLine) -> None:
    outcome = await millrace("apply", "-f", write('{"models": [{"name": "x", "model": "/models/none"}]}'))
    assert outcome.code == 1
    assert outcome.stderr == "error: x.json: models[0].model: there is no such directory\n"


async def test_wait_ends_when_ready(millrace: CommandLine, scheduler: FakeScheduler) -> None:
    run = asyncio.create_task(millrace("apply", "--wait", "-f", write(TINY)))
    await eventually(lambda: scheduler.watching == 1)
    deployment = Deployment()
    deployment.CopyFrom(scheduler.deployments["team-ai", "tiny"])
    deployment.status.observed_generation = 1
    deployment.status.desired_replicas = 1
    deployment.status.phase = types_pb2.DEPLOYMENT_PHASE_STARTING
    deployment.status.replicas.add(
        replica="tiny-a", state=types_pb2.REPLICA_STATE_STARTING, message="loading weights"
    )
    scheduler.put(deployment)
    deployment.status.phase = types_pb2.DEPLOYMENT_PHASE_READY
    deployment.status.ready_replicas = 1
    scheduler.put(deployment)
    outcome = await run
    assert outcome.code == 0
    assert outcome.stdout.splitlines()[-1] == "team-ai/tiny is ready"
    assert "team-ai/tiny  STARTING  0/1  starting: loading weights" in outcome.stderr
    assert "team-ai/tiny  READY  1/1" in outcome.stderr


async def test_wait_ends_with_the_failure_and_its_log(
    millrace: CommandLine, scheduler: FakeScheduler
) -> None:
    run = asyncio.create_task(millrace("apply", "--wait", "-o", "json", "-f", write(TINY)))
    await eventually(lambda: scheduler.watching == 1)
    deployment = scheduler.deployments["team-ai", "tiny"]
    deployment.status.observed_generation = 1
    deployment.status.phase = types_pb2.DEPLOYMENT_PHASE_FAILED
    deployment.status.last_failure.message = "engine ended with exit code 3"
    deployment.status.last_failure.log_tail.extend(["Traceback", "\x1b[31mValueError: no such model\x1b[0m"])
    scheduler.put(deployment)
    outcome = await run
    assert outcome.code == 1
    assert outcome.stderr.endswith(
        "last lines of team-ai/tiny's log:\n  Traceback\n  ValueError: no such model\n"
        "error: team-ai/tiny did not become ready: engine ended with exit code 3\n"
    )
    # The key of what was created is not lost.
    assert json.loads(outcome.stdout)["deployments"][0]["api_key"].startswith("sk-")


async def test_wait_ignores_what_an_older_generation_did(
    millrace: CommandLine, scheduler: FakeScheduler
) -> None:
    stale = scheduler.add("team-ai", "tiny", model="/models/old")
    stale.status.phase = types_pb2.DEPLOYMENT_PHASE_FAILED
    scheduler.put(stale)
    run = asyncio.create_task(millrace("apply", "--wait", "-f", write(TINY)))
    await eventually(lambda: scheduler.watching == 1)
    deployment = scheduler.deployments["team-ai", "tiny"]
    deployment.status.observed_generation = 2
    deployment.status.phase = types_pb2.DEPLOYMENT_PHASE_READY
    scheduler.put(deployment)
    assert (await run).code == 0


async def test_wait_has_a_limit_and_says_what_is_missing(
    millrace: CommandLine, scheduler: FakeScheduler
) -> None:
    deployment = scheduler.add("team-ai", "tiny")
    deployment.status.phase = types_pb2.DEPLOYMENT_PHASE_UNSCHEDULABLE
    deployment.status.ready_replicas = 0
    deployment.status.conditions.append(
        Condition(type="Scheduled", status=types_pb2.CONDITION_STATUS_FALSE, message="0 of 2 nodes: memory")
    )
    scheduler.put(deployment)
    outcome = await millrace("apply", "--wait", "--timeout", "0.3", "-f", write(TINY))
    assert outcome.code == 1
    assert outcome.stderr.splitlines()[-1] == (
        "error: team-ai/tiny did not become ready: not within 0.3 s: UNSCHEDULABLE, 0/1 ready, "
        "0 of 2 nodes: memory"
    )


async def test_wait_ends_when_it_is_deleted(millrace: CommandLine, scheduler: FakeScheduler) -> None:
    run = asyncio.create_task(millrace("apply", "--wait", "-f", write(TINY)))
    await eventually(lambda: scheduler.watching == 1)
    scheduler.remove(("team-ai", "tiny"))
    outcome = await run
    assert outcome.code == 1
    assert "it was deleted meanwhile" in outcome.stderr


async def test_changed_metadata_is_noted(millrace: CommandLine) -> None:
    text = '{"metadata": {"team": %s}, "models": [{"name": "tiny", "model": "m"}]}'
    await millrace("apply", "-f", write(text % 1))
    assert (await millrace("apply", "-f", "x.json")).stdout == "team-ai/tiny unchanged\n"
    outcome = await millrace("apply", "-f", write(text % 2))
    assert outcome.stdout.startswith("team-ai/tiny unchanged\n  the metadata differs")
