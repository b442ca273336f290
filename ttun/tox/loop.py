"""The event loop: one thread owns a Tox instance and all forwarded sockets.

toxcore is not thread-safe and must be iterated often. The sockets share its thread and one epoll,
so data passes between a socket and toxcore without a lock or a switch of threads.

1. Sleep until one of our sockets or of toxcore's is ready, or toxcore's interval has passed.
2. Serve our sockets. They are edge-triggered: each reports once that it became ready.
3. Iterate toxcore if it has work, and pass its events on.
4. Let the owner write received data to sockets and fill toxcore's queue. If that is full, sleep for
   toxcore's interval, a millisecond or two: only time makes room, and toxcore would take an earlier
   iteration, which finds its budget empty, for congestion.

toxcore has no function that lists its sockets, so once a second the loop looks through the
descriptors of the process for Internet sockets that are not ours. Should one belong to another part
of the process, it is not disturbed: this thread wakes up once for each arrival.
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

from ttun._codec import ffi, lib
from ttun.tox.instance import Event, Tox

log = logging.getLogger("ttun")

READABLE = select.EPOLLIN | select.EPOLLRDHUP
WRITABLE = select.EPOLLOUT
ERROR = select.EPOLLERR
BROKEN = select.EPOLLERR | select.EPOLLHUP
EDGES = READABLE | WRITABLE | select.EPOLLET

TICK = 0.5  # seconds
SEARCH = 1.0  # seconds between searches for toxcore's sockets
FULL_LEAST, FULL_MOST = 0.001, 0.002  # seconds until a full queue may have room again
UNWATCHED = 0.005  # seconds between iterations if toxcore's sockets cannot be found
DESCRIPTORS = "/proc/self/fd"


class Owner(Protocol):
    """The callbacks of the loop, always called on its thread."""

    def on_event(self, event: Event) -> None:
        """Handle an event of toxcore's."""

    def on_tick(self, now: float) -> None:
        """Enforce time limits. Called every TICK seconds."""

    def flush(self, now: float) -> tuple[bool, float]:
        """Send what can be sent; return whether toxcore is full, and when to call again."""

    def on_stop(self) -> None:
        """Close everything."""


class Loop:
    """A Tox instance, its thread, and the sockets that the thread serves."""

    def __init__(self, tox: Tox) -> None:
        self.tox = tox
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._calls: deque[Callable[[], None]] = deque()
        self._readable, self._writable = os.pipe()
        self._closing = threading.Lock()  # for both: their numbers are reused once closed
        for descriptor in (self._readable, self._writable):
            os.set_blocking(descriptor, False)
        self._epoll.register(self._readable, select.EPOLLIN)
        self._handlers[self._readable] = lambda _: self._wake_up()
        self._watched = False
        self._stopping = False
        self._owner: Owner | None = None
        self.error: BaseException | None = None
        self.over = threading.Event()
        self.when_over: Callable[[], None] = lambda: None  # called by its thread
        self._thread = threading.Thread(target=self._main, name="ttun-tox", daemon=True)

    def start(self, owner: Owner) -> None:
        """Start the thread."""
        self._owner = owner
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread and wait for it. Callable from any other thread."""
        if not self._thread.is_alive():
            return
        self.call(self.finish)
        self._thread.join()

    def finish(self) -> None:
        """Stop after this round. Call it on the loop's thread."""
        self._stopping = True

    def call(self, function: Callable[[], None]) -> None:
        """Call a function on the loop's thread, from any thread. Ignored after the loop's end."""
        self._calls.append(function)
        with self._closing:
            if not self.over.is_set():
                with contextlib.suppress(BlockingIOError):  # full: a wake-up is already pending
                    os.write(self._writable, b"\0")

    def add(self, sock: socket.socket, handler: Callable[[int], None]) -> None:
        """Call handler with the events of a socket, edge-triggered."""
        sock.setblocking(False)
        self._handlers[sock.fileno()] = handler
        try:
            self._epoll.register(sock, EDGES)
        except FileExistsError:  # a socket of toxcore's used this number before
            self._epoll.modify(sock, EDGES)

    def remove(self, sock: socket.socket) -> None:
        """Stop serving a socket. Call it before closing the socket."""
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
            log.debug("Tox thread failed", exc_info=True)
            self.error = error
        try:
            self._owner.on_stop()
        except BaseException as error:
            log.debug("Tox thread failed while stopping", exc_info=True)
            self.error = self.error or error
        finally:
            self.tox.close()
            self._epoll.close()
            with self._closing:
                os.close(self._writable)
                os.close(self._readable)
                self.over.set()
            self.when_over()

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
        """Watch toxcore's sockets that are not watched yet."""
        try:
            names = os.listdir(DESCRIPTORS)
        except OSError:
            return  # no /proc: iterate toxcore by the clock
        for descriptor in map(int, names):
            kind = _internet_socket(descriptor)
            if descriptor in self._handlers or kind is None:
                continue
            try:
                # A UDP socket becomes writable again after each packet, even one that the local
                # firewall rejected. toxcore would retry that packet at once, each time with the
                # next nonce, until the nonces are too far ahead for the peer.
                is_udp = kind == socket.SOCK_DGRAM
                self._epoll.register(descriptor, EDGES & ~WRITABLE if is_udp else EDGES)
                self._watched = True
            except OSError:
                pass  # already watched; epoll drops closed sockets by itself


def _internet_socket(descriptor: int) -> int | None:
    """Return the type of an Internet socket, or None for any other descriptor."""
    # socket.socket() would make it non-blocking if the program has set a default timeout.
    value, size = ffi.new("int *"), ffi.new("uint32_t *", 4)
    for option in (socket.SO_DOMAIN, socket.SO_TYPE):
        family = value[0]
        if lib.getsockopt(descriptor, socket.SOL_SOCKET, option, value, size) != 0:
            return None
    return value[0] if family in (socket.AF_INET, socket.AF_INET6) else None
