"""Tell the service manager how we are: readiness and the watchdog, as sd_notify(3) describes them.

The manager names a datagram socket in NOTIFY_SOCKET: a path, or behind an @ an abstract name. With
WATCHDOG_USEC it asks for a sign of life at least so often. Where there is no manager nothing
happens; where it does not listen, the tunnel goes on without it.
"""

from __future__ import annotations

import logging
import os
import socket

log = logging.getLogger("ttun")

MOST_DIGITS = 15  # of microseconds: 31 years, which select() still takes


class Manager:
    """The service manager that started us, or none."""

    READY, STOPPING, ALIVE = "READY=1", "STOPPING=1", "WATCHDOG=1"

    def __init__(self) -> None:
        """Read the environment, and take it away: what we start is not to speak in our name.

        The socket is connected now: later on this process may not have the right to.
        """
        # Half the time it waits, as sd_watchdog_enabled(3) advises; seconds, None: it does not.
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
            log.info("the service manager does not listen: %s", error.strerror or error)

    def tell(self, state: str) -> None:
        """Send one state; never wait for the manager."""
        if self._sock is None:
            return
        try:
            self._sock.send(state.encode())
        except OSError as error:
            log.info("cannot tell the service manager %s: %s", state, error.strerror or error)


def _interval(microseconds: str, pid: str) -> float | None:
    if pid and pid != str(os.getpid()):
        return None  # another process is to give that sign
    if not (microseconds.isascii() and microseconds.isdigit() and len(microseconds) <= MOST_DIGITS):
        return None
    if int(microseconds) == 0:
        return None
    return int(microseconds) / 2e6
