"""A measurement is made of what engine, order and machine say together, and of nothing less."""

import pytest
from millrace.core.v1 import node_pb2, replica_pb2, types_pb2

from controlplane.fleet.calibrations import digest, measure

GIB = 1024**3


def order(*device_ids: str, claim_bytes: int = 40 * GIB) -> replica_pb2.ReplicaAssignment:
    return replica_pb2.ReplicaAssignment(
        namespace="team",
        deployment="chat",
        replica="chat-1",
        node="node-1",
        devices=[replica_pb2.DeviceClaim(device_id=each, memory_bytes=claim_bytes) for each in device_ids],
        launch=replica_pb2.LaunchSpec(
            engine=types_pb2.ENGINE_VLLM,
            model="organisation/model",
            tensor_parallel=len(device_ids),
            max_model_len=8192,
        ),
    )


def report(**facts: int) -> replica_pb2.ReplicaObservation:
    return replica_pb2.ReplicaObservation(
        replica="chat-1",
        node="node-1",
        state=types_pb2.REPLICA_STATE_READY,
        engine_version="0.32.0",
        facts=replica_pb2.EngineFacts(**facts),
    )


def machine(kind: types_pb2.DeviceKind.ValueType) -> node_pb2.NodeInventory:
    return node_pb2.NodeInventory(
        node="node-1",
        devices=[
            node_pb2.Device(id=each, kind=kind, product="NVIDIA A100", memory_bytes=80 * GIB)
            for each in ("a", "b")
        ],
    )


GPUS = machine(types_pb2.DEVICE_KIND_NVIDIA)


def test_on_gpus_the_claim_less_the_cache_is_what_the_engine_took() -> None:
    record = measure(
        order("a", "b"),
        report(weights_bytes=30 * GIB, kv_cache_bytes=44 * GIB, kv_cache_tokens=90_000),
        GPUS,
    )
    assert record is not None
    assert record.weights_bytes == 30 * GIB
    assert record.besides_cache_bytes == 36 * GIB
    assert (record.kv_cache_bytes, record.kv_cache_tokens) == (44 * GIB, 90_000)
    assert (record.tensor_parallel, record.max_model_len) == (2, 8192)


def test_on_a_cpu_share_it_is_what_the_processes_hold() -> None:
    record = measure(
        order("a"), report(resident_bytes=2 * GIB, kv_cache_bytes=GIB), machine(types_pb2.DEVICE_KIND_CPU)
    )
    assert record is not None
    assert record.besides_cache_bytes == 2 * GIB
    assert not record.HasField("kv_cache_tokens")


def test_a_share_that_was_set_by_hand_measures_nothing_but_the_cache() -> None:
    assignment = order("a")
    assignment.launch.extra_args.update({"gpu_memory_utilization": 0.5})
    record = measure(assignment, report(kv_cache_bytes=GIB, kv_cache_tokens=100), GPUS)
    assert record is not None
    assert not record.HasField("besides_cache_bytes")


@pytest.mark.parametrize("device_ids", [(), ("gone",), ("a", "gone")])
def test_devices_that_the_machine_does_not_have_make_no_measurement(device_ids: tuple[str, ...]) -> None:
    assert measure(order(*device_ids), report(weights_bytes=GIB), GPUS) is None


def test_an_engine_that_tells_nothing_makes_no_measurement() -> None:
    assert measure(order("a"), report(), GPUS) is None


def test_each_version_model_device_and_quantization_has_a_record_of_its_own() -> None:
    base = measure(order("a"), report(weights_bytes=GIB), GPUS)
    assert base is not None
    digests = {digest(base)}
    for field, value in {
        "engine_version": "0.33.0",
        "model": "organisation/other",
        "device_product": "NVIDIA L40S",
        "quantization": types_pb2.QUANTIZATION_AWQ,
    }.items():
        other = type(base)()
        other.CopyFrom(base)
        setattr(other, field, value)
        digests.add(digest(other))
    assert len(digests) == 5
    base.weights_bytes = 2 * GIB
    assert digest(base) in digests
