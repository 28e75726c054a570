"""Placement, labels, taints and dry runs between the gateway's JSON and protobuf.

In come schema models or messages, out comes the other. Nothing is checked beyond what the schema has.
"""

from collections.abc import Iterable

from millrace.core.v1 import node_pb2, policy_pb2, types_pb2
from millrace.scheduler.v1 import scheduler_service_pb2 as messages

from controlplane.gateway import schema


def placement_message(given: schema.Placement) -> policy_pb2.Placement:
    """Converts what a caller sent."""
    return policy_pb2.Placement(
        node_selector=given.node_selector,
        tolerations=[policy_pb2.Toleration(key=each.key, value=each.value) for each in given.tolerations],
        device_pins=[
            policy_pb2.DevicePin(node=each.node, device_ids=each.device_ids) for each in given.device_pins
        ],
    )


def placement(resource: policy_pb2.Placement) -> schema.Placement:
    """Converts a placement for an answer."""
    return schema.Placement(
        node_selector=dict(resource.node_selector),
        tolerations=[schema.Toleration(key=each.key, value=each.value) for each in resource.tolerations],
        device_pins=[
            schema.DevicePin(node=each.node, device_ids=list(each.device_ids))
            for each in resource.device_pins
        ],
    )


def taints(resource: Iterable[policy_pb2.Taint]) -> list[schema.Taint]:
    """Converts taints for an answer."""
    drives_out = types_pb2.TAINT_EFFECT_NO_EXECUTE
    return [
        schema.Taint(
            key=each.key,
            value=each.value,
            effect="no_execute" if each.effect == drives_out else "no_schedule",
        )
        for each in resource
    ]


def node_change(given: schema.NodeChange) -> tuple[node_pb2.NodeSpec, list[str]]:
    """Converts a change of a node; also returns the fields that it names."""
    spec = node_pb2.NodeSpec(labels=given.labels or {})
    for each in given.taints or ():
        effect = types_pb2.TAINT_EFFECT_NO_SCHEDULE
        if each.effect == "no_execute":
            effect = types_pb2.TAINT_EFFECT_NO_EXECUTE
        spec.taints.add(key=each.key, value=each.value, effect=effect)
    return spec, sorted(given.model_fields_set)


def planned(each: messages.PlannedDeployment, sizing: schema.Sizing) -> schema.PlannedDeployment:
    """Converts one entry of a dry run."""
    return schema.PlannedDeployment(
        name=each.name,
        exists=each.exists,
        sizing=sizing,
        replicas=[
            schema.PlannedReplica(
                node=replica.node,
                devices=[
                    schema.ClaimedDevice(device_id=device.device_id, memory_bytes=device.memory_bytes)
                    for device in replica.devices
                ],
                message=replica.message,
                preempts=list(replica.preempts),
            )
            for replica in each.replicas
        ],
        pending_replicas=each.pending_replicas,
        message=each.message,
    )
