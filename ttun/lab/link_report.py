"""What ``ttun bench link`` measured, in few figures, and as a table of 80 columns."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ttun.lab.bench_link import Figures

WIDTH = 80
CELL = 9  # columns of a figure; a name has what is left
MOST_LOSSES = 6  # columns beside the names
GOODPUT = {"up_1": "1 up", "down_1": "1 down", "up_8": "8 up", "down_8": "8 down"}
BESIDE = {"idle": "idle", "down": "beside a download", "up": "beside an upload"}

Summary = dict[str, dict[str, float]]  # kind of figure -> figure -> value


def summary(runs: Sequence[Figures]) -> Summary:
    """Return for each kind of figure its values: goodput in Mbit/s, times in ms, lost in per cent.

    Goodput is the median of the runs; times are percentiles of all runs together, and of what
    was answered.
    """
    found: Summary = {
        "goodput": {
            name: statistics.median(run.goodput[name] for run in runs) / 1e6
            for name in runs[0].goodput
        }
    }
    for beside in runs[0].pings:
        found[f"ping_{beside}"] = _spread(time for run in runs for time in run.pings[beside])
    for beside in runs[0].fetches:
        found[f"fetch_{beside}"] = _spread(time for run in runs for time in run.fetches[beside])
    return found


def _spread(times: Iterable[float | None]) -> dict[str, float]:
    every = list(times)
    answered = sorted(seconds * 1000 for seconds in every if seconds is not None)
    return {
        "median": percentile(answered, 50),
        "p95": percentile(answered, 95),
        "p99": percentile(answered, 99),
        "lost": 100 * (1 - len(answered) / len(every)),
        "number": len(every),
    }


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Return the smallest value that so many per cent do not exceed; infinity of nothing."""
    if not ordered:
        return math.inf
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def table(heading: str, losses: Sequence[float], summaries: Sequence[dict[str, Summary]]) -> str:
    """Return a table for each kind of figure, with a line for each target."""
    names = list(dict.fromkeys(name for each in summaries for name in each))
    width = max((len(name) for name in names), default=0)
    if len(losses) == 1:
        lines = _one_loss(summaries[0], width)
    else:
        lines = _many_losses(losses, summaries, names, width)
    return "\n".join(
        [heading, f"lost each way: {', '.join(f'{loss:g}' for loss in losses)} %", *lines]
    )


def _one_loss(found: dict[str, Summary], width: int) -> list[str]:
    lines = _block("goodput, Mbit/s", width, GOODPUT.values(), {
        name: [figures["goodput"][column] for column in GOODPUT] for name, figures in found.items()
    })  # fmt: skip
    for kind, title, last in (("ping", "ping", "lost %"), ("fetch", "100 kB", "failed %")):
        for beside, where in BESIDE.items():
            rows = {
                name: [figures[f"{kind}_{beside}"][c] for c in ("median", "p95", "p99", "lost")]
                for name, figures in found.items()
                if f"{kind}_{beside}" in figures
            }
            if rows:
                columns = ("median", "p95", "p99", last)
                lines += _block(f"{title} {where}, ms", width, columns, rows)
    return lines


def _many_losses(
    losses: Sequence[float],
    summaries: Sequence[dict[str, Summary]],
    names: Sequence[str],
    width: int,
) -> list[str]:
    lines = []
    for column, title in GOODPUT.items():
        rows = {
            name: [each[name]["goodput"][column] if name in each else math.nan
                   for each in summaries]
            for name in names
        }  # fmt: skip
        heads = [f"{loss:g} %" for loss in losses]
        lines += _block(f"{title}, Mbit/s, lost:", width, heads, rows)
    return lines


def _block(
    title: str, width: int, columns: Iterable[str], rows: dict[str, list[float]]
) -> list[str]:
    heads = list(columns)
    first = min(max(width, len(title)), WIDTH - CELL * len(heads))
    lines = ["", f"{title:<{first}}" + "".join(f"{head:>{CELL}}" for head in heads)]
    for name, values in rows.items():
        shown = name if len(name) <= first else name[: first - 3] + "..."
        cells = "".join(f"{_figure(value):>{CELL}}" for value in values)
        lines.append(f"{shown:<{first}}" + cells)
    return lines


def _figure(value: float) -> str:
    if not math.isfinite(value):
        return "-"
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
