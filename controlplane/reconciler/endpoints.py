"""Which endpoints routers should see. Pure.

In come a deployment's assignments after the plan, what agents report, and the endpoints as they are; out
come the endpoints as they should be, and how long one took to come. A replica becomes an endpoint when it
serves, and stops being one only when it has ended: silence alone takes nothing away.
"""

from collections.abc import Mapping
from datetime import datetime, timedelta

from millrace.core.v1 import endpoint_pb2, replica_pb2, types_pb2

from core.clock import from_timestamp

DEFAULT_WEIGHT = 100
"""Share of an endpoint where nothing weighs them; 100 leaves room to weigh finely later."""


def endpoints(
    assignments: Mapping[str, replica_pb2.ReplicaAssignment],
    observations: Mapping[str, replica_pb2.ReplicaObservation],
    present: Mapping[str, endpoint_pb2.Endpoint],
    agent_targets: Mapping[str, str],
) -> dict[str, endpoint_pb2.Endpoint]:
    """Returns the endpoints that should be published, by replica.

    Args:
        assignments: By replica; those that the plan removes are left out by the caller.
        observations: By replica.
        present: Published endpoints, by replica.
        agent_targets: Where nodes' agents serve, host:port by node; nodes that do not say are not in it.
    """
    wanted: dict[str, endpoint_pb2.Endpoint] = {}
    for replica, assignment in assignments.items():
        endpoint = _endpoint(assignment, observations.get(replica), present.get(replica))
        if endpoint is not None:
            # An external URL is no engine of the agent's, so the agent knows nothing of its cache.
            if endpoint.engine != types_pb2.ENGINE_EXTERNAL:
                endpoint.agent_target = agent_targets.get(endpoint.node, endpoint.agent_target)
            wanted[replica] = endpoint
    return wanted


def measured_start(
    assignments: Mapping[str, replica_pb2.ReplicaAssignment],
    wanted: Mapping[str, endpoint_pb2.Endpoint],
    present: Mapping[str, endpoint_pb2.Endpoint],
    now: datetime,
) -> timedelta | None:
    """Returns how long a replica took from its assignment to the endpoint that is published now.

    Both moments are the leader's, so that no machine's clock is held against another's. Of several, the
    quickest counts: that is what a request without any endpoint waits for.

    Args:
        assignments: By replica.
        wanted: Endpoints as they should be.
        present: Endpoints as they are.
        now: The present.

    Returns:
        The time; None where no engine has come up.
    """
    starts = [
        now - created
        for replica, endpoint in wanted.items()
        if replica not in present
        and endpoint.state == types_pb2.ENDPOINT_STATE_READY
        # What someone else runs is probed, not started.
        and endpoint.engine != types_pb2.ENGINE_EXTERNAL
        and (created := from_timestamp(assignments[replica].create_time)) is not None
        and created <= now
    ]
    return min(starts, default=None)


def _endpoint(
    assignment: replica_pb2.ReplicaAssignment,
    observed: replica_pb2.ReplicaObservation | None,
    present: endpoint_pb2.Endpoint | None,
) -> endpoint_pb2.Endpoint | None:
    draining = assignment.desired_state == types_pb2.REPLICA_STATE_DRAINING
    if observed is None:
        # The report is missing, which says nothing about the engine.
        if present is None:
            return None
        endpoint = endpoint_pb2.Endpoint()
        endpoint.CopyFrom(present)
        if draining:
            endpoint.state = types_pb2.ENDPOINT_STATE_DRAINING
        return endpoint
    serving = types_pb2.REPLICA_STATE_READY <= observed.state <= types_pb2.REPLICA_STATE_DRAINING
    if not serving or not observed.url:
        return None
    draining = draining or observed.state == types_pb2.REPLICA_STATE_DRAINING
    if draining and present is None:
        # It was never published, or is no longer: routers have nothing to finish there.
        return None
    state = types_pb2.ENDPOINT_STATE_READY if observed.healthy else types_pb2.ENDPOINT_STATE_UNHEALTHY
    return endpoint_pb2.Endpoint(
        namespace=assignment.namespace,
        deployment=assignment.deployment,
        replica=assignment.replica,
        url=observed.url,
        served_model_name=observed.served_model_name or assignment.launch.served_model_name,
        declared_model=assignment.launch.model,
        state=types_pb2.ENDPOINT_STATE_DRAINING if draining else state,
        incarnation=observed.incarnation,
        weight=DEFAULT_WEIGHT,
        node=assignment.node,
        engine=assignment.launch.engine,
    )
