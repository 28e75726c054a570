"""Namespaces: list, get, update; what operators and users want of a tenant.

In come requests, out go `spec/namespaces` records. A namespace exists as soon as it is named, so that one of
which nothing was said is got as an empty one. Routers read the aliases, the scheduler reads the quota;
nothing is enforced here.
"""

from millrace.core.v1 import policy_pb2
from millrace.scheduler.v1 import scheduler_service_pb2 as messages
from millrace.state.v1 import records_pb2

from controlplane.api import limits, validation
from controlplane.api.context import ApiContext
from controlplane.api.deployments import check_etag, next_token, read_page
from controlplane.api.paging import position_of
from controlplane.api.routing import check_namespace_spec
from core.errors import Conflict, InvalidArgument
from core.store import keys
from core.store.types import Compare, Put

SPEC_FIELDS = tuple(field.name for field in policy_pb2.NamespaceSpec.DESCRIPTOR.fields)


class Namespaces:
    """Reads namespaces and says what is wanted of them."""

    def __init__(self, context: ApiContext) -> None:
        self._context = context

    async def list(self, request: messages.ListNamespacesRequest) -> messages.ListNamespacesResponse:
        """Lists a page of the namespaces of which something was said.

        Raises:
            InvalidArgument: page_size or page_token is wrong.
            OutOfRange: The snapshot has been compacted.
        """
        size = validation.page_size_of(request.page_size)
        position = position_of(request.page_token, keys.SPEC_NAMESPACES)
        page = await read_page(self._context.store, position, size)
        return messages.ListNamespacesResponse(
            namespaces=[
                _resource(records_pb2.NamespaceRecord.FromString(item.value), item.mod_revision)
                for item in page.items
            ],
            next_page_token=next_token(position, page),
        )

    async def get(self, request: messages.GetNamespaceRequest) -> messages.GetNamespaceResponse:
        """Gets one namespace.

        Raises:
            InvalidArgument: No namespace can have that name.
        """
        _require_name(request.name)
        record, revision = await self._read(request.name)
        return messages.GetNamespaceResponse(namespace=_resource(record, revision))

    async def update(self, request: messages.UpdateNamespaceRequest) -> messages.UpdateNamespaceResponse:
        """Changes quota and aliases.

        Raises:
            InvalidArgument: A field is wrong.
            Conflict: The etag is not the current one, or the namespace changes faster than this call.
        """

        async def call() -> messages.UpdateNamespaceResponse:
            return messages.UpdateNamespaceResponse(namespace=await self._change(request))

        violations = validation.Violations()
        validation.check_request_id(request.request_id, violations)
        violations.raise_if_any()
        _require_name(request.name)
        return await self._context.memory.once(request.request_id, request, call)

    async def _change(self, request: messages.UpdateNamespaceRequest) -> policy_pb2.Namespace:
        context, name = self._context, request.name
        context.view.require_synced()
        fields = _fields_of(request)
        for _ in range(limits.COMMIT_ATTEMPTS_MAX):
            record, revision = await self._read(name)
            check_etag(request.etag, str(revision), {"namespace": name})
            before = record.SerializeToString(deterministic=True)
            for field in fields:
                record.spec.ClearField(field)  # type: ignore[arg-type]  # a name of the message
                _copy(request.spec, record.spec, field)
            self._check(record)
            after = record.SerializeToString(deterministic=True)
            if request.validate_only or before == after:
                return _resource(record, revision)
            key = keys.spec_namespace(name)
            commit = await context.store.commit(
                [Put(key, after)], compares=[Compare(key, mod_revision=revision)]
            )
            if not commit.succeeded:
                continue
            context.events.emit(
                namespace=name,
                reason="NamespaceChanged",
                message=_difference(record.spec, fields),
                source="api",
            )
            return _resource(record, commit.revision)
        raise Conflict(
            f"namespace `{name}` changed {limits.COMMIT_ATTEMPTS_MAX} times while this call tried; try again",
            metadata={"namespace": name},
        )

    def _check(self, record: records_pb2.NamespaceRecord) -> None:
        existing = {
            each.name
            for each in self._context.view.deployments.items.values()
            if each.namespace == record.namespace
        }
        violations = validation.Violations()
        check_namespace_spec(record.spec, existing, violations)
        violations.raise_if_any()

    async def _read(self, name: str) -> tuple[records_pb2.NamespaceRecord, int]:
        item = await self._context.store.get(keys.spec_namespace(name))
        if item is None:
            return records_pb2.NamespaceRecord(namespace=name), 0
        return records_pb2.NamespaceRecord.FromString(item.value), item.mod_revision


def _require_name(name: str) -> None:
    violations = validation.Violations()
    validation.check_namespace(name, violations, field="name")
    violations.raise_if_any()


def _fields_of(request: messages.UpdateNamespaceRequest) -> tuple[str, ...]:
    """Returns which fields are replaced."""
    paths = tuple(dict.fromkeys(request.update_mask.paths))
    if paths == ("*",):
        return SPEC_FIELDS
    unknown = [path for path in paths if path not in SPEC_FIELDS]
    if unknown:
        raise InvalidArgument.of(
            "update_mask", f"`{unknown[0][:80]}` is no field; use {', '.join(SPEC_FIELDS)}, or `*` alone"
        )
    return paths or tuple(field.name for field, _ in request.spec.ListFields())


def _copy(source: policy_pb2.NamespaceSpec, target: policy_pb2.NamespaceSpec, field: str) -> None:
    if field == "aliases":
        target.aliases.extend(source.aliases)
    elif source.HasField("quota"):
        target.quota.CopyFrom(source.quota)


def _difference(spec: policy_pb2.NamespaceSpec, fields: tuple[str, ...]) -> str:
    told = []
    if "quota" in fields:
        bounds = [f"{value} {field.name}" for field, value in spec.quota.ListFields()]
        told.append(f"quota {', '.join(bounds)}" if bounds else "no quota")
    if "aliases" in fields:
        told.append(f"aliases {', '.join(each.name for each in spec.aliases[:10]) or 'none'}")
    return "; ".join(told)


def _resource(record: records_pb2.NamespaceRecord, revision: int) -> policy_pb2.Namespace:
    return policy_pb2.Namespace(name=record.namespace, spec=record.spec, etag=str(revision))
