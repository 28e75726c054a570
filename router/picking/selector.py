"""Everything that picking needs beside the plug-ins: own counts, pending prefill, the prefix index.

In come a request and the endpoints that may be used, out comes one of them (`choose`); what is sent to it
is counted before the await and learned by the index (`send`), and released exactly once (`Flight`). One a
worker, on the event loop, without I/O. The trace benchmark drives this very class in virtual time.
"""

from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from router.picking.columns import Columns
from router.picking.compiled import compile_strategy
from router.picking.contract import CacheKnowledge, Candidate, RequestContext, Strategy
from router.picking.decision import Decision
from router.picking.prefill_ledger import Entry, PrefillLedger
from router.prefix.chain import Digest
from router.prefix.exact.index import ExactIndex
from router.prefix.exact.tokens import ExactPrompt
from router.prefix.index import DEFAULT_CAPACITY_BLOCKS, PrefixIndex
from router.prefix.prompt import NO_PROMPT, Prompt, read_prompt
from router.upstream.loads import Load, LoadTable
from router.view.samples import SampleTable
from router.view.view import Endpoint

# Room for about 350,000 blocks of 64 tokens: twice the KV caches of some 40 large engines.
INDEX_BYTES_MAX = 64 * 1024 * 1024
# Sets of endpoints whose columns are kept: one a deployment, and those without an endpoint that failed. All
# are dropped together, since working them out again takes microseconds.
_COLUMNS_MAX = 1024


class Flight(Entry):
    """A request on its way: counted from its making until `close`."""

    __slots__ = ("_open", "_selector", "key", "load")

    def __init__(
        self, selector: "Selector", replica: str, tokens: int, key: Digest | None, load: Load
    ) -> None:
        super().__init__(replica, tokens)
        self._selector = selector
        self._open = True
        self.key = key
        self.load = load

    def first_byte(self) -> None:
        """The engine has computed the prompt."""
        self._selector.ledger.computed(self)

    def close(self) -> None:
        """Releases the counts; again does nothing."""
        if self._open:
            self._open = False
            self._selector.landed(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Selector:
    """Picks endpoints by a strategy.

    Attributes:
        index: Who probably holds which prefix.
        ledger: Prompt tokens that are not computed yet.
        exact: What engines themselves say; None for the approximate index alone.
        strategy: By which it picks.
        decision: The latest choice, for whoever keeps it; None before the first.
    """

    def __init__(
        self,
        strategy: Strategy,
        *,
        loads: LoadTable,
        samples: SampleTable,
        index_bytes_max: int = INDEX_BYTES_MAX,
        exact: ExactIndex | None = None,
    ) -> None:
        self.index = PrefixIndex(bytes_max=index_bytes_max)
        self.ledger = PrefillLedger()
        self.exact = exact
        self.strategy = strategy
        self.decision: Decision | None = None
        self._compiled = compile_strategy(strategy)
        # By prefix key, then by replica.
        self._alike: dict[Digest, dict[str, int]] = {}
        self._loads = loads
        self._samples = samples
        # By the identity of a view's own tuple; a tuple that is kept cannot lend its id to another.
        self._of_tuple: dict[int, tuple[Sequence[Endpoint], Columns]] = {}
        self._of_members: dict[tuple[int, ...], Columns] = {}
        # The latest tuple and candidate: most often the next question is about the same.
        self._tuple: Sequence[Endpoint] | None = None
        self._columns_of_tuple: Columns | None = None
        self._candidate: Candidate | None = None

    def read_prompt(
        self, document: Mapping[str, Any], endpoints: Sequence[Endpoint], *, namespace: str, deployment: str
    ) -> Prompt:
        """Reads a request's prompt; an empty one where the strategy has no use for it."""
        if not self.strategy.reads_prompt:
            return NO_PROMPT
        block_tokens = NO_PROMPT.block_tokens
        if endpoints:
            columns = self._columns(endpoints)
            columns.refresh_sizes(self._samples)
            block_tokens = columns.block_tokens
        return read_prompt(document, namespace=namespace, deployment=deployment, block_tokens=block_tokens)

    async def read_exactly(
        self, request: RequestContext, document: Mapping[str, Any], endpoints: Sequence[Endpoint]
    ) -> None:
        """Adds the prompt in engines' tokens to a request, where that is known within some milliseconds."""
        # Hashes of adapters' blocks hold the path of the adapter, which is not known here.
        if self.exact is None or request.adapter or not self.strategy.reads_prompt:
            return
        request.exact = await self.exact.read_prompt(document, request.route, endpoints)
        if request.exact is not None:
            request.prompt = request.prompt.with_tokens(request.exact.tokens)

    def choose(self, request: RequestContext, endpoints: Sequence[Endpoint]) -> Candidate | None:
        """Chooses among endpoints of one deployment; None when there is none or the filters left none."""
        if not endpoints:
            return None
        columns = self._columns(endpoints)
        columns.refresh(self._samples)
        columns.bind(self._loads, self.ledger)
        decision = self.decision = self._observe(request, columns)
        if self._compiled is not None and columns.even:
            at = self._compiled.pick(
                request.prompt,
                columns,
                decision.in_flight,
                decision.pending,
                decision.cached,
                decision.alike,
                decision.pressures,
            )
            decision.chosen = at
            self._candidate = decision.candidate(at)
            return self._candidate
        candidates = decision.candidates()
        self._candidate = chosen = self.strategy.select(request, candidates)
        decision.chosen = next((at for at, each in enumerate(candidates) if each is chosen), None)
        return chosen

    def _observe(self, request: RequestContext, columns: Columns) -> Decision:
        """Notes what is known at this moment."""
        prompt = request.prompt
        alike: dict[str, int] | None = None
        cached: list[int] | None = None
        pressures: list[float] | None = None
        if prompt.chain:
            columns.refresh_bits(self.index)
            pressures = columns.pressures
            depths = self.index.expected(prompt.chain)
            if depths:
                block_tokens, ratio = prompt.block_tokens, prompt.ratio
                cached = [depths.get(bit, 0) * block_tokens for bit in columns.bits]
                if ratio != 1.0:
                    cached = [int(each * ratio) for each in cached]
            same = self._alike.get(prompt.key)
            if same is not None:
                alike = same.copy()
        knowledge: list[CacheKnowledge] | None = None
        if request.exact is not None and self.exact is not None:
            cached, knowledge = self._exactly(request.exact, columns, cached, alike or {})
        return Decision(
            columns,
            columns.samples,
            [each.in_flight for each in columns.loads],
            [each.tokens for each in columns.lines],
            cached,
            alike,
            pressures,
            knowledge,
        )

    def _exactly(
        self,
        prompt: ExactPrompt,
        columns: Columns,
        approximate: list[int] | None,
        alike: Mapping[str, int],
    ) -> tuple[list[int], list[CacheKnowledge]]:
        """Puts what engines say in place of what was sent to them, endpoint by endpoint."""
        assert self.exact is not None
        sent = approximate or [0] * len(columns.endpoints)
        cached, knowledge = [], []
        told = self.exact.cached_tokens(prompt, columns.endpoints)
        for known, guessed, replica in zip(told, sent, columns.replicas, strict=True):
            # A prompt that begins alike and is still under way there is cached before this one is computed.
            exact = known is not None and (known >= guessed or not alike.get(replica))
            cached.append(known if exact and known is not None else guessed)
            knowledge.append(CacheKnowledge.EXACT if exact else CacheKnowledge.APPROXIMATE)
        return cached, knowledge

    def send(self, request: RequestContext, chosen: Candidate) -> Flight:
        """Counts a request as sent, before it is, and learns where its prefix is from now on."""
        prompt, decision = request.prompt, self.decision
        if chosen is self._candidate and decision is not None and decision.chosen is not None:
            # What was found for the choice need not be looked for again.
            at, columns = decision.chosen, decision.columns
        else:
            at, columns = 0, self._columns([chosen.endpoint])
            columns.refresh(self._samples)
        columns.bind(self._loads, self.ledger)
        replica, key = columns.replicas[at], prompt.key
        if prompt.chain:
            cache_tokens = columns.capacities[at]
            capacity = cache_tokens // prompt.block_tokens if cache_tokens else DEFAULT_CAPACITY_BLOCKS
            self.index.record(columns.identities[at], prompt.chain, capacity_blocks=capacity)
            alike = self._alike.get(key)
            if alike is None:
                self._alike[key] = {replica: 1}
            else:
                alike[replica] = alike.get(replica, 0) + 1
        load = columns.loads[at]
        self._loads.begin_at(load)
        uncached = prompt.tokens - chosen.cached_tokens
        flight = Flight(self, replica, max(0, uncached), key, load)
        self.ledger.add_to(columns.lines[at], flight)
        return flight

    def landed(self, flight: Flight) -> None:
        """Releases what `send` has counted; `Flight.close` sees to it that this happens once."""
        self.ledger.drop(flight)
        self._loads.end_at(flight.load)
        key = flight.key
        if key is None:
            return
        alike = self._alike[key]
        left = alike[flight.replica] - 1
        if left:
            alike[flight.replica] = left
        elif len(alike) > 1:
            del alike[flight.replica]
        else:
            del self._alike[key]

    def retain(self, endpoints: Iterable[Endpoint]) -> None:
        """Forgets the prefixes of all other endpoints and of earlier incarnations."""
        kept = tuple(endpoints)
        self.index.retain([each.identity for each in kept])
        self.ledger.retain({each.replica for each in kept})
        self._of_tuple.clear()
        self._of_members.clear()
        self._tuple = self._columns_of_tuple = self._candidate = None

    def _columns(self, endpoints: Sequence[Endpoint]) -> Columns:
        """Returns the columns of some endpoints, of which there is at least one."""
        latest = self._columns_of_tuple
        if latest is not None and endpoints is self._tuple:
            return latest
        known = self._of_tuple.get(id(endpoints))
        if known is not None and known[0] is endpoints:
            columns = known[1]
        else:
            members = tuple(map(id, endpoints))
            found = self._of_members.get(members)
            if found is None:
                if len(self._of_members) >= _COLUMNS_MAX:
                    self._of_members.clear()
                found = self._of_members[members] = Columns(endpoints)
            columns = found
        # A list may change and keep its identity.
        if isinstance(endpoints, tuple):
            if known is None and len(self._of_tuple) >= _COLUMNS_MAX:
                self._of_tuple.clear()
            self._of_tuple[id(endpoints)] = (endpoints, columns)
            self._tuple, self._columns_of_tuple = endpoints, columns
        return columns
