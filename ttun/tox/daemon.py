"""The background: fork, the file with the process id, syslog. Source: daemon(7)."""

from __future__ import annotations

import logging
import logging.handlers
import os
import sys
from pathlib import Path

from ttun.errors import TtunError

SYSLOG = "/dev/log"


def to_background() -> None:
    """Go on in a process of its own, without a terminal. The one that was started returns 0.

    Nothing may run on other threads yet: they would not come along. Raises TtunError.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        null = os.open(os.devnull, os.O_RDWR)
    except OSError as error:
        raise TtunError(f"cannot open {os.devnull}: {error.strerror}; leave out -z") from None
    if os.fork():
        os._exit(0)
    os.setsid()
    if os.fork():  # no session leader: it can never get a terminal again
        os._exit(0)
    os.chdir("/")
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)


def open_pid_file(path: Path) -> int:
    """Return a descriptor to write the process id to, opened while we still may."""
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    except OSError as error:
        raise TtunError(f"cannot write the process id to {path}: {error.strerror}") from None


def write_pid(descriptor: int) -> None:
    """Write who we are."""
    os.write(descriptor, f"{os.getpid()}\n".encode())
    os.close(descriptor)


def log_to_syslog(log: logging.Logger) -> None:
    """Log to syslog in place of stderr. Raises TtunError."""
    try:
        handler = logging.handlers.SysLogHandler(
            SYSLOG, facility=logging.handlers.SysLogHandler.LOG_DAEMON
        )
    except OSError as error:
        raise TtunError(f"no syslog at {SYSLOG}: {error.strerror}") from None
    handler.setFormatter(logging.Formatter("ttun[%(process)d]: %(message)s"))
    log.handlers[:] = [handler]
