"""What picking needs of the endpoints of one choice, in columns: worked out once, used by many requests.

In come endpoints that may be used and the table of samples, out come tuples and lists in the endpoints'
order. What hangs on samples is worked out again when a sample has come or gone stale; what hangs on the
endpoints alone never changes. It decides nothing and counts nothing.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

from router.picking.full_cache_guard import KV_USAGE_MAX
from router.picking.neutral import filled
from router.picking.prefill_ledger import Line, PrefillLedger
from router.prefix.chain import DEFAULT_BLOCK_TOKENS, GRAIN_TOKENS, routing_block_tokens
from router.prefix.index import Identity, PrefixIndex
from router.upstream.loads import Load, LoadTable
from router.view.samples import Sample, SampleTable
from router.view.view import Endpoint


class Columns:
    """Endpoints of one deployment, column by column.

    Attributes:
        endpoints: In their order.
        deployment: Namespace and name; of the first endpoint, as all belong to one deployment.
        replicas: Their ids.
        names: The same as bytes, for rendezvous hashing.
        identities: Replica and incarnation of each.
        ordered: True where replicas stand in the order of their ids, as a view has them.
        even: True where all weights are equal.
        positions: All of them, in order.
        loads: What counts own requests at each; empty before `bind`.
        lines: What each has not computed yet; empty before `bind`.
        samples: Fresh sample of each; None is unknown.
        capacities: Tokens that the cache of each holds; 0 where that is not known.
        others: Requests that others have there, where the engine tells.
        filled_others: The same, unknown ones replaced by the mean.
        others_total: Sum of the known ones.
        roomy: Positions of those that the full-cache guard keeps; None for all of them.
        block_tokens: Tokens of a block as routing counts; of the default unless all engines that tell agree.
        bits: Of each in the prefix index.
        pressures: How fast the cache of each turns over, by the prefix index; never changed, only replaced.
        uncached_weights: What is made of `pressures` for all endpoints; None before it is.
    """

    __slots__ = (
        "_generation",
        "_loads_version",
        "_oldest_seconds",
        "_recorded",
        "_version",
        "bits",
        "block_tokens",
        "capacities",
        "deployment",
        "endpoints",
        "even",
        "filled_others",
        "identities",
        "lines",
        "loads",
        "names",
        "ordered",
        "others",
        "others_total",
        "positions",
        "pressures",
        "replicas",
        "roomy",
        "samples",
        "uncached_weights",
    )

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        """Takes at least one endpoint."""
        self.endpoints = tuple(endpoints)
        self.deployment = (self.endpoints[0].namespace, self.endpoints[0].deployment)
        self.replicas = tuple(each.replica for each in self.endpoints)
        self.names = tuple(each.replica.encode() for each in self.endpoints)
        self.identities: tuple[Identity, ...] = tuple(each.identity for each in self.endpoints)
        self.ordered = all(one < two for one, two in pairwise(self.replicas))
        self.even = len({each.weight for each in self.endpoints}) == 1
        self.positions = list(range(len(self.endpoints)))
        self.loads: list[Load] = []
        self.lines: list[Line] = []
        self._loads_version = -1
        self.samples: list[Sample | None] = []
        self.capacities: list[int] = []
        self.others: list[int | None] = []
        self.filled_others: list[float] = []
        self.others_total = 0
        self.roomy: list[int] | None = None
        self.block_tokens = GRAIN_TOKENS
        self.bits: list[int] = []
        self._version = -1
        self._oldest_seconds = math.inf
        self.pressures: list[float] = []
        self.uncached_weights: list[float] | None = None
        self._generation = -1
        self._recorded = 0

    def bind(self, loads: LoadTable, ledger: PrefillLedger) -> None:
        """Takes what counts requests and tokens at each endpoint, and takes it anew where it was replaced."""
        if self._loads_version != loads.version:
            self._loads_version = loads.version
            self.loads = [loads.of(each) for each in self.replicas]
            # A ledger forgets lines only with the columns of its selector.
            self.lines = [ledger.of(each) for each in self.replicas]

    def refresh_sizes(self, table: SampleTable) -> None:
        """Works out again what hangs on samples of any age, where one has come or gone since."""
        if self._version != table.version:
            self._read(table)

    def refresh(self, table: SampleTable) -> None:
        """Works out again what hangs on samples, where one has come or gone stale since."""
        if self._version != table.version or table.any_stale(self._oldest_seconds):
            self._read(table)

    def _read(self, table: SampleTable) -> None:
        self._version = table.version
        self.samples = [table.fresh(replica, incarnation) for replica, incarnation in self.identities]
        known = [each for each in self.samples if each is not None]
        self._oldest_seconds = min((each.taken_seconds for each in known), default=math.inf)
        self.others = [None if each is None else each.others_in_flight for each in self.samples]
        self.filled_others = [float(each) for each in filled(self.others)]
        self.others_total = sum(each for each in self.others if each is not None)
        roomy = [at for at, each in enumerate(self.samples) if _has_room(each)]
        self.roomy = roomy if 0 < len(roomy) < len(self.samples) else None
        sizes, capacities = set(), []
        for replica, incarnation in self.identities:
            sample = table.latest(replica, incarnation)
            if sample is not None and sample.kv_block_tokens is not None:
                sizes.add(sample.kv_block_tokens)
            capacities.append(0 if sample is None else sample.kv_cache_tokens or 0)
        self.capacities = capacities
        self.block_tokens = routing_block_tokens(sizes.pop() if len(sizes) == 1 else DEFAULT_BLOCK_TOKENS)

    def refresh_bits(self, index: PrefixIndex) -> None:
        """Reads again what the index tells of the endpoints, where that has changed.

        Pressures change with every request, but little: they are read once in as many as there are endpoints,
        so that a request pays for one of them.
        """
        if self._generation != index.generation:
            self._generation = index.generation
            self.bits = index.bits(self.identities)
            self._recorded = index.recorded - len(self.bits)
        if index.recorded - self._recorded >= len(self.bits):
            self._recorded = index.recorded
            self.pressures = index.pressures(self.bits)
            self.uncached_weights = None


def _has_room(sample: Sample | None) -> bool:
    usage = None if sample is None else sample.kv_usage_ratio
    return usage is None or usage < KV_USAGE_MAX
