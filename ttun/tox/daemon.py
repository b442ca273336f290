"""Running in the background: fork, PID file. Source: daemon(7)."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from ttun.errors import TtunError
from ttun.process import log_writer


def to_background() -> None:
    """Continue in a process without a terminal; the first process exits with 0.

    A fork does not keep threads, so none may have been started yet. Raises TtunError.
    """
    sys.stdout.flush()
    log_writer.flush()
    try:
        null = os.open(os.devnull, os.O_RDWR)
    except OSError as error:
        raise TtunError(f"cannot open {os.devnull}: {error.strerror} (leave out -z)") from None
    if os.fork():
        os._exit(0)
    os.setsid()
    if os.fork():  # not a session leader, so it cannot acquire a terminal
        os._exit(0)
    os.chdir("/")
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)


def open_pid_file(path: Path) -> int:
    """Open the PID file before privileges are dropped and return its descriptor.

    The content stays until write_pid(): if startup fails, it may belong to a running process.
    """
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK, 0o644)
    except OSError as error:
        raise TtunError(f"cannot write the process ID to {path}: {error.strerror}") from None


def write_pid(descriptor: int) -> None:
    """Replace the content of the PID file with our process ID."""
    with contextlib.suppress(OSError):  # not a regular file
        os.ftruncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()}\n".encode())
    os.close(descriptor)
