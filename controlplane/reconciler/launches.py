"""What an engine is started with: from a deployment's record to the order that an agent gets. Pure."""

from millrace.core.v1 import replica_pb2
from millrace.state.v1 import records_pb2

from controlplane.convert import served_model_name


def launch_of(record: records_pb2.DeploymentRecord, external_url: str) -> replica_pb2.LaunchSpec:
    """Makes the order to start an engine.

    Args:
        record: The deployment, with the launch that is to be started now.
        external_url: Where someone else runs it; empty for engines that an agent starts.
    """
    spec, sizing = record.spec, record.sizing
    # An explicit share of the device leaves the size of the cache to the engine.
    by_share = "gpu_memory_utilization" in spec.extra_args.fields
    return replica_pb2.LaunchSpec(
        engine=spec.engine,
        model=sizing.launch_model or spec.model,
        served_model_name=served_model_name(record.name, spec),
        max_model_len=sizing.max_model_len,
        tensor_parallel=sizing.tensor_parallel,
        quantization=spec.quantization,
        kv_cache_bytes=0 if by_share else sizing.kv_cache_bytes,
        extra_args=spec.extra_args,
        external_url=external_url,
    )
