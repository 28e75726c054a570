"""The immutable view that every request reads: keys, deployments, endpoints.

In come decoded records of the store, out comes a `View` in which one request is answered with a few
dictionary look-ups. A view never changes; a change in the store makes a new one. Statistics are not in
it (`view.samples`), because they change a thousand times as often. Nothing here does I/O.
"""

import hmac
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from types import MappingProxyType

from millrace.core.v1 import endpoint_pb2
from millrace.state.v1 import records_pb2

from core.store import keys


class EndpointState(IntEnum):
    """How an endpoint may be used; the values are those of `millrace.core.v1.EndpointState`."""

    UNSPECIFIED = 0
    READY = 1
    DRAINING = 2
    UNHEALTHY = 3


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One engine that requests can be sent to.

    Attributes:
        namespace: Owning tenant.
        deployment: Owning deployment.
        replica: Identifier, unique for all time.
        url: Base URL without `/v1` and without a trailing slash.
        served_model_name: Name that the engine knows the model by; empty where it is not known.
        declared_model: Model id that was declared.
        state: How it may be used.
        incarnation: Identity of this run of the engine.
        weight: Share of traffic relative to the other endpoints of the deployment, at least 1.
        node: Where it runs.
        agent_target: host:port of the node agent that offers its KV events; empty for none.
    """

    namespace: str
    deployment: str
    replica: str
    url: str
    served_model_name: str
    declared_model: str
    state: EndpointState
    incarnation: str
    weight: int
    node: str
    agent_target: str = ""

    @property
    def identity(self) -> tuple[str, str]:
        """Replica and incarnation: a restarted engine is another one."""
        return (self.replica, self.incarnation)


@dataclass(frozen=True, slots=True)
class Deployment:
    """One deployment as a client sees it.

    Attributes:
        namespace: Owning tenant.
        name: What clients send as `model`.
        declared_model: Model id that was declared.
        create_time_seconds: When it was declared, seconds since 1970; None where the record lacks it.
        endpoints: In the order of their replica ids, whatever their state.
    """

    namespace: str
    name: str
    declared_model: str
    create_time_seconds: int | None
    endpoints: tuple[Endpoint, ...]


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What a key opens.

    Attributes:
        key_hash: SHA-256 of the key, lower-case hexadecimal.
        namespace: Tenant that it authorises.
    """

    key_hash: str
    namespace: str


class Miss(Enum):
    """Why a model name leads to no deployment."""

    UNKNOWN = "unknown"
    AMBIGUOUS = "ambiguous"


@dataclass(frozen=True, slots=True)
class Tenant:
    """One namespace.

    Attributes:
        name: Of the namespace.
        deployments: By name, in alphabetical order.
        declared: Names of the deployments that declare a model id, in alphabetical order.
    """

    name: str
    deployments: Mapping[str, Deployment]
    declared: Mapping[str, tuple[str, ...]]

    def resolve(self, model: str) -> Deployment | Miss:
        """Finds the deployment that a request's `model` means: by name, else by declared model id."""
        by_name = self.deployments.get(model)
        if by_name is not None:
            return by_name
        names = self.declared.get(model, ())
        if len(names) == 1:
            return self.deployments[names[0]]
        return Miss.AMBIGUOUS if names else Miss.UNKNOWN


_EMPTY: Mapping[str, Deployment] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class View:
    """Everything that a request needs to know.

    Attributes:
        version: Grows by one with every view of this process.
        synced: False before the store has been read once.
        api_keys: By the hash of the key.
        tenants: By namespace, in alphabetical order.
        endpoints: All of them, in the order of namespace, deployment, replica.
    """

    version: int = 0
    synced: bool = False
    api_keys: Mapping[str, ApiKey] = field(default_factory=lambda: MappingProxyType({}))
    tenants: Mapping[str, Tenant] = field(default_factory=lambda: MappingProxyType({}))
    endpoints: tuple[Endpoint, ...] = ()

    def authenticate(self, presented_hash: str) -> Tenant | None:
        """Returns the tenant that a key opens; None for an unknown key."""
        found = self.api_keys.get(presented_hash)
        # The look-up narrows down; the comparison decides, in constant time.
        if found is None or not hmac.compare_digest(found.key_hash, presented_hash):
            return None
        return self.tenants.get(found.namespace) or Tenant(found.namespace, _EMPTY, MappingProxyType({}))

    def deployment(self, namespace: str, name: str) -> Deployment | None:
        """Returns a deployment as it is now; None when it is gone."""
        tenant = self.tenants.get(namespace)
        return None if tenant is None else tenant.deployments.get(name)


def endpoint_of(record: endpoint_pb2.Endpoint) -> Endpoint:
    """Reads an endpoint record; a state that this version does not know is not usable."""
    try:
        state = EndpointState(record.state)
    except ValueError:
        state = EndpointState.UNSPECIFIED
    return Endpoint(
        namespace=record.namespace,
        deployment=record.deployment,
        replica=record.replica,
        url=record.url.rstrip("/"),
        served_model_name=record.served_model_name,
        declared_model=record.declared_model,
        state=state,
        incarnation=record.incarnation,
        # An unset weight is not a weight of nothing.
        weight=max(1, record.weight),
        node=record.node,
        agent_target=record.agent_target,
    )


def build_view(
    *,
    version: int,
    endpoints: Iterable[endpoint_pb2.Endpoint],
    api_keys: Mapping[str, records_pb2.ApiKeyRecord],
    deployments: Iterable[records_pb2.DeploymentRecord],
) -> View:
    """Builds the view of one moment.

    Args:
        version: Number of the view.
        endpoints: Records of `serve/endpoints`.
        api_keys: Records of `spec/keys` by their full key in the store.
        deployments: Records of `spec/deployments`: only what is declared can be named by a client.
    """
    ordered = sorted(
        map(endpoint_of, endpoints), key=lambda each: (each.namespace, each.deployment, each.replica)
    )
    of_deployment: dict[tuple[str, str], list[Endpoint]] = defaultdict(list)
    for each in ordered:
        of_deployment[each.namespace, each.deployment].append(each)
    of_namespace: dict[str, dict[str, Deployment]] = defaultdict(dict)
    for record in sorted(deployments, key=lambda each: (each.namespace, each.name)):
        of_namespace[record.namespace][record.name] = Deployment(
            namespace=record.namespace,
            name=record.name,
            declared_model=record.spec.model,
            create_time_seconds=record.create_time.seconds or None,
            endpoints=tuple(of_deployment.get((record.namespace, record.name), ())),
        )
    return View(
        version=version,
        synced=True,
        api_keys=MappingProxyType({key.key_hash: key for key in _api_keys(api_keys)}),
        tenants=MappingProxyType({name: _tenant(name, group) for name, group in of_namespace.items()}),
        endpoints=tuple(ordered),
    )


def _api_keys(records: Mapping[str, records_pb2.ApiKeyRecord]) -> Iterable[ApiKey]:
    for key, record in records.items():
        key_hash = key.removeprefix(keys.SPEC_KEYS)
        # A record under another hash than its own opens nothing: neither of the two can be trusted.
        if record.namespace and record.key_hash == key_hash:
            yield ApiKey(key_hash, record.namespace)


def _tenant(name: str, deployments: dict[str, Deployment]) -> Tenant:
    declared: dict[str, list[str]] = defaultdict(list)
    for each in deployments.values():
        if each.declared_model:
            declared[each.declared_model].append(each.name)
    return Tenant(
        name=name,
        deployments=MappingProxyType(deployments),
        declared=MappingProxyType({model: tuple(names) for model, names in declared.items()}),
    )
