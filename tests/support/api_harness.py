"""A control plane's API in this process: real gRPC, a store in memory, models made up."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.struct_pb2 import Struct
from millrace.core.v1 import node_pb2, types_pb2
from millrace.scheduler.v1 import scheduler_service_pb2 as messages
from millrace.scheduler.v1 import scheduler_service_pb2_grpc
from millrace.state.v1 import records_pb2

from controlplane.api.context import Addresses, ApiContext
from controlplane.api.idempotency import RequestMemory
from controlplane.api.models import MODEL_NOT_FOUND
from controlplane.api.policy import CONTROL_PLANE_POLICY
from controlplane.api.servicer import SERVICE_NAME, SchedulerServicer
from controlplane.api.sizer import Sizer
from controlplane.api.view import ClusterView
from controlplane.events import EventLog
from controlplane.knowledge import load_environments
from controlplane.sizing import ModelFacts, facts_from_config
from core.clock import SystemClock
from core.errors import InvalidArgument, MillraceError
from core.identity import Principal, Role, TokenAuthenticator
from core.rpc import RpcServer, call_metadata, open_channel, start_server
from core.rpc_errors import from_rpc_error
from core.store import Put, keys
from core.store.memory import MemoryStore
from core.tasks import cancel_and_wait

ADMIN_TOKEN = "admin-token-of-the-test"
FLEET_TOKEN = "fleet-token-of-the-test"
VIEWER_TOKEN = "viewer-token-of-the-test"

TINY_CONFIG: dict[str, object] = {
    "model_type": "llama",
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "vocab_size": 1000,
    "max_position_embeddings": 2048,
}
HUGE_CONFIG: dict[str, object] = {
    **TINY_CONFIG,
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "vocab_size": 128256,
}


class FakeModels:
    """Knows `/models/tiny` and `/models/huge`."""

    async def facts(self, model: str) -> ModelFacts:
        configs = {"/models/tiny": TINY_CONFIG, "/models/huge": HUGE_CONFIG, "org/tiny": TINY_CONFIG}
        if model not in configs:
            raise InvalidArgument.of("model", f"`{model}` does not exist", reason=MODEL_NOT_FOUND)
        return facts_from_config(configs[model], weight_file_bytes=None)


@dataclass
class ApiHarness:
    """A running API and a client of it."""

    store: MemoryStore
    view: ClusterView
    events: EventLog
    context: ApiContext
    server: RpcServer
    channel: grpc.aio.Channel
    stub: Any
    token: str = ADMIN_TOKEN

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    async def call(self, method: str, request: Any, *, token: str | None = None) -> Any:
        """Makes a call; raises our own errors."""
        metadata = call_metadata(self.token if token is None else token)
        try:
            return await getattr(self.stub, method)(request, metadata=metadata, timeout=20)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error

    async def refusal(self, method: str, request: Any, *, token: str | None = None) -> MillraceError:
        """Makes a call that must fail."""
        try:
            await self.call(method, request, token=token)
        except MillraceError as error:
            return error
        raise AssertionError(f"{method} was not refused")

    async def read_all(self, method: str, request: Any) -> AsyncIterator[Any]:
        """Reads a stream to its end; raises our own errors."""
        try:
            async for message in getattr(self.stub, method)(
                request, metadata=call_metadata(self.token), timeout=20
            ):
                yield message
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error

    async def declare(self, *names: str, namespace: str = "team", **more: Any) -> Any:
        """Declares simulators, which need no model."""
        models = [declared(name, engine=types_pb2.ENGINE_SIMULATOR, model="any") for name in names]
        return await self.call(
            "DeclareDeployments",
            messages.DeclareDeploymentsRequest(models=models, namespace=namespace, **more),
        )

    async def add_node(self, name: str = "node-1", *, memory_bytes: int = 16 << 30, **more: Any) -> None:
        """Adds a machine with a CPU share and every runnable engine."""
        inventory = node_pb2.NodeInventory(
            node=name,
            devices=[node_pb2.Device(id="cpu", kind=types_pb2.DEVICE_KIND_CPU, memory_bytes=memory_bytes)],
            engines=[
                node_pb2.EngineEnvironment(engine=engine, device_kinds=[types_pb2.DEVICE_KIND_CPU])
                for engine in (types_pb2.ENGINE_VLLM, types_pb2.ENGINE_SIMULATOR)
            ],
            **more,
        )
        record = records_pb2.NodeObservationRecord(inventory=inventory, state=types_pb2.NODE_STATE_READY)
        commit = await self.store.commit([Put(keys.actual_node(name), record.SerializeToString())])
        await self.view.machines.wait_for_revision(commit.revision, 5)


def declared(name: str, **fields: Any) -> messages.DeclaredModel:
    """Makes an entry of a declaration."""
    extra_args = fields.pop("extra_args", None)
    entry = messages.DeclaredModel(name=name, **{"model": "/models/tiny", **fields})
    if extra_args is not None:
        entry.extra_args.CopyFrom(struct(extra_args))
    return entry


def struct(values: dict[str, Any]) -> Struct:
    """Makes a Struct."""
    made = Struct()
    made.update(values)
    return made


@asynccontextmanager
async def running_api(store: MemoryStore | None = None) -> AsyncIterator[ApiHarness]:
    """Runs an API until the block ends."""
    clock = SystemClock()
    store = store or MemoryStore(clock)
    view = ClusterView(store, clock)
    events = EventLog(store, clock)
    context = ApiContext(
        store=store,
        clock=clock,
        view=view,
        events=events,
        sizer=Sizer(view, FakeModels()),
        memory=RequestMemory(clock),
        addresses=Addresses(router_url="http://127.0.0.1:8080", gateway_url="http://127.0.0.1:7601"),
        fleet_token=FLEET_TOKEN,
        environments=load_environments(),
    )
    tasks = [
        asyncio.create_task(view.run(), name="harness-view"),
        asyncio.create_task(events.run(), name="harness-events"),
    ]
    servicer = SchedulerServicer(context)
    server = await start_server(
        host="127.0.0.1",
        port=0,
        register=servicer.register,
        service_names=(SERVICE_NAME,),
        authenticator=TokenAuthenticator(
            {
                ADMIN_TOKEN: Principal("admin", Role.ADMIN),
                FLEET_TOKEN: Principal("fleet", Role.AGENT),
                VIEWER_TOKEN: Principal("viewer", Role.VIEWER),
            }
        ),
        policy=CONTROL_PLANE_POLICY,
    )
    channel = open_channel(f"127.0.0.1:{server.port}")
    try:
        await view.wait_synced(5)
        yield ApiHarness(
            store=store,
            view=view,
            events=events,
            context=context,
            server=server,
            channel=channel,
            stub=scheduler_service_pb2_grpc.SchedulerServiceStub(channel),
        )
    finally:
        await channel.close()
        await server.stop(0)
        await cancel_and_wait(*tasks)
