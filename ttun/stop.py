"""What ends things: a flag that threads can wait for together with sockets, and signals."""

from __future__ import annotations

import os
import select
import signal
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


class Signals:
    """Signals, and the word of other threads that it is over, for the main thread to wait for.

    The handlers do nothing: the interpreter writes a signal's number to a pipe, which is safe at
    any moment, and the main thread sleeps until the pipe has something.
    """

    def __init__(self, *numbers: int) -> None:
        """Take over these signals; on the main thread."""
        self._readable, self._writable = os.pipe()
        os.set_blocking(self._writable, False)
        signal.set_wakeup_fd(self._writable)
        for number in numbers:
            signal.signal(number, lambda *_: None)

    def wake(self) -> None:
        """Have wait() return 0; from any thread."""
        os.write(self._writable, b"\0")

    def wait(self, seconds: float | None = None) -> int | None:
        """Return a signal's number, 0 for wake(), None when so many seconds are over."""
        if not select.select([self._readable], [], [], seconds)[0]:
            return None
        return os.read(self._readable, 1)[0]
