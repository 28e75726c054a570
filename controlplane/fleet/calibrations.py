"""Keeps what engines were measured to need, so that the next sizing is right.

In come reports of replicas that have just become ready, out goes one record for each engine version, model,
kind of device and quantization: the last measurement. What is stored is what was measured, never a
correction: a difference would turn wrong with the formula that it corrects. Nothing is decided here.
"""

import hashlib

import structlog
from millrace.core.v1 import node_pb2, replica_pb2, types_pb2
from millrace.state.v1 import records_pb2

from core.clock import Clock, to_timestamp
from core.store import Mirror, Put, Store, StoreError, keys

_log = structlog.get_logger(__name__)

# With one of these the engine does not take what it claimed, so that its claim measures nothing.
_OWN_SHARE_ARGUMENTS = frozenset(
    {"gpu_memory_utilization", "gpu-memory-utilization", "kv_cache_memory_bytes", "kv-cache-memory-bytes"}
)


class CalibrationWriter:
    """The one writer of `actual/calibrations`."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        *,
        plans: Mirror[replica_pb2.ReplicaAssignment],
        nodes: Mirror[records_pb2.NodeObservationRecord],
    ) -> None:
        self._store = store
        self._clock = clock
        self._plans = plans
        self._nodes = nodes

    async def note(self, observation: replica_pb2.ReplicaObservation) -> None:
        """Stores the measurement of a replica that has become ready; does nothing for any other.

        A measurement that cannot be stored is logged and dropped: the next start brings another.
        """
        if observation.state != types_pb2.REPLICA_STATE_READY:
            return
        assignment = self._plans.get(
            keys.plan_replica(observation.namespace, observation.deployment, observation.replica)
        )
        machine = self._nodes.get(keys.actual_node(observation.node))
        if assignment is None or machine is None:
            return
        record = measure(assignment, observation, machine.inventory)
        if record is None:
            return
        record.measure_time.CopyFrom(to_timestamp(self._clock.now()))
        key = keys.actual_calibration(digest(record))
        try:
            await self._store.commit([Put(key, record.SerializeToString(deterministic=True))])
        except StoreError as error:
            _log.warning("measurement not stored", replica=observation.replica, error=str(error))


def measure(
    assignment: replica_pb2.ReplicaAssignment,
    observation: replica_pb2.ReplicaObservation,
    inventory: node_pb2.NodeInventory,
) -> records_pb2.CalibrationRecord | None:
    """Makes a record of what a replica took; None where its engine told nothing that sizing could use."""
    launch, facts = assignment.launch, observation.facts
    devices = {device.id: device for device in inventory.devices}
    claimed = [devices[claim.device_id] for claim in assignment.devices if claim.device_id in devices]
    if not claimed or len(claimed) != len(assignment.devices) or not observation.engine_version:
        return None
    record = records_pb2.CalibrationRecord(
        engine=launch.engine,
        engine_version=observation.engine_version,
        model=launch.model,
        device_product=claimed[0].product,
        quantization=launch.quantization,
        tensor_parallel=max(1, launch.tensor_parallel),
        max_model_len=facts.max_model_len or launch.max_model_len,
        replica=observation.replica,
    )
    if facts.HasField("weights_bytes"):
        record.weights_bytes = facts.weights_bytes
    if facts.HasField("kv_cache_bytes") and facts.HasField("kv_cache_tokens"):
        record.kv_cache_bytes = facts.kv_cache_bytes
        record.kv_cache_tokens = facts.kv_cache_tokens
    besides = _besides_cache(assignment, facts, claimed[0])
    if besides is not None:
        record.besides_cache_bytes = besides
    told = any(record.HasField(each) for each in ("weights_bytes", "besides_cache_bytes", "kv_cache_bytes"))
    return record if told else None


def _besides_cache(
    assignment: replica_pb2.ReplicaAssignment, facts: replica_pb2.EngineFacts, device: node_pb2.Device
) -> int | None:
    """Everything but the cache, over all devices.

    On a CPU share it is what the processes hold right after the start, when the cache has not been touched
    and therefore takes no memory yet. On a GPU the engine fills its claim with cache: the rest is what it
    took.
    """
    if device.kind == types_pb2.DEVICE_KIND_CPU:
        return facts.resident_bytes if facts.HasField("resident_bytes") else None
    if not facts.HasField("kv_cache_bytes") or _OWN_SHARE_ARGUMENTS & set(
        assignment.launch.extra_args.fields
    ):
        return None
    besides = sum(claim.memory_bytes for claim in assignment.devices) - facts.kv_cache_bytes
    return besides if besides > 0 else None


def digest(record: records_pb2.CalibrationRecord) -> str:
    """Names a record by what it speaks of, in 32 hexadecimal digits; a model may be a long path."""
    parts = (
        str(record.engine),
        record.engine_version,
        record.model,
        record.device_product,
        str(record.quantization),
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
