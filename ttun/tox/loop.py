"""The thread that owns a Tox instance, and everything that happens on it.

toxcore is not thread-safe and has to be iterated often. All forwarded sockets are on the same
thread, in one epoll: a byte between a socket and toxcore waits for no other thread and no lock, and
two hundred connections cost two hundred descriptors.

1. Sleep until a socket of ours or of toxcore's is ready, or toxcore's own interval is over.
2. Serve our sockets. They are edge-triggered: each reports once that it became ready.
3. Iterate toxcore if it has work, and hand on what it reports.
4. Let the owner flush what came for sockets and fill toxcore's queue. If that is full, nothing else
   happens until toxcore's interval is over, a millisecond or two: only that makes room. toxcore
   would take an earlier iteration, which finds its budget empty, for congestion.

toxcore has no function that names its sockets. They are looked for among the descriptors of the
process once a second: Internet sockets that are not ours. An edge-triggered wait is safe for a
socket of another owner too: it wakes this thread once for what arrives, nothing more.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import threading
import time
from collections import deque
from typing import Callable, Protocol

from ttun.tox.instance import Event, Tox

log = logging.getLogger("ttun")

READABLE = select.EPOLLIN | select.EPOLLRDHUP
WRITABLE = select.EPOLLOUT
ERROR = select.EPOLLERR
BROKEN = select.EPOLLERR | select.EPOLLHUP
EDGES = READABLE | WRITABLE | select.EPOLLET

TICK = 0.5  # seconds
SEARCH = 1.0  # seconds between two searches for toxcore's sockets
FULL_LEAST, FULL_MOST = 0.001, 0.002  # seconds until a full queue may have room again
UNWATCHED = 0.005  # seconds between two iterations where toxcore's sockets cannot be found
DESCRIPTORS = "/proc/self/fd"


class Owner(Protocol):
    """What the loop calls, always on its thread."""

    def on_event(self, event: Event) -> None:
        """Take what toxcore reports."""

    def on_tick(self, now: float) -> None:
        """End what takes too long. Called every TICK seconds."""

    def flush(self, now: float) -> tuple[bool, float]:
        """Send what can be sent; return whether toxcore is full, and when to be called again."""

    def on_stop(self) -> None:
        """Close everything."""


class Loop:
    """One Tox, its thread, and the sockets that are served there. start() starts the thread."""

    def __init__(self, tox: Tox) -> None:
        self.tox = tox
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._calls: deque[Callable[[], None]] = deque()
        self._readable, self._writable = os.pipe()
        self._closing = threading.Lock()  # over both: their numbers are reused after the end
        for descriptor in (self._readable, self._writable):
            os.set_blocking(descriptor, False)
        self._epoll.register(self._readable, select.EPOLLIN)
        self._handlers[self._readable] = lambda _: self._wake_up()
        self._watched = False
        self._stopping = False
        self._owner: Owner | None = None
        self.error: BaseException | None = None
        self.over = threading.Event()
        self._thread = threading.Thread(target=self._main, name="ttun-tox", daemon=True)

    def start(self, owner: Owner) -> None:
        """Start the thread."""
        self._owner = owner
        self._thread.start()

    def stop(self) -> None:
        """End it and wait until it has ended; from any other thread."""
        if not self._thread.is_alive():
            return
        self.call(self.finish)
        self._thread.join()

    def finish(self) -> None:
        """End it when this round is over; on the loop's thread."""
        self._stopping = True

    def call(self, function: Callable[[], None]) -> None:
        """Call a function on the loop's thread; from any thread. Ignored after the end."""
        self._calls.append(function)
        with self._closing:
            if not self.over.is_set():
                with contextlib.suppress(BlockingIOError):  # full: it wakes up anyway
                    os.write(self._writable, b"\0")

    def add(self, sock: socket.socket, handler: Callable[[int], None]) -> None:
        """Call handler with the events of a socket, each once (EPOLLET)."""
        sock.setblocking(False)
        self._handlers[sock.fileno()] = handler
        try:
            self._epoll.register(sock, EDGES)
        except FileExistsError:  # a socket of toxcore's had this number
            self._epoll.modify(sock, EDGES)

    def remove(self, sock: socket.socket) -> None:
        """Stop serving a socket, before it is closed."""
        if self._handlers.pop(sock.fileno(), None) is not None:
            self._epoll.unregister(sock)

    def _wake_up(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._readable, 4096)

    def _main(self) -> None:
        assert self._owner is not None
        try:
            self._run(self._owner)
        except BaseException as error:
            log.debug("the Tox thread failed", exc_info=True)
            self.error = error
        try:
            self._owner.on_stop()
        except BaseException as error:
            log.debug("the Tox thread failed at its end", exc_info=True)
            self.error = self.error or error
        finally:
            self.tox.close()
            self._epoll.close()
            with self._closing:
                os.close(self._writable)
                os.close(self._readable)
                self.over.set()

    def _run(self, owner: Owner) -> None:
        due = next_tick = next_search = again = 0.0
        full = False
        while not self._stopping:
            wait = max(0.0, min(due, next_tick, again) - time.monotonic())
            if full:
                time.sleep(wait)
                wait = 0.0
            iterate = False
            for descriptor, what in self._epoll.poll(wait):
                handler = self._handlers.get(descriptor)
                if handler is None:
                    iterate = True
                else:
                    handler(what)
            while self._calls:
                self._calls.popleft()()
            now = time.monotonic()
            if iterate or full or now >= due:
                for event in self.tox.iterate():
                    owner.on_event(event)
                now = time.monotonic()
                due = now + min(self.tox.interval(), TICK if self._watched else UNWATCHED)
            if now >= next_tick:
                owner.on_tick(now)
                next_tick = now + TICK
            if now >= next_search:
                self._search()
                next_search = now + SEARCH
            full, again = owner.flush(now)
            if full:
                due = now + min(max(self.tox.interval(), FULL_LEAST), FULL_MOST)

    def _search(self) -> None:
        """Watch those sockets of toxcore's that are not watched yet."""
        try:
            names = os.listdir(DESCRIPTORS)
        except OSError:
            return  # no /proc here: toxcore is iterated by the clock
        for descriptor in map(int, names):
            kind = _internet_socket(descriptor)
            if descriptor in self._handlers or kind is None:
                continue
            try:
                # A UDP socket turns writable after each packet, also one that the firewall refused.
                # toxcore would retry that one at once, each time with the next nonce, until the
                # peer cannot follow the nonces any more.
                is_udp = kind == socket.SOCK_DGRAM
                self._epoll.register(descriptor, EDGES & ~WRITABLE if is_udp else EDGES)
                self._watched = True
            except OSError:
                pass  # watched already; a closed socket leaves the epoll by itself


def _internet_socket(descriptor: int) -> int | None:
    """Return the type of an Internet socket, None for everything else."""
    try:
        sock = socket.socket(fileno=descriptor)
    except OSError:
        return None
    family, kind = sock.family, sock.type
    sock.detach()
    return kind if family in (socket.AF_INET, socket.AF_INET6) else None
