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

from millrace.core.v1 import deployment_pb2, endpoint_pb2, policy_pb2, types_pb2
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
        engine: Which engine it is: `vllm`, `sglang`, `simulator`, ...; empty where it is not known.
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
    engine: str = ""

    @property
    def identity(self) -> tuple[str, str]:
        """Replica and incarnation: a restarted engine is another one."""
        return (self.replica, self.incarnation)


class Tier(IntEnum):
    """Class of service; the values are those of `millrace.core.v1.Tier`."""

    BASE = 1
    FAST = 2


@dataclass(frozen=True, slots=True)
class Routing:
    """How requests for a deployment are treated. None and empty mean as the router is configured.

    Attributes:
        strategy: How endpoints are picked.
        consecutive_failures: Failures in a row after which an endpoint is left alone.
        ejection_seconds: How long it is left alone the first time.
        stream_continuation: Continues a stream on another endpoint when its engine dies.
        fallback: Deployment of the same namespace that serves when this one cannot.
        queue_requests_max: Requests that may wait in this worker.
        queue_seconds: How long they may wait.
    """

    strategy: str = ""
    consecutive_failures: int | None = None
    ejection_seconds: float | None = None
    stream_continuation: bool = False
    fallback: str = ""
    queue_requests_max: int | None = None
    queue_seconds: float | None = None


NO_ROUTING = Routing()


@dataclass(frozen=True, slots=True)
class Deployment:
    """One deployment as a client sees it.

    Attributes:
        namespace: Owning tenant.
        name: What clients send as `model`.
        declared_model: Model id that was declared.
        create_time_seconds: When it was declared, seconds since 1970; None where the record lacks it.
        endpoints: In the order of their replica ids, whatever their state.
        ready: Those of them that are READY.
        routing: How its requests are treated.
        wanted: False where the user has stopped it: nothing will come up by itself.
        start_seconds: How long its last engine took from assignment to endpoint; None where none is known.
    """

    namespace: str
    name: str
    declared_model: str
    create_time_seconds: int | None
    endpoints: tuple[Endpoint, ...]
    ready: tuple[Endpoint, ...] = ()
    routing: Routing = NO_ROUTING
    wanted: bool = True
    start_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What a key opens.

    Attributes:
        key_hash: SHA-256 of the key, lower-case hexadecimal.
        namespace: Tenant that it authorises.
        tier: Class of service of its requests.
    """

    key_hash: str
    namespace: str
    tier: Tier = Tier.BASE


@dataclass(frozen=True, slots=True)
class Target:
    """One deployment behind an alias.

    Attributes:
        deployment: Of the same namespace; it may not exist.
        weight: Share of the requests relative to the other targets, at least 1.
    """

    deployment: str
    weight: int


@dataclass(frozen=True, slots=True)
class Alias:
    """A model name that leads to deployments.

    Attributes:
        name: What clients send as `model`.
        targets: Where it leads, at least one.
    """

    name: str
    targets: tuple[Target, ...]


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
        aliases: Further model names; a deployment of the same name goes first.
    """

    name: str
    deployments: Mapping[str, Deployment]
    declared: Mapping[str, tuple[str, ...]]
    aliases: Mapping[str, Alias] = field(default_factory=lambda: MappingProxyType({}))

    def resolve(self, model: str) -> Deployment | Alias | Miss:
        """Finds what a request's `model` means: a deployment's name, an alias, a declared model id."""
        by_name = self.deployments.get(model)
        if by_name is not None:
            return by_name
        alias = self.aliases.get(model)
        if alias is not None:
            return alias
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

    def authenticate(self, presented_hash: str) -> tuple[ApiKey, Tenant] | None:
        """Returns a key and the tenant that it opens; None for an unknown key."""
        found = self.api_keys.get(presented_hash)
        # The look-up narrows down; the comparison decides, in constant time.
        if found is None or not hmac.compare_digest(found.key_hash, presented_hash):
            return None
        tenant = self.tenants.get(found.namespace)
        return found, tenant or Tenant(found.namespace, _EMPTY, MappingProxyType({}))

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
        engine=_engine_of(record.engine),
    )


def _engine_of(number: int) -> str:
    """Names an engine; empty for unset, and for one that this version does not know."""
    if number not in types_pb2.Engine.values():
        return ""
    name = types_pb2.Engine.Name(types_pb2.Engine.ValueType(number))
    return "" if name == "ENGINE_UNSPECIFIED" else name.removeprefix("ENGINE_").lower()


def build_view(
    *,
    version: int,
    endpoints: Iterable[endpoint_pb2.Endpoint],
    api_keys: Mapping[str, records_pb2.ApiKeyRecord],
    deployments: Iterable[records_pb2.DeploymentRecord],
    namespaces: Iterable[records_pb2.NamespaceRecord] = (),
    served: Iterable[records_pb2.ServedDeploymentRecord] = (),
) -> View:
    """Builds the view of one moment.

    Args:
        version: Number of the view.
        endpoints: Records of `serve/endpoints`.
        api_keys: Records of `spec/keys` by their full key in the store.
        deployments: Records of `spec/deployments`: only what is declared can be named by a client.
        namespaces: Records of `spec/namespaces`.
        served: Records of `serve/deployments`.
    """
    ordered = sorted(
        map(endpoint_of, endpoints), key=lambda each: (each.namespace, each.deployment, each.replica)
    )
    of_deployment: dict[tuple[str, str], list[Endpoint]] = defaultdict(list)
    for each in ordered:
        of_deployment[each.namespace, each.deployment].append(each)
    starts = {each.deployment_uid: each.start_duration.ToTimedelta().total_seconds() for each in served}
    of_namespace: dict[str, dict[str, Deployment]] = defaultdict(dict)
    for record in sorted(deployments, key=lambda each: (each.namespace, each.name)):
        own = tuple(of_deployment.get((record.namespace, record.name), ()))
        of_namespace[record.namespace][record.name] = Deployment(
            namespace=record.namespace,
            name=record.name,
            declared_model=record.spec.model,
            create_time_seconds=record.create_time.seconds or None,
            endpoints=own,
            ready=tuple(each for each in own if each.state is EndpointState.READY),
            routing=routing_of(record.spec.routing),
            wanted=_wanted(record.spec),
            start_seconds=starts.get(record.uid),
        )
    aliases = {record.namespace: _aliases(record.spec) for record in namespaces}
    return View(
        version=version,
        synced=True,
        api_keys=MappingProxyType({key.key_hash: key for key in _api_keys(api_keys)}),
        tenants=MappingProxyType(
            {name: _tenant(name, group, aliases.get(name, {})) for name, group in of_namespace.items()}
        ),
        endpoints=tuple(ordered),
    )


def _api_keys(records: Mapping[str, records_pb2.ApiKeyRecord]) -> Iterable[ApiKey]:
    for key, record in records.items():
        key_hash = key.removeprefix(keys.SPEC_KEYS)
        # A record under another hash than its own opens nothing: neither of the two can be trusted.
        if record.namespace and record.key_hash == key_hash:
            # A tier that this version does not know is an ordinary one.
            fast = record.tier == Tier.FAST.value
            yield ApiKey(key_hash, record.namespace, Tier.FAST if fast else Tier.BASE)


def routing_of(message: policy_pb2.Routing) -> Routing:
    """Reads how a deployment's requests are treated; what is not set, or below its least value, is None."""
    breaker = message.circuit_breaker
    ejection, wait = breaker.ejection.ToTimedelta(), message.queue_timeout.ToTimedelta()
    return Routing(
        strategy=message.strategy.strip(),
        consecutive_failures=max(1, breaker.consecutive_failures)
        if breaker.HasField("consecutive_failures")
        else None,
        ejection_seconds=ejection.total_seconds() if ejection.total_seconds() > 0 else None,
        stream_continuation=message.stream_continuation,
        fallback=message.fallback_deployment,
        queue_requests_max=max(0, message.queue_requests_max)
        if message.HasField("queue_requests_max")
        else None,
        queue_seconds=wait.total_seconds() if wait.total_seconds() > 0 else None,
    )


def _wanted(spec: deployment_pb2.DeploymentSpec) -> bool:
    if spec.HasField("autoscale"):
        return spec.autoscale.max_replicas > 0
    return not spec.HasField("replicas") or spec.replicas > 0


def _aliases(spec: policy_pb2.NamespaceSpec) -> dict[str, Alias]:
    found = {}
    for alias in spec.aliases:
        targets = tuple(Target(each.deployment, max(1, each.weight)) for each in alias.targets)
        if alias.name and targets:
            found[alias.name] = Alias(alias.name, targets)
    return found


def _tenant(name: str, deployments: dict[str, Deployment], aliases: dict[str, Alias]) -> Tenant:
    declared: dict[str, list[str]] = defaultdict(list)
    for each in deployments.values():
        if each.declared_model:
            declared[each.declared_model].append(each.name)
    return Tenant(
        name=name,
        deployments=MappingProxyType(deployments),
        declared=MappingProxyType({model: tuple(names) for model, names in declared.items()}),
        aliases=MappingProxyType(aliases),
    )
