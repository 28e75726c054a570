"""Reading and changing deployments: masks, generations, etags, pages, retries."""

import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from google.protobuf.field_mask_pb2 import FieldMask
from millrace.core.v1 import deployment_pb2, types_pb2
from millrace.scheduler.v1 import scheduler_service_pb2 as messages
from millrace.state.v1 import records_pb2

from core.errors import Conflict, FailedPrecondition, InvalidArgument, NotFound, OutOfRange, Unavailable
from core.store import keys
from tests.support.api_harness import ApiHarness, declared, running_api, struct

Spec = deployment_pb2.DeploymentSpec


@pytest_asyncio.fixture
async def api() -> AsyncIterator[ApiHarness]:
    async with running_api() as harness:
        yield harness


async def record_of(api: ApiHarness, name: str) -> records_pb2.DeploymentRecord:
    item = await api.store.get(keys.spec_deployment("team", name))
    assert item is not None
    return records_pb2.DeploymentRecord.FromString(item.value)


def update(name: str, spec: Spec, *paths: str, **more: Any) -> messages.UpdateDeploymentRequest:
    request = messages.UpdateDeploymentRequest(namespace="team", name=name, spec=spec, **more)
    if paths:
        request.update_mask.CopyFrom(FieldMask(paths=paths))
    return request


async def test_reads_what_it_wrote(api: ApiHarness) -> None:
    await api.declare("a")
    answer = await api.call("GetDeployment", messages.GetDeploymentRequest(namespace="team", name="a"))
    assert answer.deployment.spec.model == "any"
    scaled = await api.call(
        "ScaleDeployment", messages.ScaleDeploymentRequest(namespace="team", name="a", replicas=3)
    )
    answer = await api.call("GetDeployment", messages.GetDeploymentRequest(namespace="team", name="a"))
    assert answer.deployment == scaled.deployment
    assert answer.deployment.spec.replicas == 3


async def test_absent_mask_changes_the_populated_fields(api: ApiHarness) -> None:
    await api.declare("a")
    answer = await api.call("UpdateDeployment", update("a", Spec(max_model_len=128, replicas=0)))
    spec = answer.deployment.spec
    assert (spec.model, spec.max_model_len, spec.replicas) == ("any", 128, 0)


async def test_mask_takes_only_what_it_names_and_clears_what_is_unset(api: ApiHarness) -> None:
    await api.declare("a")
    await api.call("UpdateDeployment", update("a", Spec(max_model_len=128, replicas=4)))
    answer = await api.call(
        "UpdateDeployment", update("a", Spec(model="ignored"), "max_model_len", "replicas")
    )
    spec = answer.deployment.spec
    assert spec.model == "any"
    assert not spec.HasField("max_model_len")
    assert spec.replicas == 1


async def test_star_replaces_everything(api: ApiHarness) -> None:
    await api.declare("a")
    await api.call("UpdateDeployment", update("a", Spec(extra_args=struct({"seed": 1}))))
    new = Spec(model="other", engine=types_pb2.ENGINE_SIMULATOR)
    answer = await api.call("UpdateDeployment", update("a", new, "*"))
    assert answer.deployment.spec.model == "other"
    assert not answer.deployment.spec.extra_args.fields


async def test_unknown_mask_path_is_refused(api: ApiHarness) -> None:
    await api.declare("a")
    error = await api.refusal("UpdateDeployment", update("a", Spec(), "replica"))
    assert isinstance(error, InvalidArgument)
    assert error.violations[0].field == "update_mask"
    assert "replicas" in error.message


async def test_generations_tell_scaling_from_new_engines(api: ApiHarness) -> None:
    await api.declare("a")
    await api.call("ScaleDeployment", messages.ScaleDeploymentRequest(namespace="team", name="a", replicas=2))
    record = await record_of(api, "a")
    assert (record.generation, record.launch_generation) == (2, 1)
    await api.call("UpdateDeployment", update("a", Spec(max_model_len=64)))
    record = await record_of(api, "a")
    assert (record.generation, record.launch_generation) == (3, 2)
    assert record.sizing.max_model_len == 64


async def test_change_to_the_same_changes_nothing(api: ApiHarness) -> None:
    first = await api.declare("a")
    answer = await api.call("UpdateDeployment", update("a", Spec(model="any")))
    assert answer.deployment.etag == first.deployments[0].deployment.etag
    assert (await record_of(api, "a")).generation == 1


async def test_update_is_sized_and_refused_when_it_cannot_fit(api: ApiHarness) -> None:
    await api.add_node(memory_bytes=8 << 30)
    await api.declare("a")
    error = await api.refusal(
        "UpdateDeployment", update("a", Spec(model="/models/huge", engine=types_pb2.ENGINE_VLLM))
    )
    assert isinstance(error, FailedPrecondition)
    assert error.metadata["field"] == "spec.model"
    assert (await record_of(api, "a")).generation == 1


async def test_update_to_a_wrong_value_names_the_field(api: ApiHarness) -> None:
    await api.declare("a")
    error = await api.refusal("UpdateDeployment", update("a", Spec(replicas=1001)))
    assert isinstance(error, InvalidArgument)
    assert error.violations[0].field == "spec.replicas"


async def test_replicas_of_an_external_deployment_follow_its_urls(api: ApiHarness) -> None:
    one = declared("e", engine=types_pb2.ENGINE_EXTERNAL, extra_args={"urls": ["http://h:1"]})
    await api.call("DeclareDeployments", messages.DeclareDeploymentsRequest(models=[one], namespace="team"))
    two = Spec(extra_args=struct({"urls": ["http://h:1", "http://h:2"]}))
    answer = await api.call("UpdateDeployment", update("e", two))
    assert answer.deployment.spec.replicas == 2


async def test_etag_mismatch_is_aborted_with_both(api: ApiHarness) -> None:
    await api.declare("a")
    for method, request in (
        ("UpdateDeployment", update("a", Spec(replicas=2), etag="1")),
        (
            "ScaleDeployment",
            messages.ScaleDeploymentRequest(namespace="team", name="a", replicas=2, etag="1"),
        ),
        ("DeleteDeployment", messages.DeleteDeploymentRequest(namespace="team", name="a", etag="1")),
    ):
        error = await api.refusal(method, request)
        assert isinstance(error, Conflict)
        assert error.reason == "ERROR_REASON_ETAG_MISMATCH"
        assert error.metadata["etag"] == "1"
    assert (await record_of(api, "a")).spec.replicas == 1


async def test_delete_takes_the_keys_along(api: ApiHarness) -> None:
    await api.declare("a", "b")
    await api.call("DeleteDeployment", messages.DeleteDeploymentRequest(namespace="team", name="a"))
    (key,) = (await api.store.list(keys.SPEC_KEYS)).items
    assert records_pb2.ApiKeyRecord.FromString(key.value).deployment == "b"
    error = await api.refusal("GetDeployment", messages.GetDeploymentRequest(namespace="team", name="a"))
    assert isinstance(error, NotFound)
    assert error.metadata == {"namespace": "team", "deployment": "a"}


async def test_validate_only_changes_nothing(api: ApiHarness) -> None:
    await api.declare("a")
    before = (await api.store.list(keys.ROOT + "spec/")).items
    answer = await api.call("UpdateDeployment", update("a", Spec(replicas=7), validate_only=True))
    assert answer.deployment.spec.replicas == 7
    await api.call(
        "ScaleDeployment",
        messages.ScaleDeploymentRequest(namespace="team", name="a", replicas=7, validate_only=True),
    )
    await api.call(
        "DeleteDeployment", messages.DeleteDeploymentRequest(namespace="team", name="a", validate_only=True)
    )
    assert (await api.store.list(keys.ROOT + "spec/")).items == before


async def test_retries_with_one_request_id_act_once(api: ApiHarness) -> None:
    await api.declare("a")
    request_id = str(uuid.uuid4())
    delete = messages.DeleteDeploymentRequest(namespace="team", name="a", request_id=request_id)
    await api.call("DeleteDeployment", delete)
    await api.call("DeleteDeployment", delete)
    error = await api.refusal(
        "DeleteDeployment",
        messages.DeleteDeploymentRequest(namespace="team", name="b", request_id=request_id),
    )
    assert isinstance(error, InvalidArgument)


async def test_pages_are_one_snapshot(api: ApiHarness) -> None:
    await api.declare(*[f"m{index}" for index in range(5)])
    request = messages.ListDeploymentsRequest(namespace="team", page_size=2)
    first = await api.call("ListDeployments", request)
    await api.call("DeleteDeployment", messages.DeleteDeploymentRequest(namespace="team", name="m3"))
    await api.declare("m9")
    names, page = [each.name for each in first.deployments], first
    while page.next_page_token:
        request.page_token = page.next_page_token
        page = await api.call("ListDeployments", request)
        names += [each.name for each in page.deployments]
    assert names == ["m0", "m1", "m2", "m3", "m4"]


async def test_page_of_a_compacted_snapshot_is_out_of_range(api: ApiHarness) -> None:
    await api.declare("a", "b", "c")
    request = messages.ListDeploymentsRequest(page_size=1)
    page = await api.call("ListDeployments", request)
    scaled = await api.declare("d")
    await api.store.compact(int(scaled.deployments[0].deployment.etag))
    request.page_token = page.next_page_token
    assert isinstance(await api.refusal("ListDeployments", request), OutOfRange)


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (messages.ListDeploymentsRequest(page_size=-1), "page_size"),
        (messages.ListDeploymentsRequest(page_token="x"), "page_token"),
        (messages.ListDeploymentsRequest(page_token="W10"), "page_token"),
    ],
)
async def test_bad_pages_are_refused(
    api: ApiHarness, request_: messages.ListDeploymentsRequest, field: str
) -> None:
    error = await api.refusal("ListDeployments", request_)
    assert isinstance(error, InvalidArgument)
    assert error.violations[0].field == field


async def test_token_of_another_listing_is_refused(api: ApiHarness) -> None:
    await api.declare("a", "b")
    page = await api.call("ListDeployments", messages.ListDeploymentsRequest(namespace="team", page_size=1))
    other = messages.ListDeploymentsRequest(namespace="other", page_token=page.next_page_token)
    assert isinstance(await api.refusal("ListDeployments", other), InvalidArgument)


async def test_without_the_store_reads_stand_and_writes_are_unavailable(api: ApiHarness) -> None:
    await api.declare("a")
    api.store.set_available(False)
    await api.call("GetDeployment", messages.GetDeploymentRequest(namespace="team", name="a"))
    error = await api.refusal("UpdateDeployment", update("a", Spec(replicas=2)))
    assert isinstance(error, Unavailable)
    assert error.reason == "ERROR_REASON_STORE_UNAVAILABLE"
    api.store.set_available(True)


async def test_explain_tells_every_node(api: ApiHarness) -> None:
    await api.declare("a")
    await api.add_node("node-1")
    await api.add_node("node-2", memory_bytes=1)
    answer = await api.call(
        "ExplainDeployment", messages.ExplainDeploymentRequest(namespace="team", name="a")
    )
    assert {each.node: each.fits for each in answer.nodes} == {"node-1": True, "node-2": False}
    assert answer.summary
    assert answer.sizing.total_bytes == 64 << 20


async def test_explain_tells_what_the_engine_would_be_started_from(api: ApiHarness) -> None:
    await api.add_node("node-1")
    await api.call(
        "DeclareDeployments",
        messages.DeclareDeploymentsRequest(models=[declared("a")], namespace="team"),
    )
    await api.add_node("node-2", memory_bytes=1)
    answer = await api.call(
        "ExplainDeployment", messages.ExplainDeploymentRequest(namespace="team", name="a")
    )
    fits, refused = answer.nodes
    assert fits.message == "one more replica fits, in environment cpu"
    assert "environment" not in refused.message
