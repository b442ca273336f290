"""A bar chart of what ``ttun bench tunnel`` measured, as SVG. Needs the extra ``plot``."""

from __future__ import annotations

from pathlib import Path

from ttun.errors import TtunError

try:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot
except ImportError:
    raise TtunError("--plot needs matplotlib: pip install 'ttun[plot]'") from None

PANELS = [
    ("TCP, one stream, Gbit/s", ("up", "down")),
    ("64-byte datagrams per second", ("datagrams",)),
    ("CPU seconds per million datagrams", ("datagram_cpu",)),
    ("ping under load, ms", ("ping_loaded",)),
]


def draw(medians: dict[str, dict[str, float]], file: Path) -> None:
    """Draw a panel for each of PANELS, a bar for each subject but the bare link."""
    names = list(medians)[1:]
    figure, axes = pyplot.subplots(len(PANELS), 1, figsize=(8, 1.2 + 0.45 * len(names) * 4))
    for axis, (title, columns) in zip(axes, PANELS):
        height = 0.8 / len(columns)
        for number, column in enumerate(columns):
            places = [row + number * height for row in range(len(names))]
            bars = axis.barh(places, [medians[name][column] for name in names], height * 0.9)
            axis.bar_label(bars, fmt="{:,.3g}", padding=3, fontsize=8)
        axis.set_yticks([row + (len(columns) - 1) * height / 2 for row in range(len(names))], names)
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.set_title(title, loc="left", fontsize=10)
        if len(columns) > 1:
            axis.legend(columns, fontsize=8)
    figure.tight_layout()
    figure.savefig(file, format="svg", metadata={"Date": None})
