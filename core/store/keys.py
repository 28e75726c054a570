"""The key layout: one writer a prefix.

In come identifiers, out come keys. This is the only module that spells a key.

    /millrace/v1/spec/    written by the API
    /millrace/v1/plan/    written by the leader's loop
    /millrace/v1/actual/  written by fleet
    /millrace/v1/serve/   written by the leader's loop
    /millrace/v1/stats/   written by fleet, leased
    /millrace/v1/live/    each its own, leased
    /millrace/v1/events/  append-only, leased
"""

ROOT = "/millrace/v1/"

SPEC_DEPLOYMENTS = ROOT + "spec/deployments/"
SPEC_NAMESPACES = ROOT + "spec/namespaces/"
SPEC_NODES = ROOT + "spec/nodes/"
SPEC_KEYS = ROOT + "spec/keys/"
PLAN_DEPLOYMENTS = ROOT + "plan/deployments/"
PLAN_REPLICAS = ROOT + "plan/replicas/"
ACTUAL_CALIBRATIONS = ROOT + "actual/calibrations/"
ACTUAL_NODES = ROOT + "actual/nodes/"
ACTUAL_REPLICAS = ROOT + "actual/replicas/"
SERVE_DEPLOYMENTS = ROOT + "serve/deployments/"
SERVE_ENDPOINTS = ROOT + "serve/endpoints/"
STATS = ROOT + "stats/"
LIVE_LEADER = ROOT + "live/leader"
LIVE_ROUTERS = ROOT + "live/routers/"
EVENTS = ROOT + "events/"


def spec_deployments(namespace: str) -> str:
    """Prefix of a namespace's deployments; of all of them for an empty namespace."""
    return f"{SPEC_DEPLOYMENTS}{namespace}/" if namespace else SPEC_DEPLOYMENTS


def spec_deployment(namespace: str, name: str) -> str:
    """Key of a deployment's record."""
    return f"{SPEC_DEPLOYMENTS}{namespace}/{name}"


def spec_namespace(namespace: str) -> str:
    """Key of what operators and users want of a tenant."""
    return SPEC_NAMESPACES + namespace


def spec_node(node: str) -> str:
    """Key of what operators want of a node."""
    return SPEC_NODES + node


def spec_key(key_hash: str) -> str:
    """Key of an API key's record."""
    return SPEC_KEYS + key_hash


def plan_deployment(namespace: str, name: str) -> str:
    """Key of what the scheduler concluded for a deployment."""
    return f"{PLAN_DEPLOYMENTS}{namespace}/{name}"


def plan_replica(namespace: str, deployment: str, replica: str) -> str:
    """Key of a replica's assignment."""
    return f"{PLAN_REPLICAS}{namespace}/{deployment}/{replica}"


def actual_calibration(digest: str) -> str:
    """Key of what an engine was measured to need."""
    return ACTUAL_CALIBRATIONS + digest


def actual_node(node: str) -> str:
    """Key of what fleet knows of a node."""
    return ACTUAL_NODES + node


def actual_replica(namespace: str, deployment: str, replica: str) -> str:
    """Key of what an agent reported of a replica."""
    return f"{ACTUAL_REPLICAS}{namespace}/{deployment}/{replica}"


def serve_deployment(namespace: str, name: str) -> str:
    """Key of what routers need to know of a deployment."""
    return f"{SERVE_DEPLOYMENTS}{namespace}/{name}"


def serve_endpoint(namespace: str, deployment: str, replica: str) -> str:
    """Key of an endpoint."""
    return f"{SERVE_ENDPOINTS}{namespace}/{deployment}/{replica}"


def stats(namespace: str, deployment: str, replica: str) -> str:
    """Key of an engine's latest sample."""
    return f"{STATS}{namespace}/{deployment}/{replica}"


def live_router(router_id: str) -> str:
    """Key of a router's presence."""
    return LIVE_ROUTERS + router_id


def events(namespace: str) -> str:
    """Prefix of a namespace's events; of all of them for an empty namespace."""
    return f"{EVENTS}{namespace}/" if namespace else EVENTS


def event(namespace: str, event_id: str) -> str:
    """Key of an event."""
    return f"{EVENTS}{namespace}/{event_id}"
