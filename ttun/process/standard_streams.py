"""Standard streams that are closed, full, or cannot encode every character."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import sys
import textwrap


def open_missing() -> None:
    """Open descriptors 0 to 2 if they are closed, so that no other file gets these numbers.

    Characters that a stream cannot encode are escaped.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            open_nowhere(number)
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - stays open
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def open_nowhere(number: int) -> None:
    """Open /dev/null as a standard descriptor or, if there is none, a pipe.

    For reading, a pipe at its end; for writing, one that is never read and may become full.
    """
    try:
        ours = os.open(os.devnull, os.O_RDWR)
    except FileNotFoundError:
        ours, other = os.pipe()
        if number:
            os.set_blocking(other, False)
            fcntl.fcntl(ours, fcntl.F_DUPFD_CLOEXEC, 3)  # stays open
            ours, other = other, ours
        os.close(other)
    if ours != number:
        os.dup2(ours, number)
        os.close(ours)
    os.set_inheritable(number, True)


def tell(line: str) -> None:
    """Print a line on stderr; a terminal gets it broken between words. Ignore what stderr lacks."""
    with contextlib.suppress(OSError):
        if os.isatty(2):
            columns = os.get_terminal_size(2).columns or 80
            line = textwrap.fill(line, columns, break_long_words=False, break_on_hyphens=False)
        print(line, file=sys.stderr)


def forget_unwritten() -> None:
    """Discard output that a full disk or closed pipe rejected: Python would exit with 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError):
                os.close(stream.fileno())  # it may be the last free descriptor
                open_nowhere(stream.fileno())
