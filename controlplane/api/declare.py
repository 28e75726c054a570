"""DeclareDeployments: names models, never hardware; all of them or none.

In comes a declaration, out go records and keys in one guarded transaction. A retry with the same
request_id finds the records, changes nothing but the keys, and answers with fresh ones, since the old
ones are stored as hashes and cannot be shown again.
"""

import hashlib
import secrets
import uuid
from collections.abc import Sequence

from millrace.core.v1 import deployment_pb2, sizing_pb2
from millrace.scheduler.v1 import scheduler_service_pb2
from millrace.state.v1 import records_pb2

from controlplane.api import validation
from controlplane.api.context import TRANSACTION_OPERATIONS_MAX, ApiContext, commit_unguarded
from controlplane.api.fitting import size_all
from controlplane.api.keyring import NewKey, keys_of, new_key
from controlplane.api.view import DeploymentId
from core.clock import to_timestamp
from core.errors import AlreadyExists, Conflict, InvalidArgument
from core.store import keys
from core.store.types import Compare, Delete, KeyValue, Operation, Put

_NAMESPACE_ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"
_NAMESPACE_RANDOM = 8

_Request = scheduler_service_pb2.DeclareDeploymentsRequest
_Response = scheduler_service_pb2.DeclareDeploymentsResponse


class Declarer:
    """Declares deployments."""

    def __init__(self, context: ApiContext) -> None:
        self._context = context

    async def declare(self, request: _Request) -> _Response:
        """Declares all models of a request, or none.

        Raises:
            InvalidArgument: With every wrong field.
            AlreadyExists: A name is taken.
            FailedPrecondition: No known node could ever hold a model.
            StoreUnavailable: The outcome is not known; retry with the same request_id.
        """
        specs = validation.check_declaration(request)
        self._context.view.require_synced()
        namespace = request.namespace or _generated_namespace(request.request_id)
        identities = [(namespace, model.name) for model in request.models]
        known = await self._declared_before(request, specs, identities)
        if known is not None:
            return await self._repeat(request, known)
        sizings = await size_all(self._context, specs, namespace)
        records = self._records(request, specs, sizings, identities)
        if request.validate_only:
            return self._answer(namespace, [(record, 0) for record in records], None)
        fresh = [new_key(identity, self._context.clock.now()) for identity in identities]
        revision = await self._create(records, fresh)
        if revision is None:
            # Somebody was faster: perhaps a retry of this very call.
            known = await self._declared_before(request, specs, identities)
            if known is None:
                raise Conflict("another declaration came and went at the same time; try again")
            return await self._repeat(request, known)
        for record in records:
            self._context.events.emit(
                namespace=namespace,
                deployment=record.name,
                reason="Declared",
                message=f"declared with model {record.spec.model}: {record.sizing.summary}",
                source="api",
            )
        await self._context.view.wait_for_write(revision)
        return self._answer(namespace, [(record, revision) for record in records], fresh)

    async def _declared_before(
        self,
        request: _Request,
        specs: Sequence[deployment_pb2.DeploymentSpec],
        identities: Sequence[DeploymentId],
    ) -> list[tuple[records_pb2.DeploymentRecord, KeyValue]] | None:
        """Returns the records of an earlier call with the same request_id; None when this is the first.

        Raises:
            AlreadyExists: A name is taken by another declaration.
            InvalidArgument: The id was used for another declaration.
        """
        store = self._context.store
        found = [await store.get(keys.spec_deployment(*identity)) for identity in identities]
        existing = [
            (records_pb2.DeploymentRecord.FromString(item.value), item) for item in found if item is not None
        ]
        request_id = request.request_id
        others = request_id and any(
            record.request_id == request_id and (record.namespace, record.name) not in set(identities)
            for record in self._context.view.deployments.items.values()
        )
        same = [record.request_id == request_id for record, _ in existing] if request_id else []
        if others or any(same):
            complete = len(existing) == len(identities) and all(same) and not others
            if not complete or not _is_same(request, specs, [record for record, _ in existing]):
                raise InvalidArgument.of(
                    "request_id", "was used for another declaration; make a new UUID4 for each declaration"
                )
            return existing
        for index, item in enumerate(found):
            if item is not None:
                raise _already_exists(identities[index], index)
        return None

    def _records(
        self,
        request: _Request,
        specs: Sequence[deployment_pb2.DeploymentSpec],
        sizings: Sequence[sizing_pb2.Sizing],
        identities: Sequence[DeploymentId],
    ) -> list[records_pb2.DeploymentRecord]:
        now = to_timestamp(self._context.clock.now())
        return [
            records_pb2.DeploymentRecord(
                namespace=namespace,
                name=name,
                uid=str(uuid.uuid4()),
                generation=1,
                launch_generation=1,
                create_time=now,
                update_time=now,
                metadata=request.metadata if request.HasField("metadata") else None,
                spec=spec,
                sizing=sizing,
                request_id=request.request_id,
            )
            for (namespace, name), spec, sizing in zip(identities, specs, sizings, strict=True)
        ]

    async def _create(
        self, records: Sequence[records_pb2.DeploymentRecord], fresh: Sequence[NewKey]
    ) -> int | None:
        """Writes records and keys; returns the revision, or None when one of the names was taken."""
        paths = [keys.spec_deployment(record.namespace, record.name) for record in records]
        puts = [Put(path, record.SerializeToString()) for path, record in zip(paths, records, strict=True)]
        compares = [Compare(path, mod_revision=0) for path in paths]
        operations = await self._with_keys(puts, [key.operation for key in fresh])
        commit = await self._context.store.commit(operations, compares=compares)
        if commit.succeeded:
            return commit.revision
        if len(operations) == len(puts):
            await commit_unguarded(self._context.store, [Delete(key.operation.key) for key in fresh])
        return None

    async def _with_keys(self, guarded: Sequence[Put], new: Sequence[Put]) -> list[Operation]:
        """Puts keys into the guarded transaction; before it where both do not fit into one.

        A key that stands there alone harms nobody: its secret is shown after the transaction only.
        """
        if len(guarded) + len(new) <= TRANSACTION_OPERATIONS_MAX:
            return [*guarded, *new]
        await commit_unguarded(self._context.store, new)
        return list(guarded)

    async def _repeat(
        self, request: _Request, known: Sequence[tuple[records_pb2.DeploymentRecord, KeyValue]]
    ) -> _Response:
        """Answers a retry: the same deployments, fresh keys in place of the old ones."""
        records = [record for record, _ in known]
        namespace = records[0].namespace
        if request.validate_only:
            return self._answer(namespace, [(record, item.mod_revision) for record, item in known], None)
        identities = [(record.namespace, record.name) for record in records]
        revoked = await keys_of(self._context.store, identities)
        fresh = [new_key(identity, self._context.clock.now()) for identity in identities]
        # The records are written again as they are: whoever deletes one meanwhile has to look again, and
        # then finds the fresh key.
        puts = [Put(item.key, item.value) for _, item in known]
        compares = [Compare(item.key, mod_revision=item.mod_revision) for _, item in known]
        operations = await self._with_keys(puts, [key.operation for key in fresh])
        separate = len(operations) + len(revoked) > TRANSACTION_OPERATIONS_MAX
        if not separate:
            operations.extend(revoked)
        commit = await self._context.store.commit(operations, compares=compares)
        if not commit.succeeded:
            raise Conflict("a deployment of this declaration changed meanwhile; try again")
        if separate:
            await commit_unguarded(self._context.store, revoked)
        await self._context.view.wait_for_write(commit.revision)
        return self._answer(namespace, [(record, commit.revision) for record in records], fresh)

    def _answer(
        self,
        namespace: str,
        records: Sequence[tuple[records_pb2.DeploymentRecord, int]],
        fresh: Sequence[NewKey] | None,
    ) -> _Response:
        addresses = self._context.addresses
        return _Response(
            namespace=namespace,
            deployments=[
                scheduler_service_pb2.DeclaredDeployment(
                    deployment=self._context.view.deployment(record, revision),
                    endpoint=addresses.endpoint,
                    api_key=fresh[index].secret if fresh is not None else "",
                    watch_url=addresses.watch_url(namespace, record.name),
                    sizing=record.sizing,
                )
                for index, (record, revision) in enumerate(records)
            ],
        )


def _is_same(
    request: _Request,
    specs: Sequence[deployment_pb2.DeploymentSpec],
    records: Sequence[records_pb2.DeploymentRecord],
) -> bool:
    """Compares a retry with what was declared; what was updated since cannot be compared any more."""
    return all(
        record.generation > 1 or (record.spec == spec and record.metadata == request.metadata)
        for spec, record in zip(specs, records, strict=True)
    )


def _already_exists(identity: DeploymentId, index: int) -> AlreadyExists:
    namespace, name = identity
    return AlreadyExists(
        f"models[{index}].name: deployment `{name}` exists already in namespace `{namespace}`; choose "
        "another name, or update it",
        metadata={"namespace": namespace, "deployment": name, "field": f"models[{index}].name"},
    )


def _generated_namespace(request_id: str) -> str:
    """Makes a namespace; the same one for a retry, so that it finds what the first call wrote."""
    if request_id:
        digest = hashlib.sha256(request_id.lower().encode()).digest()
        letters = (_NAMESPACE_ALPHABET[byte % 32] for byte in digest[:_NAMESPACE_RANDOM])
    else:
        letters = (secrets.choice(_NAMESPACE_ALPHABET) for _ in range(_NAMESPACE_RANDOM))
    return "ns-" + "".join(letters)
