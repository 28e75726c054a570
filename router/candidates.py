"""Who can take a request: eligible -> with room -> picked by its deployment's strategy, or by a fall-back's.

In comes a call, out comes an endpoint that it must be sent to before the next await, or None; every choice is
noted for whoever asks why. It sends nothing, waits for nothing and refuses nobody. Without trouble anywhere
(no failures, no limits) it costs two comparisons beside the picking itself.
"""

from collections.abc import Sequence
from dataclasses import replace

from core.clock import Clock
from router.admission.gate import Bounds, Gate
from router.admission.lane import Lane
from router.call import Call
from router.decisions.log import DecisionLog, Step
from router.decisions.why import why_of
from router.picking.contract import Candidate, Strategy
from router.picking.eligibility import eligible as best_class
from router.picking.selector import Selector
from router.picking.selectors import Selectors
from router.prefix.exact.index import ExactIndex
from router.upstream.health import EndpointHealth
from router.upstream.loads import LoadTable
from router.view.source import ViewSource
from router.view.view import Deployment, Endpoint, View

# A chain of fall-backs that is longer than this is a mistake, as one that leads back to itself is.
FALLBACKS_MAX = 3


class Candidates:
    """Chooses endpoints. One a worker.

    Attributes:
        selectors: Pick among those with room.
        gate: Where requests wait for room.
        decisions: What was chosen, and from what.
    """

    def __init__(
        self,
        *,
        source: ViewSource,
        strategy: Strategy,
        loads: LoadTable,
        health: EndpointHealth,
        bounds: Bounds,
        clock: Clock,
        exact: ExactIndex | None = None,
    ) -> None:
        self.selectors = Selectors(
            Selector(strategy, loads=loads, samples=source.samples, exact=exact),
            lambda named: Selector(named, loads=loads, samples=source.samples, exact=exact),
        )
        self.gate = Gate(clock, bounds, usable=self.usable, in_flight=loads.in_flight)
        self.decisions = DecisionLog()
        self._source = source
        self._loads = loads
        self._health = health
        self._clock = clock
        source.subscribe_samples(self.gate.sample_taken)

    def view_changed(self, view: View) -> None:
        """Takes a new view; health and loads have taken it before."""
        self.selectors.view_changed(view)
        self.gate.view_changed(view)

    def lane(self, call: Call) -> Lane:
        """Returns the lane that a request is in."""
        return self.gate.lane(call.context.namespace, call.context.deployment)

    def usable(self, namespace: str, name: str) -> Sequence[Endpoint]:
        """Returns the endpoints that a new request could be sent to, whatever room they have."""
        deployment = self._source.view.deployment(namespace, name)
        return () if deployment is None else self.eligible(deployment, frozenset())

    def eligible(
        self, deployment: Deployment, tried: set[tuple[str, str]] | frozenset[tuple[str, str]]
    ) -> Sequence[Endpoint]:
        """Returns those that may be used at all; without trouble it is a look at the view."""
        if deployment.ready and not tried and self._health.clean:
            return deployment.ready
        return best_class(
            deployment.endpoints,
            tried=tried,
            is_ejected=self._health.is_ejected,
            last_failure_seconds=self._health.last_failure_seconds,
        )

    def pick(self, call: Call) -> Candidate | None:
        """Chooses an endpoint with room; None for none. It must be sent to before the next await."""
        deployment = self._source.view.deployment(call.context.namespace, call.context.deployment)
        if deployment is None:
            return None
        usable = self.eligible(deployment, call.tried)
        if call.pinned:
            # Only one of them remembers what is asked for, however it does.
            own = (each for each in deployment.endpoints if each.replica == call.pinned)
            usable = tuple(each for each in own if each.identity not in call.tried)
        free = self.gate.saturation.free(usable, self._loads.in_flight)
        if not free and call.attempts:
            # It has waited at an engine already: it does not stand in line again.
            free = usable
        if not free:
            return None
        selector = call.selector = self.selectors.of(deployment)
        candidate = selector.choose(call.context, free)
        if candidate is not None:
            why = why_of(
                candidate,
                attempts=call.attempts,
                diverted=call.diverted,
                candidates=len(free),
                strategy=selector.strategy,
            )
            now = self._clock.monotonic()
            self._decide(
                call,
                Step(
                    call.context,
                    selector.strategy,
                    deployment.endpoints,
                    usable,
                    free,
                    selector.decision,
                    candidate,
                    why,
                    now,
                ),
            )
        return candidate

    def _decide(self, call: Call, step: Step) -> None:
        call.record.why = step.why
        if call.decision is None:
            call.decision = self.decisions.open(call.record, step)
        else:
            self.decisions.add(call.decision, step)

    def divert(self, call: Call) -> Candidate | None:
        """Chooses an endpoint of a fall-back that has room; the request is the fall-back's from then on."""
        if call.pinned or call.downstream.started:
            # Another model neither remembers what this one said nor goes on in its words.
            return None
        context = call.context
        deployment = self._source.view.deployment(context.namespace, context.deployment)
        seen = {context.deployment}
        while deployment is not None and len(seen) <= FALLBACKS_MAX:
            name = deployment.routing.fallback
            if not name or name in seen:
                break
            seen.add(name)
            deployment = self._source.view.deployment(context.namespace, name)
            if deployment is None or self.gate.lane(context.namespace, name).busy:
                continue
            selector = self.selectors.of(deployment)
            prompt = selector.read_prompt(
                call.parsed.document,
                deployment.endpoints,
                namespace=deployment.namespace,
                deployment=deployment.name,
            )
            diverted, call.diverted = call.diverted, True
            # Another deployment's engines have other tokens: those of the first one say nothing here.
            call.context = replace(context, deployment=name, prompt=prompt, exact=None)
            candidate = self.pick(call)
            if candidate is not None:
                call.record.deployment = name
                self.lane(call).count_in(call.record.started_seconds)
                return candidate
            call.context, call.diverted = context, diverted
        return None
