"""Policies of roll-outs and autoscaling: what is refused and how, and what changes in place."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from millrace.core.v1 import deployment_pb2, policy_pb2, types_pb2
from millrace.scheduler.v1 import scheduler_service_pb2 as messages
from millrace.state.v1 import records_pb2

from controlplane.api.lifecycle import check_lifecycle
from controlplane.api.violations import Violations
from core.errors import InvalidArgument, NotFound
from core.store import keys
from tests.support.api_harness import ApiHarness, running_api

Spec = deployment_pb2.DeploymentSpec
Window = policy_pb2.CronWindow
OFFICE: dict[str, Any] = {
    "days": "mon-fri",
    "start_time": "08:00",
    "end_time": "18:00",
    "time_zone": "Europe/Berlin",
    "replicas": 2,
}


def autoscale(**changes: Any) -> policy_pb2.Autoscale:
    return policy_pb2.Autoscale(**{"max_replicas": 4, **changes})


def thresholds(**values: Any) -> policy_pb2.Autoscale:
    return autoscale(thresholds=policy_pb2.AutoscaleThresholds(**values))


def window(**changes: Any) -> policy_pb2.Autoscale:
    return autoscale(cron_windows=[Window(**{**OFFICE, **changes})])


def violations_of(spec: Spec) -> dict[str, str]:
    violations = Violations()
    check_lifecycle(spec, "spec.", violations)
    return {each.field: each.description for each in violations.found}


@pytest.mark.parametrize(
    "policy",
    [
        autoscale(),
        autoscale(min_replicas=0),
        autoscale(min_replicas=4, cooldown_out=Duration(seconds=0)),
        thresholds(utilization_out_ratio=0.9, utilization_in_ratio=0.0),
        window(),
        window(days="*", replicas=0, warm_up=Duration(seconds=1800), time_zone="UTC"),
    ],
)
def test_policies_that_can_be_kept_to(policy: policy_pb2.Autoscale) -> None:
    assert not violations_of(Spec(autoscale=policy))


@pytest.mark.parametrize(
    ("policy", "field", "why"),
    [
        (autoscale(max_replicas=0), "max_replicas", "0 is out of range; give 1 to 1000"),
        (autoscale(max_replicas=1001), "max_replicas", "give 1 to 1000"),
        (autoscale(min_replicas=5), "min_replicas", "5 is not between 0 and max_replicas, 4"),
        (autoscale(min_replicas=-1), "min_replicas", "-1 is not between"),
        (autoscale(cooldown_out=Duration(seconds=-1)), "cooldown_out_seconds", "-1 s is out of range"),
        (autoscale(cooldown_in=Duration(seconds=86401)), "cooldown_in_seconds", "give 0 to 86400 seconds"),
        (autoscale(idle_timeout=Duration(seconds=10**15)), "idle_timeout_seconds", "is no time"),
        (thresholds(utilization_out_ratio=1.5), "thresholds.utilization_out_ratio", "give 0 to 1"),
        (thresholds(kv_usage_in_ratio=float("nan")), "thresholds.kv_usage_in_ratio", "nan is out of range"),
        (
            thresholds(utilization_in_ratio=0.8),
            "thresholds.utilization_out_ratio",
            "0.8 is not above utilization_in_ratio, 0.8; replicas would come and go for ever",
        ),
        (thresholds(first_token_p99_out_ms=400), "thresholds.first_token_p99_out_ms", "not above"),
        (thresholds(waiting_requests_out=0), "thresholds.waiting_requests_out", "give more than 0"),
        (window(days="monday"), "cron_windows[0].days", "`monday` is no day"),
        (window(start_time="8:00"), "cron_windows[0].start_time", "write it as HH:MM"),
        (window(end_time="25:00"), "cron_windows[0].end_time", "write it as HH:MM"),
        (window(time_zone="Europe/Nowhere"), "cron_windows[0].time_zone", "is no IANA time zone"),
        (window(time_zone=""), "cron_windows[0].time_zone", "is no IANA time zone"),
        (window(time_zone="../../etc/passwd"), "cron_windows[0].time_zone", "is no IANA time zone"),
        (window(time_zone="Europe"), "cron_windows[0].time_zone", "is no IANA time zone"),
        (window(replicas=5), "cron_windows[0].replicas", "5 is not between 0 and max_replicas, 4"),
        (autoscale(cron_windows=[Window(**OFFICE)] * 101), "cron_windows", "at most 100 are taken"),
    ],
)
def test_policies_that_cannot(policy: policy_pb2.Autoscale, field: str, why: str) -> None:
    found = violations_of(Spec(autoscale=policy))
    assert why in found[f"spec.autoscale.{field}"]


def test_everything_that_is_wrong_is_told_at_once() -> None:
    policy = window(days="x", time_zone="y")
    policy.min_replicas = 9
    assert len(violations_of(Spec(autoscale=policy))) == 3


@pytest.mark.parametrize(
    ("rollout", "field"),
    [
        (policy_pb2.Rollout(max_surge=-1), "max_surge"),
        (policy_pb2.Rollout(max_unavailable=1001), "max_unavailable"),
        (policy_pb2.Rollout(max_surge=0, max_unavailable=0), "max_unavailable"),
        (policy_pb2.Rollout(progress_deadline=Duration(seconds=9)), "progress_deadline_seconds"),
        (policy_pb2.Rollout(drain_timeout=Duration(seconds=-1)), "drain_timeout_seconds"),
    ],
)
def test_rollouts_that_cannot(rollout: policy_pb2.Rollout, field: str) -> None:
    assert list(violations_of(Spec(rollout=rollout))) == [f"spec.rollout.{field}"]


def test_an_external_deployment_is_not_scaled() -> None:
    spec = Spec(engine=types_pb2.ENGINE_EXTERNAL, autoscale=autoscale())
    assert "one replica a URL" in violations_of(spec)["spec.autoscale"]


@pytest_asyncio.fixture
async def api() -> AsyncIterator[ApiHarness]:
    async with running_api() as harness:
        yield harness


async def record_of(api: ApiHarness, name: str) -> records_pb2.DeploymentRecord:
    item = await api.store.get(keys.spec_deployment("team", name))
    assert item is not None
    return records_pb2.DeploymentRecord.FromString(item.value)


@pytest.mark.parametrize(
    "change",
    [
        Spec(priority=9),
        Spec(rollout=policy_pb2.Rollout(max_surge=2)),
        Spec(autoscale=autoscale()),
        Spec(routing=policy_pb2.Routing(strategy="least-load")),
    ],
)
async def test_what_engines_do_not_depend_on_changes_in_place(api: ApiHarness, change: Spec) -> None:
    await api.declare("a")
    request = messages.UpdateDeploymentRequest(namespace="team", name="a", spec=change)
    answer = await api.call("UpdateDeployment", request)
    record = await record_of(api, "a")
    assert (answer.deployment.generation, record.launch_generation) == (2, 1)


async def test_a_restart_is_a_new_launch_of_the_same_spec(api: ApiHarness) -> None:
    await api.declare("a")
    before = await record_of(api, "a")
    request = messages.RestartDeploymentRequest(namespace="team", name="a", validate_only=True)
    await api.call("RestartDeployment", request)
    assert await record_of(api, "a") == before
    request.validate_only = False
    answer = await api.call("RestartDeployment", request)
    after = await record_of(api, "a")
    assert answer.deployment.generation == after.generation == 2
    assert after.launch_generation == 2
    assert (after.spec, after.sizing) == (before.spec, before.sizing)
    request.name = "none"
    assert isinstance(await api.refusal("RestartDeployment", request), NotFound)


async def test_an_update_names_the_field_of_a_policy(api: ApiHarness) -> None:
    await api.declare("a")
    request = messages.UpdateDeploymentRequest(
        namespace="team", name="a", spec=Spec(autoscale=window(time_zone="x")),
        update_mask=FieldMask(paths=["autoscale"]),
    )  # fmt: skip
    error = await api.refusal("UpdateDeployment", request)
    assert isinstance(error, InvalidArgument)
    assert error.violations[0].field == "spec.autoscale.cron_windows[0].time_zone"
