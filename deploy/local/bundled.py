"""Declares the bundled model, waits until it answers, and asks it its first question.

In comes a running control plane and router, out come the key and the answer. It uses the public surfaces
only: the gRPC API to declare, the OpenAI-compatible endpoint to ask.
"""

import asyncio
import json
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import aiohttp
import grpc
from millrace.core.v1 import deployment_pb2, types_pb2
from millrace.scheduler.v1 import scheduler_service_pb2 as messages
from millrace.scheduler.v1 import scheduler_service_pb2_grpc

from core.errors import MillraceError, NotFound
from core.rpc import call_metadata, open_channel
from core.rpc_errors import from_rpc_error
from deploy.local.options import BUNDLED_MODEL, DEPLOYMENT, NAMESPACE, Options

CALL_SECONDS = 15.0
QUESTION = "What is Millrace?"
# A deployment that keeps failing is not going to answer; its reason is worth more than the wait.
FAILURES_MAX = 3


@dataclass(frozen=True, slots=True)
class Declared:
    """The bundled deployment and its key."""

    model: str
    api_key: str


class NotReadyError(Exception):
    """The model does not answer; the text says why."""


class BundledModel:
    """The bundled model's way from declaration to its first answer."""

    def __init__(self, options: Options, admin_token: str, report: Callable[[str], None]) -> None:
        self._options = options
        self._metadata = call_metadata(admin_token)
        self._report = report
        self._key_file = options.secrets / "api_key"

    async def declare(self) -> Declared:
        """Declares the model, or finds it declared by an earlier run with a key that is still known.

        Raises:
            MillraceError: The control plane refused.
        """
        async with open_channel(self._options.grpc_target) as channel:
            stub = scheduler_service_pb2_grpc.SchedulerServiceStub(channel)
            try:
                existing = await self._get(stub)
                if existing is not None:
                    if self._key_file.exists() and self._same(existing):
                        return Declared(existing.spec.model, self._key_file.read_text().strip())
                    await stub.DeleteDeployment(
                        messages.DeleteDeploymentRequest(namespace=NAMESPACE, name=DEPLOYMENT),
                        metadata=self._metadata,
                        timeout=CALL_SECONDS,
                    )
                answer = await stub.DeclareDeployments(
                    messages.DeclareDeploymentsRequest(
                        namespace=NAMESPACE,
                        request_id=str(uuid.uuid4()),
                        models=[self._model()],
                    ),
                    metadata=self._metadata,
                    timeout=CALL_SECONDS,
                )
            except grpc.RpcError as error:
                raise from_rpc_error(error) from error
        declared = answer.deployments[0]
        self._key_file.touch(mode=0o600)
        self._key_file.write_text(declared.api_key + "\n")
        self._report(f"declared {NAMESPACE}/{DEPLOYMENT}: {declared.sizing.summary}")
        return Declared(declared.deployment.spec.model, declared.api_key)

    def _model(self) -> messages.DeclaredModel:
        simulated = self._options.engine == "simulator"
        return messages.DeclaredModel(
            name=DEPLOYMENT,
            model=str(BUNDLED_MODEL),
            engine=types_pb2.ENGINE_SIMULATOR if simulated else types_pb2.ENGINE_VLLM,
            replicas=self._options.replicas,
        )

    def _same(self, existing: deployment_pb2.Deployment) -> bool:
        wanted = self._model()
        return (existing.spec.model, existing.spec.engine, existing.spec.replicas) == (
            wanted.model,
            wanted.engine,
            wanted.replicas,
        )

    async def _get(
        self, stub: "scheduler_service_pb2_grpc.SchedulerServiceAsyncStub"
    ) -> deployment_pb2.Deployment | None:
        try:
            answer = await stub.GetDeployment(
                messages.GetDeploymentRequest(namespace=NAMESPACE, name=DEPLOYMENT),
                metadata=self._metadata,
                timeout=CALL_SECONDS,
            )
        except grpc.RpcError as error:
            converted = from_rpc_error(error)
            if isinstance(converted, NotFound):
                return None
            raise converted from error
        return answer.deployment

    async def wait_ready(self) -> None:
        """Waits until a replica serves, reporting what is going on.

        Raises:
            NotReadyError: It keeps failing, cannot be placed, or takes too long.
        """
        started, last = time.monotonic(), ""
        async with open_channel(self._options.grpc_target) as channel:
            stub = scheduler_service_pb2_grpc.SchedulerServiceStub(channel)
            while True:
                try:
                    deployment = await self._get(stub)
                except MillraceError as error:
                    deployment, now = None, f"control plane: {error.message}"
                else:
                    now = _describe(deployment)
                if now != last:
                    self._report(f"{now} ({time.monotonic() - started:.0f} s)")
                    last = now
                if deployment is not None:
                    status = deployment.status
                    if status.ready_replicas > 0:
                        return
                    failure = status.last_failure
                    if failure.consecutive_failures >= FAILURES_MAX:
                        raise NotReadyError(
                            "\n".join([f"the engine keeps failing: {failure.message}", *failure.log_tail])
                        )
                if time.monotonic() - started > self._options.ready_seconds:
                    raise NotReadyError(f"not ready after {self._options.ready_seconds:g} s: {now}")
                await asyncio.sleep(0.25)

    async def ask(self, api_key: str) -> str:
        """Asks the first question through the router and returns the answer.

        Raises:
            NotReadyError: The router did not answer with a completion within a minute.
        """
        body = {
            "model": DEPLOYMENT,
            "messages": [{"role": "user", "content": QUESTION}],
            "temperature": 0,
            # The simulator gives the question back, again and again: once is enough.
            "max_tokens": 4 if self._options.engine == "simulator" else 128,
        }
        deadline, problem = time.monotonic() + 60.0, "no attempt was made"
        timeout = aiohttp.ClientTimeout(total=60.0)
        async with aiohttp.ClientSession(timeout=timeout, trust_env=False) as session:
            while time.monotonic() < deadline:
                try:
                    async with session.post(
                        f"{self._options.router_url}/v1/chat/completions",
                        json=body,
                        headers={"authorization": f"Bearer {api_key}"},
                    ) as answer:
                        text = await answer.text()
                        if answer.status == 200:
                            return _content(json.loads(text))
                        problem = f"{answer.status}: {text[:300]}"
                except (aiohttp.ClientError, TimeoutError) as error:
                    problem = repr(error)
                await asyncio.sleep(0.2)
        raise NotReadyError(f"the router does not answer: {problem}")


def _content(completion: dict[str, Any]) -> str:
    return str(completion["choices"][0]["message"]["content"])


def _describe(deployment: deployment_pb2.Deployment | None) -> str:
    if deployment is None:
        return "waiting for the deployment to appear"
    status = deployment.status
    phase = types_pb2.DeploymentPhase.Name(status.phase).removeprefix("DEPLOYMENT_PHASE_").lower()
    details = [
        f"{replica.replica}: "
        f"{types_pb2.ReplicaState.Name(replica.state).removeprefix('REPLICA_STATE_').lower()}"
        + (f" ({replica.message})" if replica.message else "")
        for replica in status.replicas
    ]
    if not details:
        details = [each.message for each in status.conditions if each.message][:1]
    return ": ".join([phase, *details[:2]])
