from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from millrace.core.v1 import endpoint_pb2, replica_pb2, types_pb2

from controlplane.reconciler import endpoints
from controlplane.reconciler.endpoints import measured_start
from core.clock import to_timestamp

NOW = datetime(2030, 1, 1, tzinfo=UTC)
READY, DRAINING = types_pb2.REPLICA_STATE_READY, types_pb2.REPLICA_STATE_DRAINING


def assignment(*, draining: bool = False) -> replica_pb2.ReplicaAssignment:
    return replica_pb2.ReplicaAssignment(
        namespace="team",
        deployment="qwen",
        replica="qwen-a",
        node="node-1",
        desired_state=DRAINING if draining else READY,
        launch=replica_pb2.LaunchSpec(model="org/model", served_model_name="qwen"),
    )


def observation(state: types_pb2.ReplicaState.ValueType, **fields: Any) -> replica_pb2.ReplicaObservation:
    return replica_pb2.ReplicaObservation(
        **{"state": state, "healthy": True, "url": "http://e", "incarnation": "i", **fields}
    )


def published(
    state: types_pb2.EndpointState.ValueType = types_pb2.ENDPOINT_STATE_READY,
) -> endpoint_pb2.Endpoint:
    return endpoint_pb2.Endpoint(replica="qwen-a", url="http://e", state=state)


@pytest.mark.parametrize(
    ("order", "seen", "present", "expected"),
    [
        (assignment(), None, None, None),
        (assignment(), observation(types_pb2.REPLICA_STATE_STARTING), None, None),
        (assignment(), observation(READY, url=""), None, None),
        (assignment(), observation(READY), None, types_pb2.ENDPOINT_STATE_READY),
        (assignment(), observation(READY, healthy=False), None, types_pb2.ENDPOINT_STATE_UNHEALTHY),
        (assignment(), None, published(), types_pb2.ENDPOINT_STATE_READY),
        (assignment(draining=True), None, published(), types_pb2.ENDPOINT_STATE_DRAINING),
        (assignment(draining=True), observation(READY), published(), types_pb2.ENDPOINT_STATE_DRAINING),
        (assignment(draining=True), observation(DRAINING), published(), types_pb2.ENDPOINT_STATE_DRAINING),
        (assignment(draining=True), observation(READY), None, None),
        (assignment(), observation(types_pb2.REPLICA_STATE_FAILED), published(), None),
        (assignment(draining=True), observation(types_pb2.REPLICA_STATE_STOPPED), published(), None),
    ],
)
def test_what_routers_should_see(
    order: replica_pb2.ReplicaAssignment,
    seen: replica_pb2.ReplicaObservation | None,
    present: endpoint_pb2.Endpoint | None,
    expected: int | None,
) -> None:
    found = endpoints(
        {"qwen-a": order},
        {} if seen is None else {"qwen-a": seen},
        {} if present is None else {"qwen-a": present},
        {},
    )
    assert {each.state for each in found.values()} == ({expected} if expected is not None else set())


def test_an_endpoint_without_an_assignment_goes() -> None:
    assert endpoints({}, {"qwen-a": observation(READY)}, {"qwen-a": published()}, {}) == {}


@pytest.mark.parametrize(
    ("targets", "engine", "expected"),
    [
        ({"node-1": "host:7610"}, types_pb2.ENGINE_VLLM, "host:7610"),
        ({"node-2": "other:7610"}, types_pb2.ENGINE_VLLM, ""),
        ({"node-1": "host:7610"}, types_pb2.ENGINE_EXTERNAL, ""),
    ],
)
def test_routers_are_told_where_the_agent_is(
    targets: dict[str, str], engine: types_pb2.Engine.ValueType, expected: str
) -> None:
    order = assignment()
    order.launch.engine = engine
    found = endpoints({"qwen-a": order}, {"qwen-a": observation(READY)}, {}, targets)
    assert found["qwen-a"].agent_target == expected
    # A node that says nothing for a while takes nothing away.
    kept = endpoints({"qwen-a": order}, {}, found, {})
    assert kept["qwen-a"].agent_target == expected


@pytest.mark.parametrize(
    ("ages", "engine", "present", "state", "expected"),
    [
        ({"a": 90, "b": 40}, types_pb2.ENGINE_VLLM, {}, READY, 40),
        # Only what comes up now was measured now.
        ({"a": 90, "b": 40}, types_pb2.ENGINE_VLLM, {"b"}, READY, 90),
        ({"a": 90}, types_pb2.ENGINE_VLLM, {"a"}, READY, None),
        ({"a": 90}, types_pb2.ENGINE_VLLM, {}, types_pb2.REPLICA_STATE_STARTING, None),
        ({"a": 90}, types_pb2.ENGINE_EXTERNAL, {}, READY, None),
        # An order of the future is a leader's clock that was set back: it measures nothing.
        ({"a": -5}, types_pb2.ENGINE_VLLM, {}, READY, None),
    ],
)
def test_a_start_is_measured_from_the_order_to_the_endpoint(
    ages: dict[str, int],
    engine: types_pb2.Engine.ValueType,
    present: set[str],
    state: types_pb2.ReplicaState.ValueType,
    expected: int | None,
) -> None:
    orders = {}
    for replica, age_seconds in ages.items():
        orders[replica] = assignment()
        orders[replica].replica = replica
        orders[replica].launch.engine = engine
        orders[replica].create_time.CopyFrom(to_timestamp(NOW - timedelta(seconds=age_seconds)))
    before = {replica: published() for replica in present}
    wanted = endpoints(orders, {replica: observation(state) for replica in orders}, before, {})
    found = measured_start(orders, wanted, before, NOW)
    assert found == (None if expected is None else timedelta(seconds=expected))
