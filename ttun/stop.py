"""A flag that threads can wait for together with sockets: an Event with a descriptor."""

from __future__ import annotations

import os
import threading


class StopFlag(threading.Event):
    """Set once, never cleared. Its descriptor turns readable when it is set."""

    def __init__(self) -> None:
        """Make it unset."""
        super().__init__()
        self._readable, self._writable = os.pipe()

    def fileno(self) -> int:
        """Return the descriptor to poll; nobody reads from it."""
        return self._readable

    def set(self) -> None:
        """Set it and wake everybody."""
        if not self.is_set():
            super().set()
            os.write(self._writable, b"!")

    def close(self) -> None:
        """Close the descriptors, when no thread polls them any more."""
        os.close(self._readable)
        os.close(self._writable)
