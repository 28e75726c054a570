"""What the API's parts share: the store, the view, and what users are told about addresses."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit, urlunsplit

from controlplane.api.idempotency import RequestMemory
from controlplane.api.sizer import Sizer
from controlplane.api.thinking import Thinking
from controlplane.api.view import ClusterView
from controlplane.events import EventSink
from controlplane.knowledge.environments import Environments
from controlplane.scheduler import Policy
from core.clock import Clock
from core.rpc import TlsFiles
from core.store.types import Delete, Put, Store

# The store's bound on operations of one transaction, less one to spare.
TRANSACTION_OPERATIONS_MAX = 127


@dataclass(slots=True)
class Addresses:
    """What users are told.

    Attributes:
        router_url: Base URL of the router, without `/v1`.
        gateway_url: Base URL of the HTTP gateway.
    """

    router_url: str
    gateway_url: str

    @property
    def endpoint(self) -> str:
        """OpenAI-compatible base URL."""
        return self.router_url.rstrip("/") + "/v1"

    def watch_url(self, namespace: str, name: str) -> str:
        """WebSocket URL of a deployment's events and logs."""
        parts = urlsplit(self.gateway_url.rstrip("/"))
        scheme = "wss" if parts.scheme == "https" else "ws"
        path = f"{parts.path}/v1/deployments/{namespace}/{name}/watch"
        return urlunsplit((scheme, parts.netloc, path, "", ""))


@dataclass(frozen=True, slots=True)
class ApiContext:
    """What the API's parts share.

    Attributes:
        store: Where records are kept.
        clock: Time.
        view: What is known.
        events: Where events go.
        sizer: Sizes specs.
        memory: Makes retries safe.
        addresses: What users are told.
        fleet_token: Credential for calls to agents.
        agent_tls: Files for calls to agents.
        policy: Bounds that the leader plans with.
        thinking: Where long thoughts go.
        environments: What engines need on which hardware.
    """

    store: Store
    clock: Clock
    view: ClusterView
    events: EventSink
    sizer: Sizer
    memory: RequestMemory
    addresses: Addresses
    fleet_token: str = field(repr=False)
    agent_tls: TlsFiles = field(default_factory=TlsFiles)
    policy: Policy = field(default_factory=Policy)
    thinking: Thinking = field(default_factory=Thinking)
    environments: Environments = field(default_factory=Environments)


async def commit_unguarded(store: Store, operations: Sequence[Put | Delete]) -> None:
    """Writes any number of operations that need no guard, in as few transactions as the store allows."""
    for start in range(0, len(operations), TRANSACTION_OPERATIONS_MAX):
        await store.commit(operations[start : start + TRANSACTION_OPERATIONS_MAX])
