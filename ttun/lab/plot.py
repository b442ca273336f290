"""Charts of ``ttun bench tunnel`` and ``ttun bench link``, as SVG. Needs matplotlib.

Bars for figures that stand alone, lines for goodput over loss. Each panel says which direction is
better; the caption below names the machine. A chart has its own background, light or dark as the
reader's system prefers.
"""

from __future__ import annotations

import io
import itertools
import math
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ttun.errors import TtunError
from ttun.lab import report

try:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot
except ImportError:
    how = f"{sys.executable} -m pip install matplotlib"
    raise TtunError(f"--plot needs matplotlib: {how}") from None

PAPER, INK, GRID = "#fefefe", "#1f2329", "#c9ced6"
IN_THE_DARK = {PAPER: "#14181d", INK: "#dbe1e8", GRID: "#444c56"}
SERIES = ["#2f81d6", "#e08a1e", "#2e9e5b", "#d1495b", "#8f6bd6", "#8a8f98"]  # legible on both
matplotlib.rcParams.update({
    "svg.fonttype": "none",  # text as text: a third of the size
    "svg.hashsalt": "ttun",  # the same figures give the same file
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.prop_cycle": matplotlib.rcsetup.cycler("color", SERIES),
    "legend.frameon": False,
    "grid.color": GRID,
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), PAPER),
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor",
                     "xtick.color", "ytick.color"), INK),
})  # fmt: skip
WIDTH, ROW = 11, 0.35  # inches of a chart, of a target in one panel
CAPTION = 150  # characters of a line

Panels = list[tuple[str, str, tuple[str, ...]]]  # title, what is better, figures
HIGHER, LOWER = "higher is better", "lower is better"
PANELS: Panels = [
    ("TCP, one stream, Gbit/s", HIGHER, ("up", "down")),
    ("64-byte datagrams per second", HIGHER, ("datagrams",)),
    ("CPU seconds per million datagrams", LOWER, ("datagram_cpu",)),
    ("ping under load, ms", LOWER, ("ping_loaded",)),
]
LINK_PANELS: Panels = [
    ("one stream, Mbit/s", HIGHER, ("up", "down")),
    ("eight streams, Mbit/s", HIGHER, ("up 8", "down 8")),
    ("ping during a download, ms", LOWER, ("median", "p99")),
    ("100 kB during a download, ms", LOWER, ("median fetch", "p95 fetch")),
]


def draw(medians: dict[str, dict[str, float]], caption: str, file: Path) -> None:
    """Draw a panel for each of PANELS, a bar for each target but the bare link, which is first."""
    _draw_bars(PANELS, dict(list(medians.items())[1:]), caption, file)


def draw_link(
    losses: Sequence[float],
    summaries: Sequence[dict[str, dict[str, dict[str, float]]]],
    caption: str,
    file: Path,
) -> None:
    """Draw what link_report.summary returned for each loss: bars for one, lines for several."""
    if len(losses) > 1:
        _draw_lines(losses, summaries, caption, file)
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
    _draw_bars(LINK_PANELS, rows, caption, file)


def _draw_bars(panels: Panels, rows: dict[str, dict[str, float]], caption: str, file: Path) -> None:
    names = list(rows)
    size = (WIDTH, 1.6 + 2 * ROW * len(names))
    figure, axes = pyplot.subplots(2, 2, figsize=size, sharey=True)
    for axis, (title, better, columns) in zip(axes.flat, panels):
        height = 0.8 / len(columns)
        for number, column in enumerate(columns):
            places = [row + number * height for row in range(len(names))]
            values = [rows[name][column] for name in names]
            bars = axis.barh(places, [v if math.isfinite(v) else 0 for v in values], height * 0.9)
            axis.bar_label(bars, [_shown(v) for v in values], padding=3)
        axis.set_yticks([row + (len(columns) - 1) * height / 2 for row in range(len(names))], names)
        axis.margins(x=0.15, y=0.02)
        axis.set_xticks([])  # each bar has its figure
        axis.tick_params(left=False)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
        _set_title(axis, title, better)
        if len(columns) > 1:
            axis.legend([column.partition(" ")[0] for column in columns], loc="lower right")
    axes[0][0].invert_yaxis()  # of all four
    _save(figure, caption, file)


def _draw_lines(
    losses: Sequence[float],
    summaries: Sequence[dict[str, dict[str, dict[str, float]]]],
    caption: str,
    file: Path,
) -> None:
    """Draw goodput over loss. The losses are spaced evenly, so that 0 has a place."""
    names = list(dict.fromkeys(name for each in summaries for name in each))
    figure, axes = pyplot.subplots(2, 2, figsize=(WIDTH, 7.4), sharex=True, sharey=True)
    panels = (("up_1", "one stream up"), ("down_1", "one stream down"),
              ("up_8", "eight streams up"), ("down_8", "eight streams down"))  # fmt: skip
    for axis, (column, title) in zip(axes.flat, panels):
        for name, marker in zip(names, itertools.cycle("osD^vPX*")):
            values = [
                each[name]["goodput"][column] if name in each else math.nan for each in summaries
            ]
            weight = 3 if name == "ttun" else 1.5
            axis.plot(range(len(losses)), values, marker=marker, label=name, linewidth=weight)
        axis.set_xticks(range(len(losses)), [f"{loss:g} %" for loss in losses])
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y")
        _set_title(axis, f"{title}, Mbit/s", HIGHER)
    for axis in axes[1]:
        axis.set_xlabel("loss each way")
    axes[0][0].legend()
    _save(figure, caption, file)


def _set_title(axis: Any, title: str, better: str) -> None:
    axis.set_title(f"{title} ({better})", loc="left", fontsize=10)


def _save(figure: Any, caption: str, file: Path) -> None:
    lines = textwrap.wrap(caption, CAPTION)
    figure.text(0.01, 0.01, "\n".join(lines))
    figure.tight_layout(rect=(0, (0.15 + 0.17 * len(lines)) / figure.get_figheight(), 1, 1))
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    dark = "".join(
        f'[style*="{what}: {light}"]{{{what}:{color}!important}}'
        for light, color in IN_THE_DARK.items()
        for what in ("fill", "stroke")
    )
    style = f"<style>@media(prefers-color-scheme:dark){{{dark}}}</style>\n <defs>"
    report.write(file, drawn.getvalue().replace("<defs>", style, 1))


def _shown(value: float) -> str:
    if not math.isfinite(value):
        return "none"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
