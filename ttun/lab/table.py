"""Tables that fit the terminal: one line per name, the figures as columns.

Columns come in groups with a title. Groups stand side by side as far as the width allows; the rest
follow in further tables below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ttun.commands import terminal

GAP = "  "  # before each cell, and once more between two groups
CELL = 6  # columns of a cell, at least
SHORTEST_NAME = 10  # columns that a name keeps, however narrow the terminal is
NONE = "-"


class Group(NamedTuple):
    """Columns that belong together. rows: the cells of each name."""

    title: str
    heads: Sequence[str]
    rows: Mapping[str, Sequence[str]]


def rounds(number: int, seconds: float) -> str:
    """Return in words how often, and for how long, each figure was measured."""
    return f"{'one round' if number == 1 else f'medians of {number} rounds'} of {seconds:g} s"


def render(groups: Sequence[Group]) -> str:
    """Return the tables. A name without cells in a group has dashes there."""
    names = list(dict.fromkeys(name for group in groups for name in group.rows))
    blocks = [_block(group, names) for group in groups]
    space = terminal.width() - max((len(block[0]) for block in blocks), default=0)
    longest = max((len(name) for name in names), default=0)
    first = min(longest, max(SHORTEST_NAME, space))
    shown = [name if len(name) <= first else name[: first - 3] + "..." for name in names]
    tables: list[list[str]] = []
    for block in blocks:
        gap = GAP
        if not tables or len(tables[-1][0]) + len(GAP + block[0]) > terminal.width():
            tables.append([" " * first, " " * first, *(f"{name:<{first}}" for name in shown)])
            gap = ""
        tables[-1] = [line + gap + more for line, more in zip(tables[-1], block)]
    return "\n\n".join("\n".join(_emphasized(table)) for table in tables)


def _block(group: Group, names: Sequence[str]) -> list[str]:
    """Return the lines of a group, all of the same length: title, heads, a line for each name."""
    rows = [group.heads, *(group.rows.get(name, [NONE] * len(group.heads)) for name in names)]
    widths = [max(CELL, *map(len, column)) for column in zip(*rows)]
    lines = ["".join(f"{GAP}{cell:>{width}}" for cell, width in zip(row, widths)) for row in rows]
    lines.insert(0, GAP + group.title)  # if it is longer, the columns stay below its beginning
    longest = max(map(len, lines[:2]))
    return [line.ljust(longest) for line in lines]


def _emphasized(lines: Sequence[str]) -> list[str]:
    plain = [line.rstrip() for line in lines]
    return [terminal.colored(line, "bold") for line in plain[:2]] + plain[2:]
