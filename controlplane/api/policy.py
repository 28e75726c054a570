"""Who may call what: every method of every service, by hand, so that a new one is a decision.

Out comes the table that `core.rpc` enforces; a method that is not in it is refused. A unit test holds it
against the descriptors of all three services.
"""

from core.identity import Role

_SCHEDULER = "/millrace.scheduler.v1.SchedulerService/"
_FLEET = "/millrace.fleet.v1.FleetService/"
_AGENT = "/millrace.agent.v1.NodeAgentService/"

SCHEDULER_POLICY: dict[str, Role] = {
    _SCHEDULER + "DeclareDeployments": Role.OPERATOR,
    _SCHEDULER + "GetDeployment": Role.VIEWER,
    _SCHEDULER + "ListDeployments": Role.VIEWER,
    _SCHEDULER + "WatchDeployments": Role.VIEWER,
    _SCHEDULER + "UpdateDeployment": Role.OPERATOR,
    _SCHEDULER + "ScaleDeployment": Role.OPERATOR,
    _SCHEDULER + "RestartDeployment": Role.OPERATOR,
    _SCHEDULER + "DeleteDeployment": Role.OPERATOR,
    _SCHEDULER + "ExplainDeployment": Role.VIEWER,
    _SCHEDULER + "StreamDeploymentLogs": Role.VIEWER,
    _SCHEDULER + "WatchEvents": Role.VIEWER,
    _SCHEDULER + "ListNamespaces": Role.VIEWER,
    _SCHEDULER + "GetNamespace": Role.VIEWER,
    _SCHEDULER + "UpdateNamespace": Role.OPERATOR,
    _SCHEDULER + "ListNodes": Role.VIEWER,
    _SCHEDULER + "GetNode": Role.VIEWER,
    _SCHEDULER + "CordonNode": Role.OPERATOR,
    _SCHEDULER + "DrainNode": Role.OPERATOR,
    _SCHEDULER + "UpdateNode": Role.OPERATOR,
    _SCHEDULER + "PlanDeployments": Role.VIEWER,
}

FLEET_POLICY: dict[str, Role] = {
    _FLEET + "OpenSession": Role.AGENT,
    _FLEET + "Heartbeat": Role.AGENT,
    _FLEET + "WatchAssignments": Role.AGENT,
    _FLEET + "ReportReplicas": Role.AGENT,
    _FLEET + "ReportStats": Role.AGENT,
}

# Served by the node agents, which enforce the same: listed so that the table covers the whole contract.
AGENT_POLICY: dict[str, Role] = {
    _AGENT + "GetInventory": Role.AGENT,
    _AGENT + "ListEngines": Role.AGENT,
    _AGENT + "StreamLogs": Role.AGENT,
    _AGENT + "StreamKvEvents": Role.ROUTER,
}

CONTROL_PLANE_POLICY: dict[str, Role] = {**SCHEDULER_POLICY, **FLEET_POLICY}
"""What the control plane's gRPC server enforces."""
