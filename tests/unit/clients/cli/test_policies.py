from pathlib import Path

import pytest
from millrace.core.v1 import types_pb2
from millrace.core.v1.deployment_pb2 import Condition, DeploymentSpec
from millrace_client.cli.apply import changed_fields
from millrace_client.cli.documents import ModelEntry, parse_documents
from millrace_client.errors import InvalidArgument

from tests.support.fake_scheduler import FakeScheduler
from tests.unit.clients.conftest import CommandLine

DOCUMENT = """
namespace: team-ai
models:
  - name: tiny
    model: org/tiny
    rollout: {max_surge: 0, max_unavailable: 1, progress_deadline_seconds: 90.5}
    autoscale:
      min_replicas: 0
      max_replicas: 4
      thresholds: {waiting_requests_out: 5}
      cooldown_in_seconds: 60
      cron_windows:
        - {days: mon-fri, start_time: "08:00", end_time: "18:00", time_zone: Europe/Berlin, replicas: 2}
"""


def entry_of(text: str) -> ModelEntry:
    (document,) = parse_documents(text, source="x.yaml", folder=Path("/folder"))
    return document.models[0]


def test_policies_are_read() -> None:
    declared = entry_of(DOCUMENT).message()
    assert declared.rollout.HasField("max_surge")
    assert declared.rollout.max_unavailable == 1
    assert declared.rollout.progress_deadline.ToTimedelta().total_seconds() == 90.5
    policy = declared.autoscale
    assert policy.HasField("min_replicas")
    assert (policy.max_replicas, policy.thresholds.waiting_requests_out) == (4, 5)
    assert policy.cooldown_in.seconds == 60
    assert policy.cron_windows[0].time_zone == "Europe/Berlin"
    bare = entry_of("models: [{name: x, model: m}]").message()
    assert not bare.HasField("autoscale")
    assert not bare.HasField("rollout")


@pytest.mark.parametrize(
    ("policy", "problem"),
    [
        ("rollout: 3", "models[0].rollout: has to be an object"),
        ("rollout: {surge: 1}", "models[0].rollout.surge: unknown field, did you mean `max_surge`?"),
        ("rollout: {max_surge: yes}", "models[0].rollout.max_surge: has to be a whole number"),
        ("rollout: {drain_timeout: 5}", "did you mean `drain_timeout_seconds`?"),
        ("rollout: {drain_timeout_seconds: soon}", "has to be a number of seconds"),
        ("autoscale: {max_replicas: 2.5}", "models[0].autoscale.max_replicas: has to be a whole number"),
        ("autoscale: {cron_windows: {}}", "models[0].autoscale.cron_windows: has to be an array"),
        ("autoscale: {cron_windows: [{days: 1}]}", "cron_windows[0].days: has to be a text"),
        ("autoscale: {thresholds: {kv_usage_in_ratio: a}}", "kv_usage_in_ratio: has to be a number, not `a`"),
    ],
)
def test_mistakes_are_named(policy: str, problem: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        entry_of(f"models: [{{name: x, model: m, {policy}}}]")
    assert problem in refused.value.message


def test_only_what_differs_is_changed() -> None:
    entry = entry_of(DOCUMENT)
    wanted, _ = changed_fields(DeploymentSpec(), entry)
    assert changed_fields(wanted, entry)[1] == []
    without = entry_of("models: [{name: tiny, model: org/tiny}]")
    assert changed_fields(wanted, without)[1] == ["rollout", "autoscale"]


async def test_a_policy_is_declared_and_described(millrace: CommandLine, scheduler: FakeScheduler) -> None:
    outcome = await millrace("apply", "-f", "-", stdin=DOCUMENT)
    assert outcome.code == 0, outcome.stderr
    deployment = scheduler.deployments["team-ai", "tiny"]
    assert deployment.spec.autoscale.max_replicas == 4
    deployment.status.autoscale.desired_replicas = 3
    deployment.status.autoscale.floor_replicas = 2
    deployment.status.autoscale.reason = "ScaledOut"
    deployment.status.autoscale.message = "2 -> 3: 25 requests wait, 12.5 a replica (more than 10)"
    deployment.status.autoscale.step_time.GetCurrentTime()
    deployment.status.desired_replicas = 3
    scheduler.put(deployment)
    outcome = await millrace("describe", "team-ai/tiny")
    assert "0, 2 at this time to 4" in outcome.stdout
    assert "2 -> 3: 25 requests wait, 12.5 a replica (more than 10)" in outcome.stdout
    assert "3 wanted" in outcome.stdout


async def test_rollout_status_restart_and_undo(millrace: CommandLine, scheduler: FakeScheduler) -> None:
    deployment = scheduler.add("team-ai", "tiny", model="org/new")
    assert "nothing is known of its roll-out" in (await millrace("rollout", "status", "tiny")).stdout
    deployment.status.conditions.append(
        Condition(
            type="Progressing",
            status=types_pb2.CONDITION_STATUS_TRUE,
            reason="RollingOut",
            message="1 of 2 replicas of launch generation 2 serve",
        )
    )
    scheduler.put(deployment)
    outcome = await millrace("rollout", "status", "tiny")
    assert outcome.stdout == "team-ai/tiny: RollingOut: 1 of 2 replicas of launch generation 2 serve\n"

    outcome = await millrace("rollout", "undo", "tiny")
    assert outcome.code == 1
    assert "has no earlier spec that has served" in outcome.stderr
    deployment.status.rollout.previous_spec.model = "org/old"
    scheduler.put(deployment)
    assert (await millrace("rollout", "undo", "tiny")).code == 0
    assert scheduler.deployments["team-ai", "tiny"].spec.model == "org/old"

    scheduler.ready_at_once = True
    assert (await millrace("rollout", "restart", "tiny", "--wait")).code == 0
    assert len(scheduler.requests["RestartDeployment"]) == 1
    assert (await millrace("rollout", "restart", "none")).code == 3


async def test_waiting_ends_when_it_was_rolled_back(millrace: CommandLine, scheduler: FakeScheduler) -> None:
    deployment = scheduler.add("team-ai", "tiny")
    deployment.status.rollout.rolled_back_reason = "its replicas failed 3 times in a row"
    scheduler.put(deployment)
    outcome = await millrace("rollout", "status", "tiny", "--wait")
    assert outcome.code == 1
    assert "it was rolled back: its replicas failed 3 times in a row" in outcome.stderr


async def test_waiting_is_for_the_replicas_of_the_present_spec(
    millrace: CommandLine, scheduler: FakeScheduler
) -> None:
    deployment = scheduler.add("team-ai", "tiny")
    deployment.status.rollout.outdated_replicas = 1
    scheduler.put(deployment)
    outcome = await millrace("rollout", "status", "tiny", "--wait", "--timeout", "0.2")
    assert outcome.code == 1
    assert "not within 0.2 s" in outcome.stderr
