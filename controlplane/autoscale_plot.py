"""A replay as a picture: load against what can be served, replicas wanted and serving, and what waits.

In come the moments of a replay, out goes a PNG. Drawing needs matplotlib, which the `plots` extra installs;
it is imported only here and only when a picture is asked for.
"""

from collections.abc import Sequence
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any

from controlplane.scheduler.autoscale.replay import LATE_SECONDS, Moment, ServiceModel, Summary
from core.errors import InvalidArgument

_LOAD, _CAPACITY, _WANTED, _SERVING, _FLOOR, _QUEUE = (
    "#1f4e79", "#a9cce3", "#c0392b", "#f5b7b1", "#7f8c8d", "#8e6bbf",
)  # fmt: skip


def draw(
    path: Path,
    moments: Sequence[Moment],
    summary: Summary,
    *,
    model: ServiceModel,
    zone: tzinfo,
    title: str = "",
) -> None:
    """Draws a replay.

    Args:
        path: PNG to write.
        moments: Of the replay.
        summary: Of the replay.
        model: Of a replica, for the capacity.
        zone: Of the times below.
        title: Above; empty for none.

    Raises:
        InvalidArgument: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise InvalidArgument.of(
            "--plot", "needs matplotlib: pip install 'millrace[plots]', or leave --plot out"
        ) from error
    # Local clock readings without a zone: the axis then shows what people there read.
    times = [each.time.astimezone(zone).replace(tzinfo=None) for each in moments]
    figure = Figure(figsize=(10, 6.2), dpi=100, layout="constrained")
    axes = figure.subplots(3, 1, sharex=True, height_ratios=[2, 2, 1])
    if title:
        figure.suptitle(title, fontsize=12)
    _plot(axes, times, moments, summary, model)
    load, replicas, queue = axes
    replicas.yaxis.set_major_locator(MaxNLocator(integer=True))
    queue.yaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
    for each in axes:
        each.grid(alpha=0.25)
        each.spines[["top", "right"]].set_visible(False)
    for each in (load, replicas):
        each.set_ylim(bottom=0)
        each.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9)
    locator = AutoDateLocator(maxticks=14)
    queue.xaxis.set_major_locator(locator)
    queue.xaxis.set_major_formatter(ConciseDateFormatter(locator))
    queue.set_xlim(times[0], times[-1])
    # The caption stands where the axis would repeat the date.
    queue.xaxis.get_offset_text().set_visible(False)
    figure.supxlabel(f"{_caption(summary)}\n{times[0]:%A, %d %B %Y}, times of {zone}", fontsize=9)
    try:
        figure.savefig(path, format="png", metadata={"Software": None})
    except OSError as error:
        raise InvalidArgument.of("--plot", f"{path} cannot be written: {error.strerror}") from error


def _plot(
    axes: Sequence[Any],
    times: Sequence[datetime],
    moments: Sequence[Moment],
    summary: Summary,
    model: ServiceModel,
) -> None:
    """Fills the three axes: load, replicas, queue."""
    load, replicas, queue = axes
    capacity = [each.serving * model.requests_per_second for each in moments]
    load.fill_between(times, capacity, step="post", color=_CAPACITY, label="can be served")
    load.plot(times, [each.requests_per_second for each in moments], color=_LOAD, lw=1.2, label="comes in")
    load.set_ylabel("requests / s")
    replicas.fill_between(
        times, [each.serving for each in moments], step="post", color=_SERVING, label="serving"
    )
    replicas.step(
        times, [each.desired for each in moments], where="post", color=_WANTED, lw=1.5, label="wanted"
    )
    replicas.step(
        times, [each.floor for each in moments], where="post", color=_FLOOR, lw=1.2, ls="--", label="floor"
    )
    replicas.set_ylabel("replicas")
    replicas.set_ylim(0, summary.most + 0.6)
    queue.fill_between(times, [each.queued for each in moments], step="post", color=_QUEUE)
    queue.set_ylabel("requests\nwaiting")
    queue.set_ylim(0, max(1, *(each.queued for each in moments)) * 1.1)


def _caption(summary: Summary) -> str:
    late = summary.late / summary.requests if summary.requests else 0.0
    return (
        f"{summary.replica_hours:.1f} replica hours instead of {summary.fixed_hours:.1f}; "
        f"{late:.2%} of {summary.requests:,} requests waited longer than {LATE_SECONDS:g} s, the longest "
        f"{summary.longest_wait.total_seconds():.0f} s"
    )
