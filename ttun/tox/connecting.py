"""Connect to targets without blocking the loop.

1. Use a numeric address directly. Resolve a name on a thread, at most MAX_LOOKUPS at a time, and
   not all for one owner.
2. Try the first MAX_ADDRESSES one after the other, all within CONNECT_TIMEOUT. Each has an equal
   part of the time that is left, so that one that does not answer leaves some to the next.
3. Give the caller the connected socket, or the reason for the failure.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import socket
import threading
import time
from collections import Counter, deque
from typing import Callable

from ttun.tox import packet
from ttun.tox.loop import Loop

log = logging.getLogger("ttun")

CONNECT_TIMEOUT = 15.0  # seconds for all addresses of a target together
MAX_ADDRESSES = 8  # its owner may give a name thousands, and each takes some of the loop's time
MAX_LOOKUPS = 64  # concurrent name lookups; further names wait
SHARE = 4  # one owner gets at most a quarter of them
LOOKUP_TIMEOUT = 30.0  # seconds, with the wait; a client waits no longer (client.WAIT_ANSWER)

Sockaddr = tuple[int, tuple[object, ...]]  # family, address
Done = Callable[["socket.socket | None", int], None]  # the socket, or a DENYTUNNEL reason


class Connector:
    """All connection attempts, each on behalf of an owner. Use it only on the loop's thread.

    owner: a friend's number, so that a friend who comes back is the same owner.
    """

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._attempts: set[_Attempt] = set()
        self._names: deque[_Attempt] = deque()  # waiting for a lookup
        self._lookups = 0
        self._of: Counter[int] = Counter()  # lookups by owner

    def __len__(self) -> int:
        """Return the number of attempts."""
        return len(self._attempts)

    def connect(self, owner: int, host: str, port: int, done: Done) -> None:
        """Connect to a target and pass the result to done, unless given up before."""

        def over(sock: socket.socket | None, reason: int) -> None:
            self._attempts.discard(attempt)
            done(sock, reason)

        attempt = _Attempt(self._loop, owner, host, port, over)
        self._attempts.add(attempt)
        try:
            addresses = attempt.look_up(socket.AI_NUMERICHOST)
        except (OSError, UnicodeError):
            self._names.append(attempt)
            self._look_up_names()
        else:
            attempt.begin(addresses)

    def give_up(self, owner: int) -> None:
        """Cancel the attempts of an owner without calling done."""
        for attempt in [each for each in self._attempts if each.owner == owner]:
            attempt.close()
            self._attempts.discard(attempt)
        self._names = deque(each for each in self._names if each.owner != owner)

    def on_tick(self, now: float) -> None:
        """Time out attempts."""
        late = [each for each in self._attempts if each.deadline <= now]
        for attempt in late:
            attempt.go_on()
        if late:  # some of them may have waited for a lookup
            self._names = deque(each for each in self._names if each in self._attempts)

    def on_stop(self) -> None:
        """Close everything."""
        for attempt in self._attempts:
            attempt.close()

    def _look_up_names(self) -> None:
        """Start lookups of waiting names, up to MAX_LOOKUPS."""
        later = []
        while self._names and self._lookups < MAX_LOOKUPS:
            attempt = self._names.popleft()
            if self._of[attempt.owner] >= MAX_LOOKUPS // SHARE:
                later.append(attempt)
                continue
            look_up = functools.partial(self._look_up_name, attempt)
            try:
                threading.Thread(target=look_up, name="ttun-lookup", daemon=True).start()
                self._lookups += 1
                self._of[attempt.owner] += 1
            except RuntimeError:  # cannot start a thread
                attempt.fail(packet.FULL)
        self._names.extendleft(reversed(later))

    def _look_up_name(self, attempt: _Attempt) -> None:
        """Look up a name on its own thread."""
        addresses: list[Sockaddr] = []
        with contextlib.suppress(OSError, UnicodeError):
            addresses = attempt.look_up(0)

        def found() -> None:
            self._lookups -= 1
            self._of[attempt.owner] -= 1
            self._of += Counter()  # forgets who has none
            if attempt in self._attempts:
                attempt.begin(addresses)
            self._look_up_names()

        self._loop.call(found)


class _Attempt:
    """One connection attempt."""

    def __init__(self, loop: Loop, owner: int, host: str, port: int, done: Done) -> None:
        self.owner = owner
        self.deadline = time.monotonic() + LOOKUP_TIMEOUT
        self._loop, self._host, self._port, self._done = loop, host, port, done
        self._addresses: list[Sockaddr] = []
        self._end = 0.0  # of the time for all addresses
        self._sock: socket.socket | None = None
        self.reason = packet.NAME

    def look_up(self, flags: int) -> list[Sockaddr]:
        """Return the target's addresses. Callable from any thread. Raises OSError, UnicodeError."""
        flags |= socket.AI_NUMERICSERV
        found = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM, flags=flags)
        return [(family, address) for family, _, _, _, address in found]

    def begin(self, addresses: list[Sockaddr]) -> None:
        """Connect to the first address that answers."""
        self._addresses = addresses[:MAX_ADDRESSES]
        self.reason = packet.UNREACHABLE if addresses else packet.NAME
        self._end = time.monotonic() + CONNECT_TIMEOUT
        self._next()

    def _next(self) -> None:
        """Try the next address; fail when none is left."""
        while self._addresses:
            family, address = self._addresses.pop(0)
            try:
                sock = socket.socket(family, socket.SOCK_STREAM)
            except OSError:
                self.reason = packet.FULL  # out of descriptors, or address family not supported
                continue
            sock.setblocking(False)
            error = sock.connect_ex(address)
            if error in (0, errno.EINPROGRESS):
                self._sock = sock
                now = time.monotonic()
                self.deadline = now + (self._end - now) / (1 + len(self._addresses))
                self._loop.add(sock, self._on_ready)
                return
            self._note(error)
            sock.close()
        self.fail(self.reason)

    def go_on(self) -> None:
        """Give up this address for the next; fail when none is left."""
        self.close()
        self._next()

    def fail(self, reason: int) -> None:
        """Close the socket and report the reason."""
        self.close()
        self._done(None, reason)

    def close(self) -> None:
        """Close the socket without calling done."""
        if self._sock is not None:
            self._loop.remove(self._sock)
            self._sock.close()
            self._sock = None

    def _note(self, error: int) -> None:
        refused = error == errno.ECONNREFUSED
        self.reason = packet.REFUSED if refused else packet.UNREACHABLE
        log.debug("connect to target failed: %s", os.strerror(error))

    def _on_ready(self, _: int) -> None:
        sock = self._sock
        assert sock is not None
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            self._note(error)
            self.go_on()
            return
        try:
            sock.getpeername()
        except OSError:
            return  # not connected yet
        self._loop.remove(sock)
        self._sock = None
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # the target may vanish
        self._done(sock, 0)
