"""The matrix of engines and hardware: which row suits, and what an operator's file may say."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from millrace.core.v1 import node_pb2, replica_pb2, types_pb2
from millrace.state.v1 import records_pb2

from controlplane.knowledge import load_environments
from controlplane.reconciler.translate import translate
from controlplane.reconciler.view import View
from controlplane.scheduler import Claim, Place, Plan
from core.states import DeviceKind, Engine
from core.store import keys

NOW = datetime(2030, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("product", "family", "arguments"),
    [
        ("Tesla T4", "cuda-12.4", {"dtype": "half"}),
        ("NVIDIA A100-SXM4-80GB", "cuda-12.4", {}),
        ("NVIDIA H100 80GB HBM3", "cuda-12.8", {}),
        ("NVIDIA B200", "cuda-13", {}),
    ],
)
def test_hardware_chooses_the_family(product: str, family: str, arguments: dict[str, str]) -> None:
    row = load_environments().find(Engine.VLLM, DeviceKind.NVIDIA, product)
    assert row is not None
    assert (row.family, dict(row.arguments)) == (family, arguments)


def test_unknown_hardware_is_not_guessed() -> None:
    assert load_environments().find(Engine.VLLM, DeviceKind.NVIDIA, "Some GPU of next year") is None
    ascend = load_environments().find(Engine.VLLM_ASCEND, DeviceKind.UNSPECIFIED, "Ascend 910B3")
    assert ascend is not None
    assert ascend.family == "cann-8"


def test_an_operator_s_rows_come_first(tmp_path: Path) -> None:
    own = tmp_path / "own.json"
    own.write_text('{"environments": [{"engine": "vllm", "products": ["Tesla T4"], "family": "ours"}]}')
    row = load_environments(own).find(Engine.VLLM, DeviceKind.NVIDIA, "Tesla T4")
    assert row is not None
    assert row.family == "ours"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", "environments: Field required"),
        ('{"environments": [{"engine": "vlm", "family": "x"}]}', "environments.0.engine"),
        ('{"environments": [{"engine": "vllm", "family": "x", "imagee": 1}]}', "environments.0.imagee"),
    ],
)
def test_a_wrong_file_is_named_with_the_field(tmp_path: Path, text: str, words: str) -> None:
    own = tmp_path / "own.json"
    own.write_text(text)
    with pytest.raises(ValueError, match=r"own\.json: ") as caught:
        load_environments(own)
    assert words in str(caught.value)


@pytest.mark.parametrize(("said", "expected"), [({}, "half"), ({"dtype": "float"}, "float")])
def test_the_launch_has_what_the_hardware_asks_for(said: dict[str, str], expected: str) -> None:
    record = records_pb2.DeploymentRecord(namespace="team", name="qwen", uid="u", generation=1)
    record.spec.engine = types_pb2.ENGINE_VLLM
    record.spec.extra_args.update(said)
    device = node_pb2.Device(id="gpu-0", kind=types_pb2.DEVICE_KIND_NVIDIA, product="Tesla T4")
    node = records_pb2.NodeObservationRecord(inventory=node_pb2.NodeInventory(node="a", devices=[device]))
    view = View(
        deployments={keys.spec_deployment("team", "qwen"): record}, nodes={keys.actual_node("a"): node}
    )
    place = Place("qwen-1", "team/qwen", "a", (Claim("gpu-0", 1),), "why")
    (transaction,) = translate(
        Plan(place=(place,)), view, now=NOW, fencing_token=1, environments=load_environments()
    )
    written = transaction.operations[0]
    assert hasattr(written, "value")
    launch = replica_pb2.ReplicaAssignment.FromString(written.value).launch
    assert launch.image_family == "cuda-12.4"
    assert launch.extra_args.fields["dtype"].string_value == expected
    assert dict(record.spec.extra_args.items()) == said, "the spec is never edited"


def test_an_operator_s_image_stands_in_the_launch_and_in_what_users_read(tmp_path: Path) -> None:
    own = tmp_path / "own.json"
    row = {
        "engine": "vllm",
        "family": "cuda-12.4",
        "image": "registry.local/vllm:cu124",
        "arguments": {"a": 1},
    }
    own.write_text(json.dumps({"environments": [row]}))
    found = load_environments(own).find(Engine.VLLM, DeviceKind.NVIDIA, "Tesla T4")
    assert found is not None
    assert found.image == "registry.local/vllm:cu124"
    assert found.words(()) == "environment cuda-12.4 (image registry.local/vllm:cu124) with a=1"
    assert found.words(["a"]) == "environment cuda-12.4 (image registry.local/vllm:cu124)"


@pytest.mark.parametrize("image", ["vllm", "two words:1"])
def test_an_image_without_a_version_is_refused(tmp_path: Path, image: str) -> None:
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"environments": [{"engine": "vllm", "family": "f", "image": image}]}))
    with pytest.raises(ValueError, match=r"environments\.0\.image"):
        load_environments(own)
