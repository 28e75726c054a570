"""Tells how much of the scheduler the generated clusters have tried, over all workers of a run."""

import os
from collections import Counter
from collections.abc import Mapping

import pytest

from tests.support.scheduled_world import TALLY

_totals: Counter[str] = Counter()


def _add(tally: Mapping[str, int]) -> None:
    _totals.update(tally)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker sends its part to the process that started it; a run without workers keeps it."""
    output: dict[str, object] | None = getattr(session.config, "workeroutput", None)
    if output is None:
        _add(TALLY)
    else:
        output["scheduler_tally"] = dict(TALLY)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object, error: object | None) -> None:
    """Takes a worker's part; one that crashed has none."""
    output: dict[str, Mapping[str, int]] = getattr(node, "workeroutput", {})
    if error is None:
        _add(output.get("scheduler_tally", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says what was tried, where somebody asked for more than the usual handful."""
    if _totals and "MILLRACE_SCHEDULER_EXAMPLES" in os.environ:
        figures = ", ".join(f"{_totals[name]:,} {name}" for name in sorted(_totals))
        terminalreporter.write_line(f"generated: {figures}")
