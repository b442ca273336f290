"""The results of ``ttun bench link``: summarized, and as tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ttun.lab import table

if TYPE_CHECKING:
    from ttun.lab.bench_link import Figures

MOST_LOSSES = 6  # columns of a table, which has to fit 80
GOODPUT = {"up_1": "1 up", "down_1": "1 down", "up_8": "8 up", "down_8": "8 down"}
BESIDE = {"idle": "idle", "down": "during a download", "up": "during an upload"}

UP, STREAMS = "up: client to server.", "1, 8: streams at once. "

Summary = dict[str, dict[str, float]]  # kind of figure -> figure -> value


def summary(runs: Sequence[Figures]) -> Summary:
    """Return the values of each kind of figure: goodput in Mbit/s, times in ms, lost in percent.

    Goodput is the median of the runs. Times are percentiles over all runs, of what was answered.
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
    """Return the nearest-rank percentile of sorted values, or infinity if there are none."""
    if not ordered:
        return math.inf
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def render(
    heading: Sequence[str], losses: Sequence[float], summaries: Sequence[dict[str, Summary]]
) -> str:
    """Return a table for each kind of figure, with a line for each target."""
    one = len(losses) == 1
    groups = _one_loss(summaries[0]) if one else _many_losses(losses, summaries)
    lost = f"loss each way: {', '.join(f'{loss:g}' for loss in losses)} %"
    return "\n".join([*heading, lost, "", table.render(groups), "", STREAMS * one + UP])


def _one_loss(found: dict[str, Summary]) -> list[table.Group]:
    rows = {name: [figures["goodput"][column] for column in GOODPUT]
            for name, figures in found.items()}  # fmt: skip
    groups = [_group("goodput, Mbit/s", GOODPUT.values(), rows)]
    for kind, title, last in (("ping", "ping", "% lost"), ("fetch", "100 kB", "% failed")):
        for beside, where in BESIDE.items():
            rows = {
                name: [figures[f"{kind}_{beside}"][c] for c in ("median", "p95", "p99", "lost")]
                for name, figures in found.items()
                if f"{kind}_{beside}" in figures
            }
            if rows:
                heads = ("median", "p95", "p99", last)
                groups.append(_group(f"{title}, {where}, ms", heads, rows))
    return groups


def _many_losses(
    losses: Sequence[float], summaries: Sequence[dict[str, Summary]]
) -> list[table.Group]:
    names = list(dict.fromkeys(name for each in summaries for name in each))
    groups = []
    for column in GOODPUT:
        rows = {
            name: [each[name]["goodput"][column] if name in each else math.nan
                   for each in summaries]
            for name in names
        }  # fmt: skip
        heads = [f"{loss:g} %" for loss in losses]
        way, streams = column.split("_")
        title = f"{'one stream' if streams == '1' else f'{streams} streams'} {way}"
        groups.append(_group(f"{title}, Mbit/s, by loss", heads, rows))
    return groups


def _group(title: str, heads: Iterable[str], rows: dict[str, list[float]]) -> table.Group:
    cells = {name: [_figure(value) for value in values] for name, values in rows.items()}
    return table.Group(title, list(heads), cells)


def _figure(value: float) -> str:
    if not math.isfinite(value):
        return table.NONE
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
