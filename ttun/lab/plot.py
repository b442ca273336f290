"""Charts of what ``ttun bench tunnel`` and ``ttun bench link`` measured, as SVG. Needs matplotlib.

Bars for figures that stand by themselves; lines for goodput over loss.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ttun.errors import TtunError

try:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # text as text: a third of the size
    from matplotlib import pyplot
except ImportError:
    how = f"{sys.executable} -m pip install matplotlib"
    raise TtunError(f"--plot needs matplotlib: {how}") from None

Panels = list[tuple[str, tuple[str, ...]]]  # title, figures
PANELS: Panels = [
    ("TCP, one stream, Gbit/s", ("up", "down")),
    ("64-byte datagrams per second", ("datagrams",)),
    ("CPU seconds per million datagrams", ("datagram_cpu",)),
    ("ping under load, ms", ("ping_loaded",)),
]
LINK_PANELS: Panels = [
    ("one stream, Mbit/s", ("up", "down")),
    ("eight streams, Mbit/s", ("up 8", "down 8")),
    ("ping beside a download, ms", ("median", "p99")),
    ("100 kB beside a download, ms", ("median fetch", "p95 fetch")),
]


def draw(medians: dict[str, dict[str, float]], file: Path) -> None:
    """Draw a panel for each of PANELS, a bar for each target but the bare link."""
    _draw_bars(PANELS, dict(list(medians.items())[1:]), file)


def draw_link(
    losses: Sequence[float], summaries: Sequence[dict[str, dict[str, dict[str, float]]]], file: Path
) -> None:
    """Draw what link_report.summary gave for each loss: bars for one, lines for several."""
    if len(losses) > 1:
        _draw_lines(losses, summaries, file)
        return
    rows = {
        name: {
            "up": found["goodput"]["up_1"],
            "down": found["goodput"]["down_1"],
            "up 8": found["goodput"]["up_8"],
            "down 8": found["goodput"]["down_8"],
            "median": found["ping_down"]["median"],
            "p99": found["ping_down"]["p99"],
            "median fetch": found["fetch_down"]["median"],
            "p95 fetch": found["fetch_down"]["p95"],
        }
        for name, found in summaries[0].items()
    }
    _draw_bars(LINK_PANELS, rows, file)


def _draw_bars(panels: Panels, rows: dict[str, dict[str, float]], file: Path) -> None:
    names = list(rows)
    size = (11, 1.2 + 0.7 * len(names))
    figure, axes = pyplot.subplots(2, 2, figsize=size, sharey=True)
    for axis, (title, columns) in zip(axes.flat, panels):
        height = 0.8 / len(columns)
        for number, column in enumerate(columns):
            places = [row + number * height for row in range(len(names))]
            values = [rows[name][column] for name in names]
            bars = axis.barh(places, [v if math.isfinite(v) else 0 for v in values], height * 0.9)
            axis.bar_label(bars, [_shown(v) for v in values], padding=3, fontsize=8)
        axis.set_yticks([row + (len(columns) - 1) * height / 2 for row in range(len(names))], names)
        axis.margins(x=0.15)
        axis.set_xticks([])  # each bar has its figure
        axis.tick_params(left=False)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
        axis.set_title(title, loc="left", fontsize=10)
        if len(columns) > 1:
            axis.legend([column.partition(" fetch")[0] for column in columns], fontsize=8)
    axes[0][0].invert_yaxis()  # that of all four
    _save(figure, file)


def _draw_lines(
    losses: Sequence[float], summaries: Sequence[dict[str, dict[str, dict[str, float]]]], file: Path
) -> None:
    """Goodput over loss. The losses are as far apart as their order, so that 0 has a place."""
    names = list(dict.fromkeys(name for each in summaries for name in each))
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), sharex=True, sharey=True)
    panels = (("up_1", "one stream up"), ("down_1", "one stream down"),
              ("up_8", "eight streams up"), ("down_8", "eight streams down"))  # fmt: skip
    for axis, (column, title) in zip(axes.flat, panels):
        for name, marker in zip(names, itertools.cycle("osD^vPX*")):
            values = [
                each[name]["goodput"][column] if name in each else math.nan for each in summaries
            ]
            axis.plot(range(len(losses)), values, marker=marker, label=name)
        axis.set_xticks(range(len(losses)), [f"{loss:g} %" for loss in losses])
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.3)
        axis.set_title(f"{title}, Mbit/s", loc="left", fontsize=10)
    for axis in axes[1]:
        axis.set_xlabel("lost each way")
    axes[0][0].legend(fontsize=8)
    _save(figure, file)


def _save(figure: Any, file: Path) -> None:
    figure.tight_layout()
    figure.savefig(file, format="svg", metadata={"Date": None})


def _shown(value: float) -> str:
    if not math.isfinite(value):
        return "none"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
