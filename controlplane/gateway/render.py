"""Protobuf resources as the gateway's JSON, and what callers sent as protobuf.

In come messages, out come schema models; and back. Absent times and numbers stay absent (null): a
missing value is unknown, never 0.
"""

from collections.abc import Mapping
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp
from millrace.core.v1 import deployment_pb2, node_pb2, replica_pb2, sizing_pb2, types_pb2
from millrace.scheduler.v1 import scheduler_service_pb2 as messages

from controlplane.api.validation import ENGINE_NAMES, QUANTIZATION_NAMES
from controlplane.convert import dict_to_struct, struct_to_dict
from controlplane.gateway import policies, schema
from controlplane.gateway.placement import placement, placement_message, taints
from controlplane.scheduler.structs import PRIORITY_DEFAULT
from core.clock import from_timestamp

_ENGINES = {name: number for number, name in ENGINE_NAMES.items()}
_QUANTIZATIONS = {name: number for number, name in QUANTIZATION_NAMES.items()}


def declare_request(
    declaration: schema.Declaration, *, request_id: str, validate_only: bool
) -> messages.DeclareDeploymentsRequest:
    """Converts a declaration."""
    request = messages.DeclareDeploymentsRequest(
        namespace=declaration.namespace or "", request_id=request_id, validate_only=validate_only
    )
    if declaration.metadata:
        request.metadata.CopyFrom(dict_to_struct(declaration.metadata))
    for model in declaration.models:
        entry = request.models.add(
            name=model.name,
            model=model.model,
            engine=_ENGINES[model.engine],
            quantization=_QUANTIZATIONS[model.quantization],
        )
        if model.max_model_len is not None:
            entry.max_model_len = model.max_model_len
        if model.replicas is not None:
            entry.replicas = model.replicas
        if model.extra_args:
            entry.extra_args.CopyFrom(dict_to_struct(model.extra_args))
        if model.rollout is not None:
            entry.rollout.CopyFrom(policies.rollout_message(model.rollout))
        if model.autoscale is not None:
            entry.autoscale.CopyFrom(policies.autoscale_message(model.autoscale))
        if model.priority is not None:
            entry.priority = model.priority
        if model.placement is not None:
            entry.placement.CopyFrom(placement_message(model.placement))
        if model.routing is not None:
            entry.routing.CopyFrom(policies.routing_message(model.routing))
    return request


def update_request(
    change: schema.DeploymentChange, *, namespace: str, name: str, etag: str, request_id: str
) -> messages.UpdateDeploymentRequest:
    """Converts a change; the mask names what the caller named."""
    request = messages.UpdateDeploymentRequest(
        namespace=namespace, name=name, etag=etag, request_id=request_id
    )
    request.update_mask.paths.extend(sorted(change.model_fields_set))
    spec = request.spec
    if change.model is not None:
        spec.model = change.model
    if change.engine is not None:
        spec.engine = _ENGINES[change.engine]
    if change.quantization is not None:
        spec.quantization = _QUANTIZATIONS[change.quantization]
    if change.max_model_len is not None:
        spec.max_model_len = change.max_model_len
    if change.replicas is not None:
        spec.replicas = change.replicas
    if change.extra_args is not None:
        spec.extra_args.CopyFrom(dict_to_struct(change.extra_args))
    if change.rollout is not None:
        spec.rollout.CopyFrom(policies.rollout_message(change.rollout))
    if change.autoscale is not None:
        spec.autoscale.CopyFrom(policies.autoscale_message(change.autoscale))
    if change.priority is not None:
        spec.priority = change.priority
    if change.placement is not None:
        spec.placement.CopyFrom(placement_message(change.placement))
    if change.routing is not None:
        spec.routing.CopyFrom(policies.routing_message(change.routing))
    return request


def declaration_answer(response: messages.DeclareDeploymentsResponse) -> schema.DeclarationAnswer:
    """Converts the answer to a declaration."""
    return schema.DeclarationAnswer(
        namespace=response.namespace,
        deployments=[
            schema.DeclaredDeployment(
                name=each.deployment.name,
                model=each.deployment.spec.model,
                endpoint=each.endpoint,
                api_key=each.api_key,
                status=phase_name(each.deployment.status.phase),
                watch=each.watch_url,
                sizing=sizing(each.sizing),
            )
            for each in response.deployments
        ],
    )


def deployment(resource: deployment_pb2.Deployment) -> schema.Deployment:
    """Converts a deployment."""
    spec, status = resource.spec, resource.status
    return schema.Deployment(
        namespace=resource.namespace,
        name=resource.name,
        uid=resource.uid,
        generation=resource.generation,
        etag=resource.etag,
        create_time=moment(resource.create_time),
        update_time=moment(resource.update_time),
        metadata=struct_to_dict(resource.metadata),
        model=spec.model,
        engine=ENGINE_NAMES.get(spec.engine, "vllm"),
        quantization=QUANTIZATION_NAMES.get(spec.quantization, "none"),
        max_model_len=spec.max_model_len if spec.HasField("max_model_len") else None,
        replicas=spec.replicas if spec.HasField("replicas") else 1,
        extra_args=struct_to_dict(spec.extra_args),
        rollout=policies.rollout_of(spec.rollout) if spec.HasField("rollout") else None,
        autoscale=policies.autoscale_of(spec.autoscale) if spec.HasField("autoscale") else None,
        priority=spec.priority if spec.HasField("priority") else PRIORITY_DEFAULT,
        placement=placement(spec.placement) if spec.HasField("placement") else None,
        routing=policies.routing_of(spec.routing) if spec.HasField("routing") else None,
        status=phase_name(status.phase),
        reconciling=status.reconciling,
        observed_generation=status.observed_generation,
        ready_replicas=status.ready_replicas,
        desired_replicas=status.desired_replicas,
        conditions=[_condition(each) for each in status.conditions],
        replica_states=[_replica(each) for each in status.replicas],
        last_failure=_failure(status.last_failure) if status.HasField("last_failure") else None,
        rollout_status=_rollout_status(status.rollout) if status.HasField("rollout") else None,
        autoscale_status=_autoscale_status(status.autoscale) if status.HasField("autoscale") else None,
        sizing=sizing(status.sizing) if status.HasField("sizing") else None,
    )


def sizing(resource: sizing_pb2.Sizing) -> schema.Sizing:
    """Converts a sizing."""
    return schema.Sizing(
        parameters=resource.parameters,
        weights_bytes=resource.weights_bytes,
        kv_bytes_per_token=resource.kv_bytes_per_token,
        kv_cache_bytes=resource.kv_cache_bytes,
        kv_cache_tokens=resource.kv_cache_tokens,
        overhead_bytes=resource.overhead_bytes,
        total_bytes=resource.total_bytes,
        device_count=resource.device_count,
        tensor_parallel=resource.tensor_parallel,
        max_model_len=resource.max_model_len,
        device_kinds=[_word(types_pb2.DeviceKind, kind, "DEVICE_KIND_") for kind in resource.device_kinds],
        terms=[
            schema.SizingTerm(name=term.name, bytes=term.bytes, explanation=term.explanation)
            for term in resource.terms
        ],
        summary=resource.summary,
        launch_model=resource.launch_model or None,
    )


def explanation(response: messages.ExplainDeploymentResponse) -> schema.Explanation:
    """Converts an explanation."""
    return schema.Explanation(
        summary=response.summary,
        suggestion=response.suggestion,
        nodes=[
            schema.NodeVerdict(
                node=each.node,
                fits=each.fits,
                failed_rule=each.failed_rule,
                message=each.message,
                score=each.score,
            )
            for each in response.nodes
        ],
        sizing=sizing(response.sizing) if response.HasField("sizing") else None,
    )


def node(resource: node_pb2.Node) -> schema.Node:
    """Converts a node."""
    status = resource.status
    inventory = status.inventory
    return schema.Node(
        name=resource.name,
        etag=resource.etag,
        cordoned=resource.spec.cordoned,
        draining=resource.spec.draining,
        labels={**inventory.labels, **resource.spec.labels},
        taints=taints(resource.spec.taints),
        state=_word(types_pb2.NodeState, status.state, "NODE_STATE_"),
        transition_time=moment(status.transition_time),
        heartbeat_time=moment(status.heartbeat_time),
        version=inventory.version,
        agent_target=inventory.agent_target,
        memory_bytes=inventory.memory_bytes,
        processors=inventory.processors,
        devices=[
            schema.Device(
                id=device.id,
                kind=_word(types_pb2.DeviceKind, device.kind, "DEVICE_KIND_"),
                product=device.product,
                memory_bytes=device.memory_bytes,
                index=device.index,
            )
            for device in inventory.devices
        ],
        engines=[
            schema.EngineEnvironment(
                engine=ENGINE_NAMES.get(each.engine, "unspecified"),
                version=each.version,
                device_kinds=[
                    _word(types_pb2.DeviceKind, kind, "DEVICE_KIND_") for kind in each.device_kinds
                ],
                unavailable_reason=each.unavailable_reason,
            )
            for each in inventory.engines
        ],
        replicas=list(status.replicas),
    )


def phase_name(phase: int) -> schema.PhaseName:
    """Returns a phase as callers read it."""
    return _word(types_pb2.DeploymentPhase, phase, "DEPLOYMENT_PHASE_")  # type: ignore[return-value]  # a test holds the names together


def moment(stamp: Timestamp) -> str | None:
    """Returns a time in RFC 3339; None for one that was never set."""
    value = from_timestamp(stamp)
    return None if value is None else value.isoformat().replace("+00:00", "Z")


def _condition(condition: deployment_pb2.Condition) -> schema.Condition:
    status: Mapping[int, str] = {
        types_pb2.CONDITION_STATUS_TRUE: "true",
        types_pb2.CONDITION_STATUS_FALSE: "false",
        types_pb2.CONDITION_STATUS_UNKNOWN: "unknown",
    }
    return schema.Condition(
        type=condition.type,
        status=status.get(condition.status, "unspecified"),
        reason=condition.reason,
        message=condition.message,
        transition_time=moment(condition.transition_time),
    )


def _rollout_status(rollout: deployment_pb2.RolloutStatus) -> schema.RolloutStatus:
    return schema.RolloutStatus(
        launch_generation=rollout.launch_generation,
        serving_generation=rollout.serving_generation,
        updated_replicas=rollout.updated_replicas,
        outdated_replicas=rollout.outdated_replicas,
        progress_time=moment(rollout.progress_time),
        rolled_back_reason=rollout.rolled_back_reason,
    )


def _autoscale_status(status: deployment_pb2.AutoscaleStatus) -> schema.AutoscaleStatus:
    return schema.AutoscaleStatus(
        desired_replicas=status.desired_replicas,
        floor_replicas=status.floor_replicas,
        reason=status.reason,
        message=status.message,
        out_time=moment(status.out_time),
        step_time=moment(status.step_time),
    )


def _replica(replica: deployment_pb2.ReplicaSummary) -> schema.Replica:
    return schema.Replica(
        replica=replica.replica,
        node=replica.node,
        state=_word(types_pb2.ReplicaState, replica.state, "REPLICA_STATE_"),
        message=replica.message,
        url=replica.url,
        generation=replica.generation,
        assign_time=moment(replica.assign_time),
        ready_time=moment(replica.ready_time),
        engine_start_ms=replica.engine_start_ms or None,
        pid=replica.pid or None,
        device_ids=list(replica.device_ids),
        healthy=replica.healthy,
        facts=_facts(replica.facts) if replica.HasField("facts") else None,
    )


def _facts(facts: replica_pb2.EngineFacts) -> schema.EngineFacts:
    told = {field.name: value for field, value in facts.ListFields()}
    return schema.EngineFacts(**{name: told.get(name) for name in schema.EngineFacts.model_fields})


def _failure(failure: deployment_pb2.ReplicaFailure) -> schema.Failure:
    return schema.Failure(
        replica=failure.replica,
        node=failure.node,
        message=failure.message,
        log_tail=list(failure.log_tail),
        time=moment(failure.time),
        consecutive_failures=failure.consecutive_failures,
        next_attempt_time=moment(failure.next_attempt_time),
    )


def _word(enumeration: Any, number: int, prefix: str) -> str:
    try:
        return str(enumeration.Name(number)).removeprefix(prefix).lower()
    except ValueError:
        # A newer peer may send values that this release does not know.
        return "unspecified"
