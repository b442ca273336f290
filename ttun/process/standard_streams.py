"""Standard input, output and error where they are closed, full, or cannot show every character."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import sys


def open_missing() -> None:
    """Give a program that was started without them somewhere to write, and no other file 0 to 2.

    What cannot be written in the encoding of a stream is escaped.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            open_nowhere(number)
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - it is to stay open
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def open_nowhere(number: int) -> None:
    """Make a standard descriptor /dev/null or, where there is none, a pipe.

    One that has ended to read from, or one that nobody reads, and that is full one day, to write.
    """
    try:
        ours = os.open(os.devnull, os.O_RDWR)
    except FileNotFoundError:
        ours, other = os.pipe()
        if number:
            os.set_blocking(other, False)
            fcntl.fcntl(ours, fcntl.F_DUPFD_CLOEXEC, 3)  # it stays open
            ours, other = other, ours
        os.close(other)
    if ours != number:
        os.dup2(ours, number)
        os.close(ours)
    os.set_inheritable(number, True)


def forget_unwritten() -> None:
    """Drop what a full disk or a closed pipe did not take: Python would make it exit code 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError):
                os.close(stream.fileno())  # there may be no descriptor left for another
                open_nowhere(stream.fileno())
