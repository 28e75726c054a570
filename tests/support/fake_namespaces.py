"""The namespaces of the fake scheduler: kept, versioned, with an etag that is checked."""

from functools import cached_property
from typing import Any

from google.protobuf.message import Message
from millrace.core.v1.policy_pb2 import Namespace
from millrace.scheduler.v1 import scheduler_service_pb2 as messages

from core import errors

NAMESPACE_READS = ("ListNamespaces", "GetNamespace")
NAMESPACE_WRITES = ("UpdateNamespace",)


class FakeNamespaces:
    """Part of `FakeScheduler`."""

    @cached_property
    def kept_namespaces(self) -> dict[str, Namespace]:
        """By name; those of which something was said."""
        return {}

    async def _begin(self, method: str, request: Message) -> None:
        raise NotImplementedError

    async def ListNamespaces(  # noqa: N802 - the contract's spelling
        self, request: messages.ListNamespacesRequest, context: Any
    ) -> messages.ListNamespacesResponse:
        await self._begin("ListNamespaces", request)
        names = sorted(self.kept_namespaces)
        start = int(request.page_token or 0)
        return messages.ListNamespacesResponse(
            namespaces=[self.kept_namespaces[name] for name in names[start : start + 2]],
            next_page_token=str(start + 2) if start + 2 < len(names) else "",
        )

    async def GetNamespace(  # noqa: N802 - the contract's spelling
        self, request: messages.GetNamespaceRequest, context: Any
    ) -> messages.GetNamespaceResponse:
        await self._begin("GetNamespace", request)
        known = self.kept_namespaces.get(request.name)
        return messages.GetNamespaceResponse(namespace=known or Namespace(name=request.name, etag="0"))

    async def UpdateNamespace(  # noqa: N802 - the contract's spelling
        self, request: messages.UpdateNamespaceRequest, context: Any
    ) -> messages.UpdateNamespaceResponse:
        await self._begin("UpdateNamespace", request)
        kept = self.kept_namespaces.setdefault(request.name, Namespace(name=request.name, etag="0"))
        if request.etag != kept.etag:
            raise errors.Conflict("the etag is not the current one")
        for field in request.update_mask.paths:
            kept.spec.ClearField(field)  # type: ignore[arg-type]  # a name of the message
        if "quota" in request.update_mask.paths and request.spec.HasField("quota"):
            kept.spec.quota.CopyFrom(request.spec.quota)
        if "aliases" in request.update_mask.paths:
            kept.spec.aliases.extend(request.spec.aliases)
        kept.etag = str(int(kept.etag) + 1)
        return messages.UpdateNamespaceResponse(namespace=kept)
