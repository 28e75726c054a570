"""When an engine counts as saturated, and for how many requests."""

from dataclasses import replace
from typing import Any

import pytest

from router.admission.saturation import EndpointLimits
from router.view.samples import Sample
from tests.support.candidates import endpoint, sample

FULL: dict[str, Any] = {"running": 8, "waiting": 4, "kv": 0.5}


def _limits(*samples: Sample, own: int = 12) -> EndpointLimits:
    limits = EndpointLimits()
    for each in samples:
        limits.take("r", each, own=own)
    return limits


def _seen(own: int = 12, **numbers: Any) -> Sample:
    return sample(own_in_flight=own, **numbers)


@pytest.mark.parametrize(
    "samples",
    [
        [],
        [_seen()],
        [_seen(running=8)],
        [_seen(waiting=4, kv=0.5)],
        [_seen(running=8, waiting=4)],
        [_seen(running=8, waiting=0, kv=0.99)],
        # A batch that still grows is held back by prompts, not by its size.
        [_seen(running=6, waiting=9), _seen(running=7, waiting=8), _seen(running=8, waiting=7)],
        # The same number twice may be chance where prompts wait for computing.
        [_seen(**FULL), _seen(**FULL)],
        [_seen(**FULL), _seen(**FULL), _seen(running=8, waiting=0), _seen(**FULL), _seen(**FULL)],
        [_seen(running=7, waiting=4), _seen(**FULL), _seen(**FULL)],
        # A full cache tells nothing of the batch, and nothing waits any more.
        [_seen(running=8, waiting=0), _seen(running=8, waiting=0)],
    ],
)
def test_what_is_not_known_limits_nothing(samples: list[Sample]) -> None:
    limits = _limits(*samples)
    assert limits.limits == {}
    endpoints = [endpoint("r")]
    assert limits.free(endpoints, lambda _: 1000) is endpoints
    assert limits.room(endpoints, lambda _: 1000) is None


def test_a_batch_that_stays_while_others_wait_is_all_that_the_engine_runs() -> None:
    limits = _limits(*[_seen(**FULL)] * 3)
    assert limits.limits == {"r": 9}
    endpoints = [endpoint("r")]
    assert list(limits.free(endpoints, lambda _: 8)) == endpoints
    assert limits.free(endpoints, lambda _: 9) == []
    assert limits.room(endpoints, lambda _: 7) == 2
    # It holds on with room in the engine, and counts what others have there.
    limits.take("r", _seen(own=2, running=5, waiting=0), own=2)
    assert limits.limits == {"r": 6}


def test_a_larger_batch_takes_it_back() -> None:
    limits = _limits(*[_seen(**FULL)] * 3, _seen(running=12, waiting=1))
    assert limits.limits == {}


def test_a_new_incarnation_is_unknown() -> None:
    limits = _limits(*[_seen(**FULL)] * 3)
    limits.take("r", replace(_seen(**FULL), incarnation="j"), own=12)
    assert limits.limits == {}


def test_others_leave_at_least_one() -> None:
    limits = _limits(*[_seen(own=0, running=8, waiting=40)] * 3, own=0)
    assert limits.limits == {"r": 1}


def test_a_full_cache_limits_to_what_runs_and_grows_slowly() -> None:
    limits = _limits(_seen(own=20, running=15, waiting=5, kv=0.97), own=20)
    assert limits.limits == {"r": 16}
    # Half of what waits is ours where half of all is.
    other = _limits(_seen(own=10, running=15, waiting=5, kv=0.97), own=10)
    assert other.limits == {"r": 9}
    limits.take("r", _seen(own=16, running=16, waiting=0, kv=0.97), own=16)
    assert limits.limits == {"r": 21}
    limits.take("r", _seen(own=2, running=2, waiting=0, kv=0.2), own=2)
    assert limits.limits == {}


def test_what_waits_for_computing_does_not_hold_a_limit_by_memory() -> None:
    limits = _limits(_seen(own=20, running=15, waiting=5, kv=0.97), own=20)
    for taken in (21, 27, 35, 45):
        limits.take("r", _seen(own=20, running=14, waiting=6, kv=0.8), own=20)
        assert limits.limits == {"r": taken}
    limits.take("r", _seen(own=20, running=14, waiting=6, kv=0.8), own=20)
    assert limits.limits == {}


def test_stale_limits_are_lifted_and_the_gone_forgotten() -> None:
    limits = _limits(*[_seen(**FULL)] * 3)
    assert not limits.expire(older_than_seconds=0.0)
    assert limits.expire(older_than_seconds=1.0)
    assert limits.limits == {}
    limits.take("r", _seen(**FULL), own=12)
    # What the engine runs at once is not forgotten with the sample.
    assert limits.limits == {"r": 9}
    limits.retain([endpoint("r", incarnation="j")])
    assert limits.limits == {}
    limits.take("r", _seen(**FULL), own=12)
    assert limits.limits == {}
