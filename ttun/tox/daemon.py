"""Running in the background: fork, PID file, syslog.

Sources: daemon(7), syslog(3); RFC 3164 for the priority and the time in front of a message. Where
there is no time, logd of OpenWrt can take the beginning of the message for one.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from pathlib import Path

from ttun.errors import TtunError
from ttun.process import log_writer

SYSLOG = "/dev/log"
LOG_DAEMON = 3 << 3  # the facility


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


class Syslog:
    """The system's log daemon: one datagram per line, sent without blocking."""

    def __init__(self) -> None:
        self._sock = _connect()

    def fileno(self) -> int:
        """Return the descriptor to poll."""
        return self._sock.fileno()

    def encode(self, text: str, level: int) -> bytes:
        """Return the datagram for a line."""
        priority = LOG_DAEMON | log_writer.SEVERITIES.get(level, 6)
        head = f"<{priority}>{time.strftime('%b %e %T')} ttun[{os.getpid()}]: "
        return f"{head}{text}\0".encode("utf-8", "backslashreplace")

    def write(self, data: bytes) -> int:
        """Send a datagram; reconnect if the daemon was restarted. Raises OSError."""
        try:
            return self._sock.send(data)
        except BlockingIOError:
            raise
        except OSError:
            fresh = _connect()
            self._sock.close()
            self._sock = fresh
            return self._sock.send(data)


def _connect() -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        sock.setblocking(False)
        sock.connect(SYSLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def log_to_syslog() -> None:
    """Log to syslog instead of stderr. Raises TtunError."""
    try:
        log_writer.move(Syslog(), "%(message)s")
    except OSError as error:
        raise TtunError(f"cannot log to {SYSLOG}: {error.strerror} (leave out -S)") from None
