"""The terminal that stdout may be: its size, and colors where it shows them.

Sources: https://no-color.org, console_codes(4).
"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap

WIDE = "\u1100"  # from here on characters may take two columns (UAX #11)
# Parameters of SGR. No yellow: it cannot be read on white.
COLORS = {"red": 31, "green": 32, "magenta": 35, "bold": 1}


def width() -> int:
    """Return the number of columns of stdout, or 80 where that is unknown."""
    return shutil.get_terminal_size((80, 24)).columns


def height() -> int:
    """Return the number of lines of stdout, or 24 where that is unknown."""
    return shutil.get_terminal_size((80, 24)).lines


def is_terminal() -> bool:
    """Return whether stdout is a terminal."""
    return sys.stdout.isatty()


def colored(text: str, color: str) -> str:
    """Return a text in one of COLORS; unchanged unless stdout is a terminal that shows colors."""
    if not is_terminal() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\033[{COLORS[color]}m{text}\033[0m"


def wrapped(text: str, indent: int, *, cut: bool = False) -> list[str]:
    """Return text in lines of stdout's width, those after the first indented.

    cut: also words that are longer than a line.
    """
    columns = max(width(), indent + 20)
    return textwrap.wrap(
        text,
        columns // 2 if max(text) >= WIDE else columns,
        subsequent_indent=" " * indent,
        break_long_words=cut,
        break_on_hyphens=False,
    )
