"""Resources as the fake scheduler makes them: what a declaration becomes, and a sizing to show."""

from millrace.core.v1 import types_pb2
from millrace.core.v1.deployment_pb2 import DeploymentSpec
from millrace.core.v1.sizing_pb2 import Sizing, SizingTerm
from millrace.scheduler.v1 import scheduler_service_pb2 as messages


def sizing() -> Sizing:
    """A sizing whose terms are easy to find in an output."""
    return Sizing(
        parameters=1_000_000,
        weights_bytes=2 * 1024**2,
        total_bytes=5 * 1024**3,
        terms=[
            SizingTerm(name="weights", bytes=2 * 1024**2, explanation="1,000,000 parameters x 2 bytes"),
            SizingTerm(name="kv_cache", bytes=1024**3, explanation="8192 tokens x 128 KiB"),
        ],
        summary="2.0 MiB weights + 1.0 GiB cache + overhead",
    )


def declared_spec(model: messages.DeclaredModel) -> DeploymentSpec:
    """What was declared, by the names that both messages share, and the server's defaults."""
    spec = DeploymentSpec(
        **{field.name: value for field, value in model.ListFields() if field.name != "name"}
    )
    spec.engine = spec.engine or types_pb2.ENGINE_VLLM
    spec.quantization = spec.quantization or types_pb2.QUANTIZATION_NONE
    return spec
