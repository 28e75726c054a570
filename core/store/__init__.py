"""Where desired and actual state is kept: a small key-value contract with two implementations.

`Store` (types.py) is the contract: point reads, consistent ranges, guarded transactions, leases and
watches. `EtcdStore` speaks to etcd over gRPC; `MemoryStore` is its in-process twin for tests and
simulations. `Mirror` keeps a prefix in memory by list-then-watch and knows its age, `Presence` keeps
keys alive under a lease, `Leadership` elects one leader with a fencing token.
"""

from core.store.checks import MAXIMUM_OPERATIONS
from core.store.election import Leadership
from core.store.embedded import find_etcd_binary
from core.store.etcd import EtcdStore
from core.store.etcd_settings import EtcdSettings
from core.store.lease import Presence
from core.store.memory import MemoryStore
from core.store.mirror import Mirror
from core.store.types import (
    Commit,
    Compacted,
    Compare,
    Delete,
    KeyValue,
    Lease,
    LeaseLost,
    Operation,
    Page,
    Put,
    Store,
    StoreError,
    StoreUnavailable,
    WatchBatch,
    WatchEvent,
)

__all__ = [
    "MAXIMUM_OPERATIONS",
    "Commit",
    "Compacted",
    "Compare",
    "Delete",
    "EtcdSettings",
    "EtcdStore",
    "KeyValue",
    "Leadership",
    "Lease",
    "LeaseLost",
    "MemoryStore",
    "Mirror",
    "Operation",
    "Page",
    "Presence",
    "Put",
    "Store",
    "StoreError",
    "StoreUnavailable",
    "WatchBatch",
    "WatchEvent",
    "find_etcd_binary",
]
