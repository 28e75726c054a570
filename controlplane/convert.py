"""Between protobuf and plain values, for the parts of the control plane that meet both.

In come messages of `millrace.core.v1`, out go plain Python values for the pure core, and the other way
round. Nothing here decides anything, does I/O or checks what a user wrote.
"""

from collections.abc import Mapping
from typing import TypeAlias, cast

from google.protobuf.struct_pb2 import Struct, Value
from millrace.core.v1 import deployment_pb2, sizing_pb2, types_pb2
from millrace.state.v1 import records_pb2

from controlplane.sizing import SizingResult

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

EXTERNAL_URLS_ARGUMENT = "urls"
SERVED_MODEL_NAME_ARGUMENT = "served_model_name"


def struct_to_dict(struct: Struct) -> dict[str, Json]:
    """Converts a Struct; whole numbers come back as `int`, although Struct keeps doubles only."""
    return {name: _plain(value) for name, value in struct.fields.items()}


def dict_to_struct(values: Mapping[str, object]) -> Struct:
    """Converts a JSON object to a Struct.

    Raises:
        ValueError: A value is none that JSON has.
    """
    struct = Struct()
    # The stub asks for values that JSON has; the message itself refuses any other.
    struct.update(cast("dict[str, str]", dict(values)))
    return struct


def desired_replicas(
    spec: deployment_pb2.DeploymentSpec, concluded: records_pb2.DeploymentPlanRecord | None = None
) -> int:
    """Replicas that are wanted: what the autoscaler decided, else what the spec asks for.

    That is one a URL for external engines, and 1 where it does not say. A spec that stops an external
    deployment (`replicas: 0`) is honoured. Before the autoscaler has looked, its bounds hold.

    Args:
        spec: What the user wants.
        concluded: What was concluded about the same deployment; None before anything was.
    """
    if autoscaled(spec):
        if concluded is not None and concluded.HasField("autoscale"):
            return concluded.autoscale.desired_replicas
        least = spec.autoscale.min_replicas if spec.autoscale.HasField("min_replicas") else 1
        return min(max(declared_replicas(spec), least), spec.autoscale.max_replicas)
    return declared_replicas(spec)


def autoscaled(spec: deployment_pb2.DeploymentSpec) -> bool:
    """Tells whether the autoscaler decides how many replicas there are.

    `replicas: 0` stops a deployment, and the autoscaler with it, unless the policy allows zero: then it
    sleeps until the first request.
    """
    if not spec.HasField("autoscale") or spec.engine == types_pb2.ENGINE_EXTERNAL:
        return False
    stopped = spec.HasField("replicas") and spec.replicas == 0
    return not stopped or (spec.autoscale.HasField("min_replicas") and spec.autoscale.min_replicas == 0)


def declared_replicas(spec: deployment_pb2.DeploymentSpec) -> int:
    """Replicas that the spec itself asks for."""
    if spec.engine == types_pb2.ENGINE_EXTERNAL:
        stopped = spec.HasField("replicas") and spec.replicas == 0
        return 0 if stopped else len(external_urls(spec))
    return spec.replicas if spec.HasField("replicas") else 1


def external_urls(spec: deployment_pb2.DeploymentSpec) -> tuple[str, ...]:
    """URLs of an external deployment in their order, without repeats; empty for other engines."""
    if spec.engine != types_pb2.ENGINE_EXTERNAL or EXTERNAL_URLS_ARGUMENT not in spec.extra_args.fields:
        return ()
    urls = spec.extra_args.fields[EXTERNAL_URLS_ARGUMENT]
    listed = (each.string_value for each in urls.list_value.values)
    return tuple(dict.fromkeys(url.rstrip("/") for url in listed if url))


def served_model_name(name: str, spec: deployment_pb2.DeploymentSpec) -> str:
    """Name that the engine serves the model under: the deployment's, unless someone else runs it."""
    if spec.engine != types_pb2.ENGINE_EXTERNAL:
        return name
    given = spec.extra_args.fields.get(SERVED_MODEL_NAME_ARGUMENT)
    return (given.string_value if given is not None else "") or spec.model


def sizing_to_proto(result: SizingResult) -> sizing_pb2.Sizing:
    """Converts what the sizing worked out."""
    return sizing_pb2.Sizing(
        parameters=result.parameters,
        weights_bytes=result.weights_bytes,
        kv_bytes_per_token=result.kv_bytes_per_token,
        kv_cache_bytes=result.kv_cache_bytes,
        kv_cache_tokens=result.kv_cache_tokens,
        overhead_bytes=result.overhead_bytes,
        total_bytes=result.total_bytes,
        device_count=result.device_count,
        tensor_parallel=result.tensor_parallel,
        max_model_len=result.max_model_len,
        device_kinds=[types_pb2.DeviceKind.ValueType(kind) for kind in result.device_kinds],
        terms=[
            sizing_pb2.SizingTerm(name=term.name, bytes=term.bytes, explanation=term.explanation)
            for term in result.terms
        ],
        summary=result.summary,
    )


def _plain(value: Value) -> Json:
    match value.WhichOneof("kind"):
        case "bool_value":
            return value.bool_value
        case "number_value":
            number = value.number_value
            return int(number) if number.is_integer() else number
        case "string_value":
            return value.string_value
        case "list_value":
            return [_plain(each) for each in value.list_value.values]
        case "struct_value":
            return struct_to_dict(value.struct_value)
        case _:
            return None
