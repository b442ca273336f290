"""Logging to syslog, if TTUN_LOG says so: the init script of OpenWrt sets it.

Sources: syslog(3); RFC 3164 for the priority and the time in front of a message. Where there is no
time, logd of OpenWrt can take the beginning of the message for one.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time

from ttun.errors import TtunError
from ttun.process import log_writer

VARIABLE = "TTUN_LOG"  # "syslog": log there, each line with its priority
SYSLOG = "/dev/log"
LOG_DAEMON = 3 << 3  # the facility


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


def log_to_syslog_if_wanted() -> None:
    """Log there if the environment says so and there is a syslog; before log_writer.start()."""
    if os.environ.get(VARIABLE) == "syslog":
        with contextlib.suppress(TtunError):
            log_to_syslog()


def log_to_syslog() -> None:
    """Log to syslog instead of stderr. Raises TtunError."""
    try:
        log_writer.move(Syslog(), "%(message)s")
    except OSError as error:
        raise TtunError(f"cannot log to {SYSLOG}: {error.strerror} (leave out -S)") from None
