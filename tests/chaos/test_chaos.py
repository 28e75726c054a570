"""The short form of the chaos suite: one cluster, a few faults, everything holds afterwards."""

from pathlib import Path

import pytest

from tests.chaos.cluster import chaos_cluster
from tests.chaos.faults import FAULTS, SHORT
from tests.chaos.invariants import SPEC, look
from tests.chaos.runner import converged, run_fault

pytestmark = pytest.mark.integration


def test_every_fault_has_a_name_of_its_own() -> None:
    names = [fault.name for fault in FAULTS]
    assert len(set(names)) == len(names)
    assert set(SHORT) <= set(names)


# Longer than the usual bound: five faults, and machines differ.
@pytest.mark.timeout(240)
async def test_a_cluster_that_is_hurt_comes_back(tmp_path: Path) -> None:
    async with chaos_cluster(tmp_path) as cluster:
        await converged(cluster, (await look(cluster)).below(SPEC), 30)
        for fault in FAULTS:
            if fault.name in SHORT:
                account = await run_fault(cluster, fault, hold_seconds=SHORT[fault.name])
                # Requests inside an engine that is killed are sent again to another.
                assert account.failed == 0, account
