"""The plain states equal the contract's."""

from enum import IntEnum

import pytest
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper
from millrace.core.v1 import types_pb2

from core import states


@pytest.mark.parametrize(
    ("plain", "wire", "prefix"),
    [
        (states.ReplicaState, types_pb2.ReplicaState, "REPLICA_STATE_"),
        (states.NodeState, types_pb2.NodeState, "NODE_STATE_"),
        (states.Engine, types_pb2.Engine, "ENGINE_"),
        (states.Quantization, types_pb2.Quantization, "QUANTIZATION_"),
        (states.DeviceKind, types_pb2.DeviceKind, "DEVICE_KIND_"),
        (states.TaintEffect, types_pb2.TaintEffect, "TAINT_EFFECT_"),
    ],
)
def test_same_names_and_numbers(plain: type[IntEnum], wire: "EnumTypeWrapper", prefix: str) -> None:
    ours = {member.name: member.value for member in plain}
    theirs = {name.removeprefix(prefix): number for name, number in wire.items()}
    theirs = {name: number for name, number in theirs.items() if name in ours or name != "UNSPECIFIED"}
    assert ours == theirs
