"""Deployments, read and changed one at a time: get, list, update, scale, restart, delete.

In come checked requests, out go guarded writes of `spec/deployments` and resources with their status.
A change without etag is read, changed and written again when somebody was faster; one with an etag is
refused instead. The spec is changed by users only, and only here.
"""

from collections.abc import Awaitable, Callable
from typing import Literal, TypeAlias

from google.protobuf.field_mask_pb2 import FieldMask
from millrace.core.v1 import deployment_pb2, types_pb2
from millrace.scheduler.v1 import scheduler_service_pb2 as messages
from millrace.state.v1 import records_pb2

from controlplane.api import limits, validation
from controlplane.api.context import TRANSACTION_OPERATIONS_MAX, ApiContext, commit_unguarded
from controlplane.api.fitting import check_fitting, size_one
from controlplane.api.idempotency import Answer
from controlplane.api.keyring import keys_of
from controlplane.api.paging import Position, position_of
from controlplane.api.view import deployment_not_found, require_identity
from core.clock import to_timestamp
from core.errors import Conflict, InvalidArgument, OutOfRange
from core.store import keys
from core.store.types import Compacted, Compare, Delete, KeyValue, Page, Put, Store

POLICY_FIELDS: tuple[Literal["replicas", "priority", "placement", "rollout", "autoscale", "routing"], ...]
POLICY_FIELDS = ("replicas", "priority", "placement", "rollout", "autoscale", "routing")
"""Fields that no engine is started with: changing them restarts nothing."""

SPEC_FIELDS = tuple(field.name for field in deployment_pb2.DeploymentSpec.DESCRIPTOR.fields)

_Mutation: TypeAlias = (
    messages.UpdateDeploymentRequest
    | messages.ScaleDeploymentRequest
    | messages.RestartDeploymentRequest
    | messages.DeleteDeploymentRequest
)
_Change = Callable[[deployment_pb2.DeploymentSpec], deployment_pb2.DeploymentSpec]


class Deployments:
    """Reads and changes deployments."""

    def __init__(self, context: ApiContext) -> None:
        self._context = context

    def get(self, request: messages.GetDeploymentRequest) -> messages.GetDeploymentResponse:
        """Gets one deployment.

        Raises:
            NotFound: There is none.
        """
        view = self._context.view
        record = view.record(request.namespace, request.name)
        revision = view.deployments.revision_of(keys.spec_deployment(request.namespace, request.name))
        return messages.GetDeploymentResponse(deployment=view.deployment(record, revision))

    async def list(self, request: messages.ListDeploymentsRequest) -> messages.ListDeploymentsResponse:
        """Lists a page: which deployments there are, and their specs, as of one revision; status as of now.

        Raises:
            InvalidArgument: namespace, page_size or page_token is wrong.
            OutOfRange: The snapshot has been compacted.
        """
        size = validation.page_size_of(request.page_size)
        validation.check_namespace_filter(request.namespace)
        view = self._context.view
        view.require_synced()
        # Read first: a status may be newer than the version that is told, never older.
        known_revision = view.revision
        position = position_of(request.page_token, keys.spec_deployments(request.namespace))
        page = await read_page(self._context.store, position, size)
        response = messages.ListDeploymentsResponse(
            next_page_token=next_token(position, page),
            resource_version=str(min(known_revision, page.revision)),
        )
        size_bytes = 0
        for item in page.items:
            record = records_pb2.DeploymentRecord.FromString(item.value)
            resource = view.deployment(record, item.mod_revision)
            size_bytes += resource.ByteSize()
            if response.deployments and size_bytes > limits.PAGE_BYTES_MAX:
                last = response.deployments[-1]
                key = keys.spec_deployment(last.namespace, last.name)
                response.next_page_token = Position(position.prefix, key, page.revision).token()
                break
            response.deployments.append(resource)
        return response

    async def update(self, request: messages.UpdateDeploymentRequest) -> messages.UpdateDeploymentResponse:
        """Changes fields of a spec.

        Raises:
            InvalidArgument: A field is wrong.
            NotFound: There is no such deployment.
            Conflict: The etag is not the current one.
            FailedPrecondition: No known node could ever hold the model.
        """
        paths = _masked_fields(request)

        async def call() -> messages.UpdateDeploymentResponse:
            deployment = await self._change(
                request.namespace,
                request.name,
                request.etag,
                lambda spec: _masked(spec, request.spec, paths),
                validate_only=request.validate_only,
                prefix="spec.",
            )
            return messages.UpdateDeploymentResponse(deployment=deployment)

        return await self._once(request, call)

    async def scale(self, request: messages.ScaleDeploymentRequest) -> messages.ScaleDeploymentResponse:
        """Changes the number of replicas.

        Raises:
            InvalidArgument: The number is out of range.
            NotFound: There is no such deployment.
            Conflict: The etag is not the current one.
        """

        def scaled(spec: deployment_pb2.DeploymentSpec) -> deployment_pb2.DeploymentSpec:
            changed = deployment_pb2.DeploymentSpec()
            changed.CopyFrom(spec)
            changed.replicas = request.replicas
            return changed

        async def call() -> messages.ScaleDeploymentResponse:
            deployment = await self._change(
                request.namespace,
                request.name,
                request.etag,
                scaled,
                validate_only=request.validate_only,
                prefix="",
            )
            return messages.ScaleDeploymentResponse(deployment=deployment)

        return await self._once(request, call)

    async def restart(self, request: messages.RestartDeploymentRequest) -> messages.RestartDeploymentResponse:
        """Has every replica replaced by a new one of the same spec.

        Raises:
            NotFound: There is no such deployment.
            Conflict: The etag is not the current one.
        """

        async def call() -> messages.RestartDeploymentResponse:
            deployment = await self._change(
                request.namespace,
                request.name,
                request.etag,
                lambda spec: spec,
                validate_only=request.validate_only,
                prefix="",
                restart=True,
            )
            return messages.RestartDeploymentResponse(deployment=deployment)

        return await self._once(request, call)

    async def delete(self, request: messages.DeleteDeploymentRequest) -> messages.DeleteDeploymentResponse:
        """Deletes a deployment and its keys.

        Raises:
            NotFound: There is no such deployment.
            Conflict: The etag is not the current one.
        """

        async def call() -> messages.DeleteDeploymentResponse:
            await self._delete(request)
            return messages.DeleteDeploymentResponse()

        return await self._once(request, call)

    async def _delete(self, request: messages.DeleteDeploymentRequest) -> None:
        store, identity = self._context.store, (request.namespace, request.name)
        for _ in range(limits.COMMIT_ATTEMPTS_MAX):
            item = await self._read(request.namespace, request.name, request.etag)
            if request.validate_only:
                return
            revoked = await keys_of(store, [identity])
            guarded = revoked[: TRANSACTION_OPERATIONS_MAX - 1]
            commit = await store.commit(
                [Delete(item.key), *guarded], compares=[Compare(item.key, mod_revision=item.mod_revision)]
            )
            if not commit.succeeded:
                continue
            await commit_unguarded(store, revoked[len(guarded) :])
            self._context.events.emit(
                namespace=request.namespace,
                deployment=request.name,
                reason="Deleted",
                message=f"deleted with {len(revoked)} key(s); its replicas drain and stop",
                source="api",
            )
            await self._context.view.wait_for_write(commit.revision)
            return
        raise _contended(request.namespace, request.name)

    async def _change(
        self,
        namespace: str,
        name: str,
        etag: str,
        change: _Change,
        *,
        validate_only: bool,
        prefix: str,
        restart: bool = False,
    ) -> deployment_pb2.Deployment:
        context = self._context
        context.view.require_synced()
        for _ in range(limits.COMMIT_ATTEMPTS_MAX):
            item = await self._read(namespace, name, etag)
            before = records_pb2.DeploymentRecord.FromString(item.value)
            if restart:
                record = self._restarted(before)
            else:
                record = await self._changed(before, change(before.spec), prefix)
            if validate_only or record is before:
                return context.view.deployment(record, item.mod_revision)
            commit = await context.store.commit(
                [Put(item.key, record.SerializeToString())],
                compares=[Compare(item.key, mod_revision=item.mod_revision)],
            )
            if not commit.succeeded:
                continue
            context.events.emit(
                namespace=namespace,
                deployment=name,
                reason="Restarted" if restart else "SpecChanged",
                message=(
                    f"restarted, generation {record.generation}"
                    if restart
                    else _difference(before.spec, record.spec, record.generation)
                ),
                source="api",
            )
            await context.view.wait_for_write(commit.revision)
            return context.view.deployment(record, commit.revision)
        raise _contended(namespace, name)

    async def _changed(
        self, before: records_pb2.DeploymentRecord, spec: deployment_pb2.DeploymentSpec, prefix: str
    ) -> records_pb2.DeploymentRecord:
        """Returns the record after a change; the same object when nothing changes."""
        spec = validation.with_defaults(spec)
        violations = validation.Violations()
        validation.check_spec(spec, prefix, violations)
        violations.raise_if_any()
        if spec == before.spec:
            return before
        record = records_pb2.DeploymentRecord()
        record.CopyFrom(before)
        record.spec.CopyFrom(spec)
        record.generation += 1
        record.update_time.CopyFrom(to_timestamp(self._context.clock.now()))
        if needs_new_engines(before.spec, spec):
            record.sizing.CopyFrom(await size_one(self._context, spec, before.namespace, prefix))
            record.launch_generation += 1
        else:
            check_fitting(self._context, spec, before, prefix)
        return record

    def _restarted(self, before: records_pb2.DeploymentRecord) -> records_pb2.DeploymentRecord:
        """Returns the record one launch generation on."""
        record = records_pb2.DeploymentRecord()
        record.CopyFrom(before)
        record.generation += 1
        record.launch_generation += 1
        record.update_time.CopyFrom(to_timestamp(self._context.clock.now()))
        return record

    async def _read(self, namespace: str, name: str, etag: str) -> KeyValue:
        require_identity(namespace, name)
        item = await self._context.store.get(keys.spec_deployment(namespace, name))
        if item is None:
            raise deployment_not_found(namespace, name)
        check_etag(etag, str(item.mod_revision), {"namespace": namespace, "deployment": name})
        return item

    async def _once(self, request: _Mutation, call: Callable[[], Awaitable[Answer]]) -> Answer:
        violations = validation.Violations()
        validation.check_request_id(request.request_id, violations)
        violations.raise_if_any()
        return await self._context.memory.once(request.request_id, request, call)


def check_etag(given: str, current: str, metadata: dict[str, str]) -> None:
    """Compares an etag.

    Raises:
        Conflict: It is given and not the current one.
    """
    if given and given != current:
        raise Conflict(
            f"etag `{given[:64]}` is not the current one (`{current}`); read the resource again",
            reason="ERROR_REASON_ETAG_MISMATCH",
            metadata={**metadata, "etag": given[:64], "current_etag": current},
        )


async def read_page(store: Store, position: Position, size: int) -> Page:
    """Reads a page at the revision of its listing.

    Raises:
        OutOfRange: That revision has been compacted.
    """
    try:
        return await store.list(
            position.prefix, start_after=position.start_after, limit=size, revision=position.revision
        )
    except Compacted as error:
        raise OutOfRange(
            "the snapshot of this page_token has been compacted; list again from the first page",
            metadata={"resource_version": str(position.revision)},
        ) from error


def next_token(position: Position, page: Page) -> str:
    """Returns the token of the page after; empty at the end."""
    return Position(position.prefix, page.items[-1].key, page.revision).token() if page.more else ""


def _masked_fields(request: messages.UpdateDeploymentRequest) -> tuple[str, ...]:
    """Returns the fields to change: those of the mask, or the populated ones."""
    mask: FieldMask = request.update_mask
    paths = tuple(mask.paths)
    if not request.HasField("update_mask") or not paths:
        return tuple(field.name for field, _ in request.spec.ListFields())
    if paths == ("*",):
        return SPEC_FIELDS
    for path in paths:
        if path not in SPEC_FIELDS:
            raise InvalidArgument.of(
                "update_mask",
                f"`{path[:80]}` is no field of the spec; use {', '.join(SPEC_FIELDS)}, or `*` alone for all",
            )
    return paths


def _masked(
    spec: deployment_pb2.DeploymentSpec, new: deployment_pb2.DeploymentSpec, paths: tuple[str, ...]
) -> deployment_pb2.DeploymentSpec:
    """Takes the named fields from `new`; a field that is not set there falls back to its default."""
    changed = deployment_pb2.DeploymentSpec()
    changed.CopyFrom(spec)
    populated = {field.name: value for field, value in new.ListFields()}
    # The number of an external deployment's replicas follows its URLs unless it is given as well.
    external = types_pb2.ENGINE_EXTERNAL in {spec.engine, populated.get("engine") if "engine" in paths else 0}
    if external and {"extra_args", "engine"} & set(paths) and changed.replicas != 0:
        changed.ClearField("replicas")
    for path in paths:
        changed.ClearField(path)  # type: ignore[arg-type]  # checked against SPEC_FIELDS
    taken = {path: populated[path] for path in paths if path in populated}
    changed.MergeFrom(deployment_pb2.DeploymentSpec(**taken))
    return changed


def needs_new_engines(before: deployment_pb2.DeploymentSpec, after: deployment_pb2.DeploymentSpec) -> bool:
    """Tells whether anything differs that an engine is started with."""
    old, new = deployment_pb2.DeploymentSpec(), deployment_pb2.DeploymentSpec()
    old.CopyFrom(before)
    new.CopyFrom(after)
    for field in POLICY_FIELDS:
        old.ClearField(field)
        new.ClearField(field)
    return old != new


def _difference(
    before: deployment_pb2.DeploymentSpec, after: deployment_pb2.DeploymentSpec, generation: int
) -> str:
    changed = [
        name
        for name in SPEC_FIELDS
        if getattr(before, name) != getattr(after, name)
        # max_model_len and the like tell unset and zero apart.
        or (
            deployment_pb2.DeploymentSpec.DESCRIPTOR.fields_by_name[name].has_presence
            and before.HasField(name) != after.HasField(name)  # type: ignore[arg-type]  # a name of the descriptor
        )
    ]
    if changed == ["replicas"]:
        return f"scaled from {before.replicas} to {after.replicas} replica(s), generation {generation}"
    return f"changed {', '.join(changed)}, generation {generation}"


def _contended(namespace: str, name: str) -> Conflict:
    return Conflict(
        f"deployment `{name}` changed {limits.COMMIT_ATTEMPTS_MAX} times while this call tried; try again",
        metadata={"namespace": namespace, "deployment": name},
    )
