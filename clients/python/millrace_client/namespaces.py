"""Calls that speak of namespaces: quota and aliases of a tenant. Part of the client.

In come names and specs, out come `Namespace` messages or an error of `errors`, as for all calls of the
client.
"""

import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING

from google.protobuf.field_mask_pb2 import FieldMask
from millrace.core.v1.policy_pb2 import Namespace, NamespaceSpec
from millrace.scheduler.v1 import scheduler_service_pb2 as messages

from millrace_client import errors
from millrace_client.calling import Caller

if TYPE_CHECKING:
    from millrace.scheduler.v1.scheduler_service_pb2_grpc import SchedulerServiceAsyncStub

# The largest page that the server gives.
PAGE_SIZE = 1000
# An endless list is a broken server: a million entries are beyond any cluster.
PAGES_MAX = 1000


class NamespaceCalls:
    """What the client can be asked about namespaces."""

    _caller: Caller
    _stub: "SchedulerServiceAsyncStub"

    async def namespaces(self) -> tuple[Namespace, ...]:
        """Lists the namespaces of which something was said, every page of them."""
        found: tuple[Namespace, ...] = ()
        token = ""
        for _ in range(PAGES_MAX):
            request = messages.ListNamespacesRequest(page_size=PAGE_SIZE, page_token=token)
            page = await self._caller.call(self._stub.ListNamespaces, request)
            found += tuple(page.namespaces)
            token = page.next_page_token
            if not token:
                return found
        raise errors.ServerFault(f"the list of namespaces does not end after {PAGES_MAX} pages")

    async def namespace(self, name: str) -> Namespace:
        """Gets a namespace; one of which nothing was said has an empty spec.

        Raises:
            InvalidArgument: No namespace can have that name.
        """
        request = messages.GetNamespaceRequest(name=name)
        return (await self._caller.call(self._stub.GetNamespace, request)).namespace

    async def update_namespace(
        self,
        name: str,
        spec: NamespaceSpec,
        *,
        fields: Sequence[str],
        etag: str = "",
        validate_only: bool = False,
    ) -> Namespace:
        """Replaces fields of a namespace's spec: `quota`, `aliases`.

        Raises:
            InvalidArgument: A field is wrong.
            Conflict: The etag is not the current one.
        """
        request = messages.UpdateNamespaceRequest(
            name=name,
            spec=spec,
            update_mask=FieldMask(paths=fields),
            etag=etag,
            request_id=str(uuid.uuid4()),
            validate_only=validate_only,
        )
        return (await self._caller.call(self._stub.UpdateNamespace, request)).namespace
