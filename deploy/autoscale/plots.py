"""Draws the pictures of this folder: a day's load under each of its policies.

    python -m deploy.autoscale.plots [FOLDER]

In come the policies beside this file, out go a PNG and the steps for each. The loads are made up here, the
same every time: a working day, and a tool that a few people use now and then.
"""

import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from controlplane.autoscale_command import main as autoscale

HERE = Path(__file__).parent
MINUTES = 24 * 60

# When the tool of the third picture is used: hour of the day, minutes, requests a second.
_USES = ((8.6, 25, 1.2), (11.2, 50, 2.6), (14.5, 12, 0.8), (19.75, 35, 3.5))


def _hump(hour: float, middle: float, width: float) -> float:
    return math.exp(-(((hour - middle) / width) ** 2))


def _ripple(minute: int) -> float:
    """Unrest between -1 and 1 that is the same every time."""
    return (math.sin(minute * 0.71) + math.sin(minute * 0.173 + 2) + math.sin(minute * 1.93 + 1)) / 3


def _ramp(hour: float, middle: float, width: float) -> float:
    """From 0 to 1 around an hour."""
    return 1 / (1 + math.exp((middle - hour) / width))


def working_day(minute: int) -> float:
    """Requests a second: little at night, all at once at 08:10, less at noon, and a rush at 15:20."""
    hour = minute / 60
    office = _ramp(hour, 8.15, 0.06) * (1 - _ramp(hour, 17.6, 0.25)) * (1 - 0.45 * _hump(hour, 12.5, 0.7))
    rush = 5.0 if 15.33 <= hour < 15.6 else 0.0
    load = 0.3 + 7.0 * office + 1.5 * _hump(hour, 20.0, 1.6)
    return max(0.0, load * (1 + 0.12 * _ripple(minute)) + rush)


def now_and_then(minute: int) -> float:
    """Requests a second of a tool that is mostly idle."""
    hour = minute / 60
    return sum(rate for begin, minutes, rate in _USES if begin <= hour < begin + minutes / 60)


PLOTS: tuple[tuple[str, str, Callable[[int], float]], ...] = (
    ("thresholds", "Thresholds alone", working_day),
    ("working-hours", "A window from 08:00 to 18:00 with a warm-up of 30 minutes", working_day),
    ("scale-to-zero", "Asleep without requests", now_and_then),
)


def main() -> None:
    """Draws all of them."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    for name, title, load in PLOTS:
        with tempfile.TemporaryDirectory() as directory:
            series = Path(directory) / "series.csv"
            # A winter Monday in Berlin.
            rows = [
                f"2030-01-07T{minute // 60:02}:{minute % 60:02}:00+01:00,{load(minute):.3f}"
                for minute in range(MINUTES)
            ]
            rows.append("2030-01-08T00:00:00+01:00,0")
            series.write_text("\n".join(["time,requests_per_second", *rows]) + "\n")
            print(f"\n{title}\n")
            autoscale(
                [
                    "replay", str(HERE / f"{name}.json"), str(series), "--plot", str(folder / f"{name}.png"),
                    "--title", title, "--time-zone", "Europe/Berlin", "--start-seconds", "120",
                ]
            )  # fmt: skip


if __name__ == "__main__":
    main()
