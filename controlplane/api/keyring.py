"""API keys of deployments: made, found, revoked. Only hashes are ever stored.

In come deployments, out come the store's operations that belong into the transaction of the deployment
itself. It decides nothing about who may call what.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime

from millrace.state.v1 import records_pb2

from controlplane.api.view import DeploymentId
from core.clock import to_timestamp
from core.identity import display_prefix, generate_api_key, hash_secret
from core.store import keys
from core.store.types import Delete, Put, Store


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key that was just made.

    Attributes:
        secret: Shown to the caller once.
        operation: Stores its hash.
    """

    secret: str = field(repr=False)
    operation: Put


def new_key(identity: DeploymentId, moment: datetime) -> NewKey:
    """Makes a key for a deployment."""
    namespace, name = identity
    secret = generate_api_key()
    key_hash = hash_secret(secret)
    record = records_pb2.ApiKeyRecord(
        key_hash=key_hash,
        display_prefix=display_prefix(secret),
        namespace=namespace,
        deployment=name,
        create_time=to_timestamp(moment),
    )
    return NewKey(secret, Put(keys.spec_key(key_hash), record.SerializeToString()))


async def keys_of(store: Store, identities: Iterable[DeploymentId]) -> list[Delete]:
    """Returns the operations that revoke every key of some deployments.

    Read from the store, not from a view: a key that a lagging view misses would outlive its deployment.
    """
    wanted = frozenset(identities)
    page = await store.list(keys.SPEC_KEYS)
    revoked: list[Delete] = []
    for item in page.items:
        record = records_pb2.ApiKeyRecord.FromString(item.value)
        if (record.namespace, record.deployment) in wanted:
            revoked.append(Delete(item.key))
    return revoked
