"""A decision as JSON: every endpoint of the deployment, what left it out, what it scored, who won.

In comes a `Decision`, out comes a document. Filters and scorers are asked again, over the candidates as they
were; they are deterministic but for those who take turns or draw lots, and these are pickers. Keys, prompts
and bodies are not in it.
"""

from collections.abc import Callable, Sequence
from typing import Any

from router.decisions.log import Decision, Step
from router.picking.contract import Candidate
from router.view.view import Endpoint, EndpointState


def render_decision(decision: Decision, *, wall_seconds: Callable[[float], float]) -> dict[str, Any]:
    """Builds the document.

    Args:
        decision: As it was kept.
        wall_seconds: Turns a moment on the monotonic clock into seconds since 1970.
    """
    record = decision.record
    first = decision.steps[0]
    return {
        "request_id": record.request_id,
        "trace_id": record.trace_id,
        "time": wall_seconds(record.started_seconds),
        "route": record.route,
        "namespace": record.namespace,
        "tier": record.tier.name.lower(),
        "model": record.model[:200],
        "deployment": record.deployment,
        "stream": record.stream,
        "session": bool(first.context.session),
        "prompt_tokens_estimated": first.context.prompt.tokens,
        "queue_ms": round(record.queue_seconds * 1000, 3),
        "first_byte_ms": None
        if record.first_byte_seconds is None
        else round(record.first_byte_seconds * 1000, 3),
        "status": record.status or None,
        "reason": record.reason.value,
        "attempts": record.attempts,
        "choices": [_step(each, record.started_seconds) for each in decision.steps],
    }


def _step(step: Step, started_seconds: float) -> dict[str, Any]:
    candidates = () if step.considered is None else step.considered.candidates()
    dropped = _dropped(step, candidates)
    scores = _scores(step, [each for each in candidates if each.endpoint.replica not in dropped])
    seen = {each.endpoint.replica: each for each in candidates}
    return {
        "after_ms": round((step.at_seconds - started_seconds) * 1000, 3),
        "deployment": step.context.deployment,
        "strategy": step.strategy.name,
        "why": step.why,
        "chosen": None if step.chosen is None else step.chosen.endpoint.replica,
        "candidates": [
            {
                "replica": each.replica,
                "node": each.node,
                "state": each.state.name,
                "dropped_by": dropped.get(each.replica),
                **_facts(seen.get(each.replica), step.at_seconds),
                **scores.get(each.replica, {}),
            }
            for each in step.endpoints
        ],
    }


def _dropped(step: Step, candidates: Sequence[Candidate]) -> dict[str, str]:
    """Returns what left out each endpoint that was left out."""
    found: dict[str, str] = {}
    eligible = {each.replica for each in step.eligible}
    free = {each.replica for each in step.free}
    for each in step.endpoints:
        if each.replica not in eligible:
            found[each.replica] = _ineligible(each)
        elif each.replica not in free:
            found[each.replica] = "saturated"
    kept = list(candidates)
    for guard in step.strategy.filters:
        staying = {each.endpoint.replica for each in guard.keep(step.context, kept)}
        for candidate in kept:
            if candidate.endpoint.replica not in staying:
                found[candidate.endpoint.replica] = _name(guard)
        kept = [candidate for candidate in kept if candidate.endpoint.replica in staying]
    return found


def _ineligible(endpoint: Endpoint) -> str:
    match endpoint.state:
        case EndpointState.READY:
            return "breaker, or tried before"
        case EndpointState.UNHEALTHY:
            return "unhealthy, tried before, or others are ready"
        case _:
            return "state"


def _scores(step: Step, kept: Sequence[Candidate]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {each.endpoint.replica: {"scores": {}, "score": 0.0} for each in kept}
    if not kept:
        return found
    for weighted in step.strategy.scorers:
        name = _name(weighted.scorer)
        for candidate, score in zip(kept, weighted.scorer.score(step.context, kept), strict=True):
            entry = found[candidate.endpoint.replica]
            entry["scores"][name] = {"score": score, "weight": weighted.weight}
            entry["score"] += weighted.weight * score
    return found


def _facts(candidate: Candidate | None, at_seconds: float) -> dict[str, Any]:
    if candidate is None:
        return {}
    sample = candidate.sample
    return {
        "in_flight": candidate.in_flight,
        "cached_tokens": candidate.cached_tokens,
        "pending_prefill_tokens": candidate.pending_prefill_tokens,
        "alike_in_flight": candidate.alike_in_flight,
        "sample": None
        if sample is None
        else {
            "age_seconds": round(at_seconds - sample.taken_seconds, 3),
            "running_requests": sample.running_requests,
            "waiting_requests": sample.waiting_requests,
            "kv_usage_ratio": sample.kv_usage_ratio,
        },
    }


def _name(plugin: object) -> str:
    return type(plugin).__name__
