"""A stop flag that threads can poll together with sockets and pipes."""

from __future__ import annotations

import contextlib
import select
import socket
import time
from typing import Callable

SLICE = 1.0  # seconds: the interval of heartbeats while waiting


class Flag:
    """Set once, never cleared. Its descriptor becomes readable when it is set.

    It takes no lock, so a signal handler may set it at any time. The thread that it stops also
    records its heartbeats here, as every wait of that thread includes this flag. on_beat: called
    by that thread about every second, during any wait; it may raise. It returns the seconds after
    which it is to be called again, if that is sooner.
    """

    def __init__(self) -> None:
        """Create it unset. Raises OSError if no descriptor is available."""
        self._readable, self._writable = socket.socketpair()
        self._set = False
        self._beat_at = time.monotonic()
        self.on_beat: Callable[[], float] | None = None

    def __del__(self) -> None:
        """Close it: else Python warns of sockets that nobody closed."""
        with contextlib.suppress(AttributeError):  # no descriptor was available
            self._readable.close()
            self._writable.close()

    def fileno(self) -> int:
        """Return the descriptor to poll. Do not read from it."""
        return self._readable.fileno()

    def is_set(self) -> bool:
        """Return whether it is set."""
        return self._set

    def set(self) -> None:
        """Set it and wake all waiting threads; from any thread or signal handler."""
        self._set = True
        # Not close(): a forked child may hold a copy.
        with contextlib.suppress(OSError):
            self._writable.shutdown(socket.SHUT_WR)

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until it is set, for at most seconds; return whether it is."""
        self._wait(seconds)
        return self._set

    def wait_for(self, descriptor: int, events: int, seconds: float) -> bool:
        """Wait for poll(2) events on a descriptor, for at most seconds; return whether any came.

        Raises InterruptedError when the flag is set.
        """
        came = self._wait(seconds, (descriptor, events))
        if self._set:
            raise InterruptedError
        return came

    def _wait(self, seconds: float | None, *others: tuple[int, int]) -> bool:
        """Return whether one of the others became ready."""
        end = None if seconds is None else time.monotonic() + seconds
        waiting = select.poll()
        for descriptor, events in ((self.fileno(), select.POLLIN), *others):
            waiting.register(descriptor, events)
        left = 1.0
        while not self._set and left > 0:
            pause = self.beat()
            if end is not None:
                left = max(0.0, end - time.monotonic())
                pause = min(pause, left)
            ready = {descriptor for descriptor, _ in waiting.poll(pause * 1000)}
            # A forked child shares the descriptors: readable there means set by the parent.
            self._set = self.fileno() in ready or self._set
            if ready - {self.fileno()}:
                return True
        return False

    def beat(self) -> float:
        """Record a heartbeat of the thread that this flag stops; return the seconds to the next."""
        self._beat_at = time.monotonic()
        return SLICE if self.on_beat is None else max(0.0, min(SLICE, self.on_beat()))

    def quiet_for(self) -> float:
        """Return the seconds since the last heartbeat."""
        return time.monotonic() - self._beat_at
