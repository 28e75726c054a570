"""Runs the engine model in real time: one asyncio task, alive only while there is work.

In: requests. Out: a `TokenStream` for each, which tells how many tokens came and why they ended.
A step's end is reckoned from the step before, not from the moment the loop woke up, so timer
inaccuracy does not add up; after a stall of the process the lost time is not caught up.
Must not: parse requests, shape responses, or keep a stream that its reader has left.
"""

import asyncio
import time
from collections.abc import Callable

from nodeagent.engines.simulator.engine_model import EngineModel, Sequence, SequenceRequest
from nodeagent.engines.simulator.kv_journal import KvEvent
from nodeagent.engines.simulator.metrics import EngineMetrics

# More than the loop's timer inaccuracy, less than a human would call a stall.
_CATCH_UP_SECONDS = 0.05


class EngineDeadError(Exception):
    """The engine died; every request in it is lost."""

    def __init__(self) -> None:
        super().__init__("EngineCore encountered an issue. See stack trace (above) for the root cause.")


class TokenStream:
    """The tokens of one request as they come; bounded by the request's output length.

    `finish_reason` holds once the output is complete.
    """

    def __init__(self, sequence: Sequence) -> None:
        self.sequence = sequence
        self._emitted = 0
        self._received = 0
        self._finished = False
        self._dead = False
        self._changed = asyncio.Event()
        self.finish_reason = sequence.request.finish_reason

    def push(self) -> None:
        """Adds one token."""
        self._emitted += 1
        self._changed.set()

    def finish(self) -> None:
        """Marks the end."""
        self._finished = True
        self._changed.set()

    def cut(self) -> None:
        """Ends the stream early, with the tokens that came."""
        self.finish_reason = "abort"
        self.finish()

    def die(self) -> None:
        """Ends the stream without a result."""
        self._dead = True
        self._changed.set()

    async def receive(self) -> int:
        """Waits for tokens and returns how many are new; 0 means that the output is complete.

        Raises:
            EngineDeadError: The engine died before the last token.
        """
        while True:
            new = self._emitted - self._received
            if new:
                self._received = self._emitted
                return new
            if self._finished:
                return 0
            if self._dead:
                raise EngineDeadError
            self._changed.clear()
            await self._changed.wait()


class EngineDriver:
    """Owns the step loop of one engine model; `on_death` is called once, when the engine dies.

    `publish` gets what a step did to cached blocks, after every step.
    """

    def __init__(
        self,
        model: EngineModel,
        metrics: EngineMetrics,
        on_death: Callable[[], object] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model = model
        self.publish: Callable[[list[KvEvent]], None] = lambda _: None
        self._metrics = metrics
        self._awake = asyncio.Event()
        self._awake.set()
        self._on_death = on_death
        self._clock = clock
        self._streams: dict[Sequence, TokenStream] = {}
        self._loop_task: asyncio.Task[None] | None = None
        self._closing = False
        self.dead = False

    @property
    def active_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    def submit(self, request: SequenceRequest) -> TokenStream:
        """Queues a request and makes sure that the step loop runs.

        Raises:
            EngineDeadError: The engine is dead.
            ValueError: The request does not fit into the model's length.
        """
        if self.dead:
            raise EngineDeadError
        sequence = self.model.submit(request, self._clock())
        stream = TokenStream(sequence)
        self._streams[sequence] = stream
        if self._loop_task is None or self._loop_task.done():
            self._loop_task = asyncio.create_task(self._run(), name="simulator step loop")
            self._loop_task.add_done_callback(self._loop_ended)
        return stream

    def abort(self, stream: TokenStream) -> None:
        """Forgets a request whose reader has left; harmless after its end, and for another's."""
        if self._streams.pop(stream.sequence, None) is None:
            return
        if not self.dead and self.model.abort(stream.sequence) and self._awake.is_set():
            self._metrics.record_state(self.model)

    def abort_all(self) -> None:
        """Ends every request with what it has so far."""
        for stream in list(self._streams.values()):
            stream.cut()
            self.abort(stream)

    def pause(self) -> None:
        """Stops after the step that runs; requests that come wait."""
        self._awake.clear()

    def resume(self) -> None:
        """Goes on stepping."""
        self._awake.set()

    def kill(self) -> None:
        """Ends every stream as a dying engine would; nothing is served afterwards."""
        if not self.dead and not self._closing:
            self._on_death()
        self.dead = True
        for stream in self._streams.values():
            stream.die()
        self._streams.clear()

    async def close(self) -> None:
        """Stops the step loop."""
        self._closing = True
        self.kill()
        task = self._loop_task
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    def _loop_ended(self, task: "asyncio.Task[None]") -> None:
        if task.cancelled() or self._closing:
            return
        if task.exception() is not None:
            # A broken model is a dead engine, and its readers must not wait for ever. The
            # exception goes on to the loop's handler, which writes it to standard error.
            self.kill()
            task.get_loop().call_exception_handler(
                {"message": "the step loop failed", "exception": task.exception(), "task": task}
            )

    async def _run(self) -> None:
        begins = self._clock()
        while not self.dead:
            if not self._awake.is_set():
                await self._awake.wait()
                begins = self._clock()
            step = self.model.begin_step(self._clock())
            if step is None:
                return
            ends = begins + step.duration_seconds
            await asyncio.sleep(max(0.0, ends - self._clock()))
            if self.dead:
                return
            now = self._clock()
            outcome = self.model.finish_step(step, now)
            self.publish(self.model.journal.take())
            for emission in outcome.emissions:
                stream = self._streams.get(emission.sequence)
                if stream is not None:
                    stream.push()
            self._metrics.record_step(outcome, self.model)
            for sequence in outcome.finished:
                finished = self._streams.pop(sequence, None)
                if finished is not None:
                    finished.finish()
            begins = ends if now - ends < _CATCH_UP_SECONDS else now
