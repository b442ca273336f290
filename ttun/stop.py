"""What ends things: a flag that threads can wait for together with sockets."""

from __future__ import annotations

import socket
import threading


class StopFlag(threading.Event):
    """Set once, never cleared. Its descriptor turns readable when it is set."""

    def __init__(self) -> None:
        """Make it unset."""
        super().__init__()
        self._readable, self._writable = socket.socketpair()

    def fileno(self) -> int:
        """Return the descriptor to poll; nobody reads from it."""
        return self._readable.fileno()

    def set(self) -> None:
        """Set it and wake everybody."""
        super().set()
        self._writable.close()  # the other end turns readable; closing twice is nothing
