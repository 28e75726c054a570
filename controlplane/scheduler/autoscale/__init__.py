"""How many replicas a deployment should have: a pure function from what was measured to a number and its why.

`decide(policy, readings, state, now)` decides; `windows` knows the times of the week. Zones come in as
values, so that nothing here reads the zone files, a clock or the store.
"""

from controlplane.scheduler.autoscale.decide import decide
from controlplane.scheduler.autoscale.structs import (
    AutoscalePolicy,
    Decision,
    Demand,
    Floor,
    Measure,
    Reading,
    State,
    Thresholds,
    Window,
)
from controlplane.scheduler.autoscale.windows import floor_at, parse_days, parse_time

__all__ = [
    "AutoscalePolicy",
    "Decision",
    "Demand",
    "Floor",
    "Measure",
    "Reading",
    "State",
    "Thresholds",
    "Window",
    "decide",
    "floor_at",
    "parse_days",
    "parse_time",
]
