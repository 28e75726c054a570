"""Namespaces and routing: what is stored, what is refused and how, versions and pages."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from millrace.core.v1 import deployment_pb2, policy_pb2
from millrace.scheduler.v1 import scheduler_service_pb2 as messages
from millrace.state.v1 import records_pb2

from controlplane.api.routing import check_routing
from controlplane.api.violations import Violations
from core.errors import Conflict, InvalidArgument, PermissionDenied
from core.store import keys
from tests.support.api_harness import VIEWER_TOKEN, ApiHarness, running_api


@pytest_asyncio.fixture
async def api() -> AsyncIterator[ApiHarness]:
    async with running_api() as harness:
        yield harness


def _alias(name: str, **shares: int) -> policy_pb2.ModelAlias:
    targets = [policy_pb2.AliasTarget(deployment=each, weight=weight) for each, weight in shares.items()]
    return policy_pb2.ModelAlias(name=name, targets=targets)


def _update(*aliases: policy_pb2.ModelAlias, **more: Any) -> messages.UpdateNamespaceRequest:
    quota = more.pop("quota", None)
    spec = policy_pb2.NamespaceSpec(aliases=aliases, quota=quota)
    return messages.UpdateNamespaceRequest(name=more.pop("name", "team"), spec=spec, **more)


async def test_one_of_which_nothing_was_said_is_empty(api: ApiHarness) -> None:
    found = (await api.call("GetNamespace", messages.GetNamespaceRequest(name="team"))).namespace
    assert found == policy_pb2.Namespace(name="team", spec=policy_pb2.NamespaceSpec(), etag="0")
    error = await api.refusal("GetNamespace", messages.GetNamespaceRequest(name="No Such"))
    assert isinstance(error, InvalidArgument)


async def test_quota_and_aliases_are_stored_apart(api: ApiHarness) -> None:
    await api.declare("old", "new")
    first = (
        await api.call("UpdateNamespace", _update(_alias("org/chat", old=80, new=20), etag="0"))
    ).namespace
    assert [each.name for each in first.spec.aliases] == ["org/chat"]
    second = await api.call("UpdateNamespace", _update(quota=policy_pb2.Quota(devices=4)))
    assert second.namespace.spec.quota.devices == 4
    assert len(second.namespace.spec.aliases) == 1
    item = await api.store.get(keys.spec_namespace("team"))
    assert item is not None
    record = records_pb2.NamespaceRecord.FromString(item.value)
    assert (record.namespace, record.spec) == ("team", second.namespace.spec)
    assert isinstance(await api.refusal("UpdateNamespace", _update(etag=first.etag)), Conflict)
    mask = FieldMask(paths=["*"])
    cleared = (await api.call("UpdateNamespace", _update(update_mask=mask))).namespace
    assert cleared.spec == policy_pb2.NamespaceSpec()
    assert isinstance(await api.refusal("UpdateNamespace", _update(), token=VIEWER_TOKEN), PermissionDenied)


async def test_a_dry_run_and_no_change_write_nothing(api: ApiHarness) -> None:
    quota = policy_pb2.Quota(replicas=2)
    dry = await api.call("UpdateNamespace", _update(quota=quota, validate_only=True))
    assert dry.namespace.spec.quota.replicas == 2
    assert await api.store.get(keys.spec_namespace("team")) is None
    first = (await api.call("UpdateNamespace", _update(quota=quota))).namespace
    assert (await api.call("UpdateNamespace", _update(quota=quota))).namespace.etag == first.etag


async def test_pages_of_namespaces(api: ApiHarness) -> None:
    for name in ("a", "b", "c"):
        await api.call("UpdateNamespace", _update(name=name, quota=policy_pb2.Quota(replicas=1)))
    first = await api.call("ListNamespaces", messages.ListNamespacesRequest(page_size=2))
    token = first.next_page_token
    second = await api.call("ListNamespaces", messages.ListNamespacesRequest(page_size=2, page_token=token))
    assert [each.name for each in (*first.namespaces, *second.namespaces)] == ["a", "b", "c"]
    assert second.next_page_token == ""


@pytest.mark.parametrize(
    ("request_message", "field", "remedy"),
    [
        (_update(_alias("chat", none=1)), "aliases[0].targets[0].deployment", "declare it first"),
        (_update(_alias("chat")), "aliases[0].targets", "give 1 to"),
        (_update(_alias("one", one=1)), "aliases[0].name", "choose another name"),
        (_update(_alias("no spaces", one=1)), "aliases[0].name", "use letters"),
        (_update(_alias("x", one=1), _alias("x", one=1)), "aliases[1].name", "already aliases[0]"),
        (_update(_alias("x", one=-1)), "aliases[0].targets[0].weight", "give 0 to"),
        (_update(quota=policy_pb2.Quota(devices=-1)), "quota.devices", "give 0 to"),
        (_update(name="millrace-x"), "name", "reserved"),
        (_update(update_mask=FieldMask(paths=["labels"])), "update_mask", "quota, aliases"),
        (_update(request_id="x"), "request_id", "UUID"),
    ],
)
async def test_wrong_fields_are_named_with_the_remedy(
    api: ApiHarness, request_message: messages.UpdateNamespaceRequest, field: str, remedy: str
) -> None:
    await api.declare("one")
    error = await api.refusal("UpdateNamespace", request_message)
    assert isinstance(error, InvalidArgument)
    (violation,) = error.violations
    assert violation.field == field
    assert remedy in violation.description


def _violations(routing: policy_pb2.Routing) -> dict[str, str]:
    violations = Violations()
    check_routing(routing, "routing", violations)
    return {each.field: each.description for each in violations.found}


@pytest.mark.parametrize(
    "strategy", ["", "default", "prefix=3,kv=2.5,load=2", "full-cache-guard, least-cost"]
)
def test_a_good_routing(strategy: str) -> None:
    routing = policy_pb2.Routing(
        strategy=strategy,
        circuit_breaker=policy_pb2.CircuitBreaker(consecutive_failures=3, ejection=Duration(seconds=5)),
        stream_continuation=True,
        fallback_deployment="small",
        queue_requests_max=0,
        queue_timeout=Duration(seconds=10),
    )
    assert _violations(routing) == {}


def test_a_wrong_routing() -> None:
    routing = policy_pb2.Routing(
        strategy="prefix=,KV",
        circuit_breaker=policy_pb2.CircuitBreaker(consecutive_failures=0, ejection=Duration(seconds=-1)),
        fallback_deployment=" small",
        queue_requests_max=-1,
        queue_timeout=Duration(seconds=10**12),
    )
    assert set(_violations(routing)) == {
        "routing.strategy",
        "routing.circuit_breaker.consecutive_failures",
        "routing.circuit_breaker.ejection_seconds",
        "routing.fallback_deployment",
        "routing.queue_requests_max",
        "routing.queue_timeout_seconds",
    }


async def test_routing_changes_in_place(api: ApiHarness) -> None:
    declared = (await api.declare("one")).deployments[0].deployment
    spec = deployment_pb2.DeploymentSpec(routing=policy_pb2.Routing(strategy="random"))
    request = messages.UpdateDeploymentRequest(namespace="team", name="one", spec=spec)
    changed = (await api.call("UpdateDeployment", request)).deployment
    assert changed.spec.routing.strategy == "random"
    assert changed.generation == declared.generation + 1
    item = await api.store.get(keys.spec_deployment("team", "one"))
    assert item is not None
    assert records_pb2.DeploymentRecord.FromString(item.value).launch_generation == 1
    request.spec.routing.strategy = "no good"
    error = await api.refusal("UpdateDeployment", request)
    assert isinstance(error, InvalidArgument)
    assert error.violations[0].field == "spec.routing.strategy"
