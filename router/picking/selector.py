"""Everything that picking needs beside the plug-ins: own counts, pending prefill, the prefix index.

In come a request and the endpoints that may be used, out comes one of them (`choose`); what is sent to it
is counted before the await and learned by the index (`send`), and released exactly once (`Flight`). One a
worker, on the event loop, without I/O. The trace benchmark drives this very class in virtual time.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

from router.picking.contract import Candidate, RequestContext, Strategy
from router.picking.prefill_ledger import Entry, PrefillLedger
from router.prefix.chain import DEFAULT_BLOCK_TOKENS
from router.prefix.index import DEFAULT_CAPACITY_BLOCKS, PrefixIndex
from router.prefix.prompt import Prompt, read_prompt
from router.prefix.rendezvous import prefix_key
from router.upstream.loads import LoadTable
from router.view.samples import SampleTable
from router.view.view import Endpoint

# Room for about 350,000 blocks: the KV caches of some 20 large engines.
INDEX_BYTES_MAX = 64 * 1024 * 1024

_NO_PROMPT = Prompt()


class Flight:
    """A request on its way: counted from its making until `close`."""

    def __init__(self, ledger: PrefillLedger, entry: Entry, held: ExitStack) -> None:
        self._ledger = ledger
        self._entry = entry
        self._held = held

    def first_byte(self) -> None:
        """The engine has computed the prompt."""
        self._ledger.computed(self._entry)

    def close(self) -> None:
        """Releases the counts; again does nothing."""
        self._ledger.drop(self._entry)
        self._held.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Decision:
    """What one choice was made from, for whoever asks later why."""

    __slots__ = ("_candidates",)

    def __init__(self, candidates: Sequence[Candidate]) -> None:
        self._candidates = candidates

    def candidates(self) -> Sequence[Candidate]:
        """Returns the candidates as they were."""
        return self._candidates


class Selector:
    """Picks endpoints by a strategy.

    Attributes:
        index: Who probably holds which prefix.
        ledger: Prompt tokens that are not computed yet.
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
    ) -> None:
        self.index = PrefixIndex(bytes_max=index_bytes_max)
        self.ledger = PrefillLedger()
        self._alike: dict[tuple[int, str], int] = {}
        self.strategy = strategy
        self.decision: Decision | None = None
        self._loads = loads
        self._samples = samples

    def read_prompt(
        self, document: Mapping[str, Any], endpoints: Sequence[Endpoint], *, namespace: str, deployment: str
    ) -> Prompt:
        """Reads a request's prompt; an empty one where the strategy has no use for it."""
        if not self.strategy.reads_prompt:
            return _NO_PROMPT
        return read_prompt(
            document,
            namespace=namespace,
            deployment=deployment,
            block_tokens=self._block_tokens(endpoints),
        )

    def choose(self, request: RequestContext, endpoints: Sequence[Endpoint]) -> Candidate | None:
        """Chooses among endpoints of one deployment; None when there is none or the filters left none."""
        prompt = request.prompt
        key = prefix_key(prompt.chain)
        matches = self.index.match(prompt.chain) if prompt.chain else {}
        candidates = [
            Candidate(
                endpoint=each,
                sample=self._samples.fresh(each.replica, each.incarnation),
                in_flight=self._loads.in_flight(each.replica),
                cached_tokens=matches.get(each.identity, 0) * prompt.block_tokens,
                pending_prefill_tokens=self.ledger.pending_tokens(each.replica),
                alike_in_flight=0 if key is None else self._alike.get((key, each.replica), 0),
            )
            for each in endpoints
        ]
        self.decision = Decision(candidates)
        return self.strategy.select(request, candidates)

    def send(self, request: RequestContext, chosen: Candidate) -> Flight:
        """Counts a request as sent, before it is, and learns where its prefix is from now on."""
        endpoint, prompt = chosen.endpoint, request.prompt
        if prompt.chain:
            self.index.record(
                endpoint.identity,
                prompt.chain,
                capacity_blocks=self._capacity_blocks(endpoint, prompt.block_tokens),
            )
        held = ExitStack()
        held.enter_context(self._loads.hold(endpoint.replica))
        key = prefix_key(prompt.chain)
        if key is not None:
            alike = (key, endpoint.replica)
            self._alike[alike] = self._alike.get(alike, 0) + 1
            held.callback(self._release_alike, alike)
        entry = self.ledger.add(endpoint.replica, max(0, prompt.tokens - chosen.cached_tokens))
        return Flight(self.ledger, entry, held)

    def _release_alike(self, alike: tuple[int, str]) -> None:
        left = self._alike[alike] - 1
        if left:
            self._alike[alike] = left
        else:
            del self._alike[alike]

    def retain(self, endpoints: Iterable[Endpoint]) -> None:
        """Forgets the prefixes of all other endpoints and of earlier incarnations."""
        self.index.retain(each.identity for each in endpoints)

    def _block_tokens(self, endpoints: Sequence[Endpoint]) -> int:
        """Returns the block size of a deployment's engines; the default unless they all agree."""
        sizes = set()
        for each in endpoints:
            sample = self._samples.latest(each.replica, each.incarnation)
            if sample is not None and sample.kv_block_tokens is not None:
                sizes.add(sample.kv_block_tokens)
        return sizes.pop() if len(sizes) == 1 else DEFAULT_BLOCK_TOKENS

    def _capacity_blocks(self, endpoint: Endpoint, block_tokens: int) -> int:
        sample = self._samples.latest(endpoint.replica, endpoint.incarnation)
        if sample is None or sample.kv_cache_tokens is None:
            return DEFAULT_CAPACITY_BLOCKS
        return max(1, sample.kv_cache_tokens // block_tokens)
