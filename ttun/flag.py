"""A flag that ends waits: threads wait for it together with sockets and pipes."""

from __future__ import annotations

import contextlib
import select
import socket
import time
from typing import Callable

SLICE = 1.0  # seconds of one wait: how often a thread that waits shows that it lives


class Flag:
    """Set once, never cleared. Its descriptor turns readable when it is set.

    It takes no lock, so a signal handler may set it whatever the interrupted thread is doing. The
    thread that it stops leaves its sign of life here too, as all its waits end with this flag.
    on_beat: what that thread has to do about every second, whatever it waits for; it may raise.
    """

    def __init__(self) -> None:
        """Make it unset. Raises OSError when there are no descriptors left."""
        self._readable, self._writable = socket.socketpair()
        self._set = False
        self._beat_at = time.monotonic()
        self.on_beat: Callable[[], None] | None = None

    def fileno(self) -> int:
        """Return the descriptor to poll; nobody reads from it."""
        return self._readable.fileno()

    def is_set(self) -> bool:
        """Return whether it is set."""
        return self._set

    def set(self) -> None:
        """Set it and wake all that wait; from any thread, and from a signal handler."""
        self._set = True
        # Not close(): a forked child may have the other end too.
        with contextlib.suppress(OSError):
            self._writable.shutdown(socket.SHUT_WR)

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until it is set, so many seconds at most, and return whether it is."""
        self._wait(seconds)
        return self._set

    def wait_for(self, descriptor: int, events: int, seconds: float) -> bool:
        """Wait for events of poll(2) elsewhere, so many seconds at most; return whether they came.

        Raises InterruptedError when the flag is set.
        """
        came = self._wait(seconds, (descriptor, events))
        if self._set:
            raise InterruptedError
        return came

    def _wait(self, seconds: float | None, *others: tuple[int, int]) -> bool:
        """Return whether one of the others came first."""
        end = None if seconds is None else time.monotonic() + seconds
        waiting = select.poll()
        for descriptor, events in ((self.fileno(), select.POLLIN), *others):
            waiting.register(descriptor, events)
        left = SLICE
        while not self._set and left > 0:
            self.beat()
            if end is not None:
                left = max(0.0, min(SLICE, end - time.monotonic()))
            ready = {descriptor for descriptor, _ in waiting.poll(left * 1000)}
            # In a forked child it turns readable, as the descriptors are shared, and is not set.
            self._set = self.fileno() in ready or self._set
            if ready - {self.fileno()}:
                return True
        return False

    def beat(self) -> None:
        """Leave a sign of life: the thread that this flag stops got here."""
        self._beat_at = time.monotonic()
        if self.on_beat is not None:
            self.on_beat()

    def quiet_for(self) -> float:
        """Return how many seconds ago the last sign of life was."""
        return time.monotonic() - self._beat_at
