"""Notify the service manager: readiness and keep-alives for its watchdog, see sd_notify(3).

NOTIFY_SOCKET names a datagram socket: a path, or an abstract name after an @. WATCHDOG_USEC is how
often a keep-alive is expected. Without a service manager nothing is sent; if it does not listen,
the tunnel runs without it.
"""

from __future__ import annotations

import logging
import os
import socket

log = logging.getLogger("ttun")

MOST_DIGITS = 15  # of microseconds: 31 years, which select() still accepts


class Manager:
    """The service manager that started this process, or none."""

    READY, STOPPING, ALIVE = "READY=1", "STOPPING=1", "WATCHDOG=1"

    def __init__(self) -> None:
        """Read the variables and unset them: child processes must not notify for this one.

        The socket is connected now, as privileges may be missing later.
        """
        # Half the timeout, as sd_watchdog_enabled(3) advises; seconds, None: no watchdog.
        self.interval = _interval(
            os.environ.pop("WATCHDOG_USEC", ""), os.environ.pop("WATCHDOG_PID", "")
        )
        self._sock: socket.socket | None = None
        address = os.environ.pop("NOTIFY_SOCKET", "")
        if not address:
            return
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            sock.connect("\0" + address[1:] if address.startswith("@") else address)
            sock.setblocking(False)
            self._sock = sock
        except OSError as error:
            sock.close()
            log.warning("cannot connect to the service manager: %s", error.strerror or error)

    def tell(self, state: str) -> None:
        """Send one state. Never waits."""
        if self._sock is None:
            return
        try:
            self._sock.send(state.encode())
        except OSError as error:
            log.warning(
                "cannot notify the service manager of %s: %s", state, error.strerror or error
            )


def _interval(microseconds: str, pid: str) -> float | None:
    if pid and pid != str(os.getpid()):
        return None  # another process sends the keep-alives
    if not (microseconds.isascii() and microseconds.isdigit() and len(microseconds) <= MOST_DIGITS):
        return None
    return int(microseconds) / 2e6 or None
