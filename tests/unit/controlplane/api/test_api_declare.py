"""Declaring: every bad input is named, all or nothing is written, retries are safe."""

import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from millrace.core.v1 import types_pb2
from millrace.scheduler.v1 import scheduler_service_pb2 as messages
from millrace.state.v1 import records_pb2

from core.errors import AlreadyExists, FailedPrecondition, InvalidArgument
from core.identity import hash_secret
from core.store import keys
from tests.support.api_harness import ApiHarness, declared, running_api, struct

SIMULATOR = types_pb2.ENGINE_SIMULATOR


@pytest_asyncio.fixture
async def api() -> AsyncIterator[ApiHarness]:
    async with running_api() as harness:
        yield harness


def request_of(*models: messages.DeclaredModel, **more: Any) -> messages.DeclareDeploymentsRequest:
    return messages.DeclareDeploymentsRequest(models=models, **more)


BAD_INPUT: list[tuple[str, messages.DeclareDeploymentsRequest, str, str]] = [
    ("nothing", request_of(), "models", "at least one model"),
    ("too many", request_of(*[declared(f"m{i}") for i in range(101)]), "models", "at most 100"),
    ("empty name", request_of(declared("")), "models[0].name", "is empty"),
    ("upper case", request_of(declared("Qwen")), "models[0].name", "lower-case"),
    ("slash", request_of(declared("a/b")), "models[0].name", "lower-case"),
    ("long name", request_of(declared("a" * 64)), "models[0].name", "63"),
    (
        "duplicate",
        request_of(declared("a"), declared("a")),
        "models[1].name",
        "already the name of models[0]",
    ),
    ("no model", request_of(declared("a", model="")), "models[0].model", "is empty"),
    ("home path", request_of(declared("a", model="~/m")), "models[0].model", "not expanded"),
    ("relative", request_of(declared("a", model="./m")), "models[0].model", "give an absolute path"),
    ("two slashes", request_of(declared("a", model="a/b/c")), "models[0].model", "Hugging Face id"),
    ("gone", request_of(declared("a", model="/none")), "models[0].model", "does not exist"),
    ("unknown engine", request_of(declared("a", engine=77)), "models[0].engine", "no engine"),
    (
        "known engine",
        request_of(declared("a", engine=types_pb2.ENGINE_TGI)),
        "models[0].engine",
        "engine `tgi` is known but this release cannot start it; use one of `vllm`, `external`, `simulator`",
    ),
    ("quantization", request_of(declared("a", quantization=9)), "models[0].quantization", "`awq`"),
    ("zero context", request_of(declared("a", max_model_len=0)), "models[0].max_model_len", "out of range"),
    (
        "absurd context",
        request_of(declared("a", max_model_len=2_000_000_000)),
        "models[0].max_model_len",
        "out of range",
    ),
    (
        "context beyond the model",
        request_of(declared("a", max_model_len=4096)),
        "models[0].max_model_len",
        "more than the model takes",
    ),
    ("negative replicas", request_of(declared("a", replicas=-1)), "models[0].replicas", "0 to 1000"),
    ("absurd replicas", request_of(declared("a", replicas=1001)), "models[0].replicas", "0 to 1000"),
    (
        "too many arguments",
        request_of(declared("a", extra_args={f"k{i}": 1 for i in range(65)})),
        "models[0].extra_args",
        "at most 64",
    ),
    (
        "large arguments",
        request_of(declared("a", extra_args={"k": "x" * 70_000})),
        "models[0].extra_args",
        "bytes as JSON",
    ),
    (
        "dashes",
        request_of(declared("a", extra_args={"--max": 1})),
        "models[0].extra_args",
        "without leading dashes",
    ),
    (
        "platform's own",
        request_of(declared("a", extra_args={"port": 1})),
        "models[0].extra_args.port",
        "set by Millrace",
    ),
    ("metadata", request_of(declared("a"), metadata=struct({"k": "x" * 20_000})), "metadata", "16384"),
    ("namespace", request_of(declared("a"), namespace="Team AI"), "namespace", "lower-case"),
    ("reserved", request_of(declared("a"), namespace="millrace-x"), "namespace", "reserved"),
    ("request id", request_of(declared("a"), request_id="7"), "request_id", "UUID"),
    (
        "external without urls",
        request_of(declared("a", engine=types_pb2.ENGINE_EXTERNAL)),
        "models[0].extra_args.urls",
        "needs the URLs",
    ),
    (
        "external with a password",
        request_of(declared("a", engine=types_pb2.ENGINE_EXTERNAL, extra_args={"urls": ["http://u:p@h:1"]})),
        "models[0].extra_args.urls[0]",
        "password",
    ),
    (
        "external with another number of replicas",
        request_of(
            declared("a", engine=types_pb2.ENGINE_EXTERNAL, replicas=3, extra_args={"urls": ["http://h:1"]})
        ),
        "models[0].replicas",
        "one replica a URL",
    ),
]


@pytest.mark.parametrize(
    ("request_", "field", "part"), [row[1:] for row in BAD_INPUT], ids=[row[0] for row in BAD_INPUT]
)
async def test_bad_input_names_the_field_and_writes_nothing(
    api: ApiHarness, request_: messages.DeclareDeploymentsRequest, field: str, part: str
) -> None:
    error = await api.refusal("DeclareDeployments", request_)
    assert isinstance(error, InvalidArgument)
    assert [each.field for each in error.violations] == [field]
    assert part in error.violations[0].description
    assert not (await api.store.list(keys.ROOT + "spec/")).items


async def test_all_violations_come_at_once(api: ApiHarness) -> None:
    error = await api.refusal(
        "DeclareDeployments",
        request_of(declared("B", replicas=-1), declared("a", engine=types_pb2.ENGINE_OLLAMA), namespace="-"),
    )
    assert isinstance(error, InvalidArgument)
    assert {each.field for each in error.violations} == {
        "namespace",
        "models[0].name",
        "models[0].replicas",
        "models[1].engine",
    }


async def test_all_missing_models_come_at_once(api: ApiHarness) -> None:
    error = await api.refusal(
        "DeclareDeployments", request_of(declared("a", model="/x"), declared("b"), declared("c", model="/y"))
    )
    assert isinstance(error, InvalidArgument)
    assert [each.field for each in error.violations] == ["models[0].model", "models[2].model"]
    assert error.reason == "ERROR_REASON_MODEL_NOT_FOUND"


async def test_model_that_no_node_could_hold_is_refused_with_numbers(api: ApiHarness) -> None:
    await api.add_node(memory_bytes=8 << 30)
    error = await api.refusal(
        "DeclareDeployments", request_of(declared("a"), declared("b", model="/models/huge"))
    )
    assert isinstance(error, FailedPrecondition)
    assert error.reason == "ERROR_REASON_MODEL_DOES_NOT_FIT"
    assert error.metadata["field"] == "models[1].model"
    assert int(error.metadata["needed_bytes"]) > int(error.metadata["largest_bytes"])
    assert not (await api.store.list(keys.SPEC_DEPLOYMENTS)).items


async def test_without_nodes_nothing_is_too_large(api: ApiHarness) -> None:
    answer = await api.call("DeclareDeployments", request_of(declared("b", model="/models/huge")))
    assert answer.deployments[0].sizing.weights_bytes > 100 << 30


async def test_declaration_is_stored_with_defaults_and_hashed_key(api: ApiHarness) -> None:
    answer = await api.call(
        "DeclareDeployments",
        request_of(declared("tiny"), namespace="team-ai", metadata=struct({"userId": "user-001"})),
    )
    (entry,) = answer.deployments
    assert answer.namespace == "team-ai"
    assert entry.endpoint == "http://127.0.0.1:8080/v1"
    assert entry.watch_url == "ws://127.0.0.1:7601/v1/deployments/team-ai/tiny/watch"
    assert entry.api_key.startswith("sk-")
    assert entry.deployment.status.phase == types_pb2.DEPLOYMENT_PHASE_PENDING
    stored = await api.store.get(keys.spec_deployment("team-ai", "tiny"))
    assert stored is not None
    record = records_pb2.DeploymentRecord.FromString(stored.value)
    assert entry.deployment.etag == str(stored.mod_revision)
    assert record.spec.engine == types_pb2.ENGINE_VLLM
    assert record.spec.quantization == types_pb2.QUANTIZATION_NONE
    assert record.spec.replicas == 1
    assert not record.spec.HasField("max_model_len")
    assert record.sizing.max_model_len == 2048
    assert record.metadata.fields["userId"].string_value == "user-001"
    (key,) = (await api.store.list(keys.SPEC_KEYS)).items
    assert key.key == keys.spec_key(hash_secret(entry.api_key))
    assert entry.api_key.encode() not in key.value


async def test_external_has_one_replica_a_url(api: ApiHarness) -> None:
    arguments = {"urls": ["http://h:1", "http://h:2"], "served_model_name": "x"}
    answer = await api.call(
        "DeclareDeployments",
        request_of(declared("e", engine=types_pb2.ENGINE_EXTERNAL, extra_args=arguments)),
    )
    assert answer.deployments[0].deployment.spec.replicas == 2
    assert answer.deployments[0].deployment.status.desired_replicas == 2


async def test_namespace_is_generated(api: ApiHarness) -> None:
    first, second = await api.declare("a", namespace=""), await api.declare("a", namespace="")
    assert first.namespace.startswith("ns-")
    assert len(first.namespace) == len("ns-") + 8
    assert first.namespace != second.namespace


async def test_taken_name_writes_none_of_the_others(api: ApiHarness) -> None:
    await api.declare("taken")
    error = await api.refusal(
        "DeclareDeployments",
        request_of(declared("new", engine=SIMULATOR), declared("taken", engine=SIMULATOR), namespace="team"),
    )
    assert isinstance(error, AlreadyExists)
    assert error.metadata["field"] == "models[1].name"
    assert len((await api.store.list(keys.SPEC_DEPLOYMENTS)).items) == 1
    assert len((await api.store.list(keys.SPEC_KEYS)).items) == 1


async def test_validate_only_sizes_and_changes_nothing(api: ApiHarness) -> None:
    answer = await api.call("DeclareDeployments", request_of(declared("a"), validate_only=True))
    assert answer.deployments[0].sizing.total_bytes > 0
    assert answer.deployments[0].api_key == ""
    assert not (await api.store.list(keys.ROOT + "spec/")).items


@pytest.mark.parametrize("count", [2, 100])
async def test_retry_answers_the_same_with_fresh_keys(api: ApiHarness, count: int) -> None:
    request_id = str(uuid.uuid4())
    request = request_of(*[declared(f"m{i}", engine=SIMULATOR) for i in range(count)], request_id=request_id)
    first = await api.call("DeclareDeployments", request)
    second = await api.call("DeclareDeployments", request)
    assert second.namespace == first.namespace
    assert [each.deployment.uid for each in second.deployments] == [
        each.deployment.uid for each in first.deployments
    ]
    assert [each.deployment.generation for each in second.deployments] == [1] * count
    kept = {item.key for item in (await api.store.list(keys.SPEC_KEYS)).items}
    assert kept == {keys.spec_key(hash_secret(each.api_key)) for each in second.deployments}


@pytest.mark.parametrize("change", ["replicas", "name", "namespace"])
async def test_request_id_of_another_declaration_is_refused(api: ApiHarness, change: str) -> None:
    request_id = str(uuid.uuid4())
    await api.declare("a", request_id=request_id)
    other = request_of(
        declared(
            "b" if change == "name" else "a",
            engine=SIMULATOR,
            model="any",
            replicas=2 if change == "replicas" else 1,
        ),
        namespace="other" if change == "namespace" else "team",
        request_id=request_id,
    )
    error = await api.refusal("DeclareDeployments", other)
    assert isinstance(error, InvalidArgument)
    assert error.violations[0].field == "request_id"
    assert len((await api.store.list(keys.SPEC_DEPLOYMENTS)).items) == 1


async def test_declaration_is_an_event(api: ApiHarness) -> None:
    await api.declare("a")
    await api.events.drained()
    call = api.stub.WatchEvents(
        messages.WatchEventsRequest(namespace="team", deployment="a"),
        metadata=(("authorization", f"Bearer {api.token}"),),
    )
    seen = [message async for message in call]
    assert [message.event.reason for message in seen[:-1]] == ["Declared"]
    assert seen[-1].snapshot_end
