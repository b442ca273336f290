"""A bar chart of what ``ttun bench tunnel`` measured, as SVG. Needs matplotlib."""

from __future__ import annotations

import sys
from pathlib import Path

from ttun.errors import TtunError

try:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # text as text: a third of the size
    from matplotlib import pyplot
except ImportError:
    how = f"{sys.executable} -m pip install matplotlib"
    raise TtunError(f"--plot needs matplotlib: {how}") from None

PANELS = [
    ("TCP, one stream, Gbit/s", ("up", "down")),
    ("64-byte datagrams per second", ("datagrams",)),
    ("CPU seconds per million datagrams", ("datagram_cpu",)),
    ("ping under load, ms", ("ping_loaded",)),
]


def draw(medians: dict[str, dict[str, float]], file: Path) -> None:
    """Draw a panel for each of PANELS, a bar for each subject but the bare link."""
    names = list(medians)[1:]
    size = (11, 1.2 + 0.7 * len(names))
    figure, axes = pyplot.subplots(2, 2, figsize=size, sharey=True)
    for axis, (title, columns) in zip(axes.flat, PANELS):
        height = 0.8 / len(columns)
        for number, column in enumerate(columns):
            places = [row + number * height for row in range(len(names))]
            bars = axis.barh(places, [medians[name][column] for name in names], height * 0.9)
            axis.bar_label(bars, fmt=_shown, padding=3, fontsize=8)
        axis.set_yticks([row + (len(columns) - 1) * height / 2 for row in range(len(names))], names)
        axis.margins(x=0.15)
        axis.set_xticks([])  # each bar has its figure
        axis.tick_params(left=False)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
        axis.set_title(title, loc="left", fontsize=10)
        if len(columns) > 1:
            axis.legend(columns, fontsize=8)
    axes[0][0].invert_yaxis()  # that of all four
    figure.tight_layout()
    figure.savefig(file, format="svg", metadata={"Date": None})


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
