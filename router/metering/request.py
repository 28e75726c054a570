"""The meter of one request, over all of its attempts.

In come the parsed request, and for each attempt the engine that gets it and what that answers; out go the
body that asks for usage, the meter that reads the answer, and the counts at the end. A failed attempt
leaves nothing: only the answer that reached the client counts.
"""

from collections.abc import Mapping
from typing import Any, Final

from router.continuation.request import obstacle
from router.continuation.stream import ContinuedStream
from router.metering.ask import Asked, ask_usage, read_asked
from router.metering.stream import CompletionMeter, EventMeter, Meter
from router.metering.usage import COMPLETE, FAILED, UNKNOWN, TokenCounts, UsageOutcome
from router.metering.whole import WholeMeter
from router.openai.sse import is_event_stream

# Engines that are known to give usage in every chunk, and in the shape that the meter takes out again. Others
# are asked for the usage chunk at the end, which all know; what a client that leaves has had from them is
# counted by chunks, and marked as not exact.
CONTINUOUS_USAGE_ENGINES = frozenset({"vllm", "vllm_ascend", "simulator"})


_JSON: Final = "application/json"


class RequestMeter:
    """Meters one request.

    Attributes:
        outcome: How the request ended; failed until something better is known.
    """

    __slots__ = ("_asked", "_asking", "_document", "_meter", "_metered", "_route", "_stream", "outcome")

    def __init__(
        self, route: str, document: Mapping[str, Any], *, stream: bool, metered: bool = True
    ) -> None:
        """Takes what is asked.

        Args:
            route: Its template.
            document: The parsed body.
            stream: The client asked for a stream.
            metered: The route's answers tell usage.
        """
        self.outcome: UsageOutcome = FAILED
        self._route = route
        self._metered = metered
        self._document = document
        self._stream = stream
        self._asked: Asked | None = read_asked(route, document) if stream else None
        # Nothing is asked where the client asked for all of it, or in a way that only the engine can judge.
        self._asking = self._asked is not None and self._asked.readable
        # Classes and no protocol: what is called through one is looked up by name.
        self._meter: WholeMeter | CompletionMeter | EventMeter | None = None

    def body_for(self, body: bytes, engine: str) -> bytes:
        """Returns the body that an engine gets: the same bytes, or with usage asked for."""
        if not self._asking:
            return body
        return ask_usage(body, self._document, continuous=engine in CONTINUOUS_USAGE_ENGINES)

    def begin(self, status: int, content_type: str, content_encoding: str) -> Meter | None:
        """Returns what reads an answer on its way; None for refusals, which use nothing."""
        if status >= 400 or not self._metered:
            self._meter = None
        elif content_encoding or content_type == _JSON or not is_event_stream(content_type):
            self._meter = WholeMeter(encoded=content_encoding != "")
        elif self._asked is not None:
            self._meter = CompletionMeter(self._asked, asking=self._asking)
        else:
            self._meter = EventMeter()
        return self._meter

    def joins(self) -> ContinuedStream | None:
        """Returns what joins this answer with those of other engines; None where none could go on with it."""
        if not isinstance(self._meter, CompletionMeter) or not self._asking:
            return None
        if obstacle(self._route, self._document, stream=self._stream):
            return None
        return ContinuedStream(self._document, self._meter)

    @property
    def metered(self) -> bool:
        """The route's answers tell usage."""
        return self._metered

    @property
    def changes_length(self) -> bool:
        """The answer may reach the client shorter than the engine sends it."""
        return isinstance(self._meter, CompletionMeter)

    @property
    def failure(self) -> tuple[str, bool]:
        """What an error event inside the answer said, empty for none; and whether the client is at fault."""
        return ("", False) if self._meter is None else (self._meter.error, self._meter.error_is_clients)

    def counts(self) -> TokenCounts:
        """Returns what is known of the usage."""
        meter = self._meter
        if meter is None:
            return UNKNOWN
        if isinstance(meter, WholeMeter) and self.outcome is COMPLETE:
            return meter.counts_of_complete()
        return meter.counts()
