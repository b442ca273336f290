"""The server: lets friends in, and connects them to targets.

 1. A friend request comes: the secret and the list of allowed keys decide.
 2. A friend requests a target: the rules decide; a name is looked up on a thread of its own.
 3. The addresses are tried one after the other, without blocking, within fifteen seconds.
 4. The tunnel is acknowledged, or refused with the reason.

In place of the network a target can be a function that takes the socket: the tunnel inside.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hmac
import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import Callable

from ttun.address import Address
from ttun.tox import packet, protocol
from ttun.tox.forwarder import Forwarder, Link
from ttun.tox.loop import Loop
from ttun.tox.rules import allowed
from ttun.tox.stream import Stream
from ttun.tox.toxcore import FriendRequest

log = logging.getLogger("ttun")

CONNECT_TIMEOUT = 15.0  # seconds for a target, all its addresses together
MAX_LOOKUPS = 64  # names being looked up; more of them wait
MAX_STREAMS = 4096  # connections of all friends together
MAX_FRIENDS = 256  # that are online, and as many that are not: the one that left first is forgotten

Sockaddr = tuple[int, tuple[object, ...]]  # family, address
# Takes a connected socket and who it comes from; returns False if it has no place for one more.
Target = Callable[[socket.socket, str], bool]


class Server(Forwarder):
    """Serves friends. secret: None takes anybody who has our ID. keys: None takes any key."""

    is_server = True

    def __init__(
        self,
        loop: Loop,
        *,
        secret: bytes | None = None,
        keys: Collection[bytes] | None = None,
        rules: Sequence[Address] | None = None,
        targets: Mapping[tuple[str, int], Target] | None = None,
    ) -> None:
        """Serve nobody yet. With targets, those alone are answered."""
        super().__init__(loop)
        self._secret, self._keys, self._rules = secret, keys, rules
        self._targets = targets
        self._connecting: set[_Connecting] = set()
        self._lookups = 0
        self._names: deque[tuple[Link, protocol.Requested]] = deque()  # to be looked up
        self._offline: dict[int, bytes] = {}  # friends' keys, the first to leave first
        self._left: list[int] = []  # those of them that were online since the last tick

    def on_request(self, request: FriendRequest) -> None:
        """Accept a friend, or say in the log why not. Its message is never logged."""
        name = request.key.hex()[:8].upper()
        reason = self._why_not(request)
        if reason:
            log.warning("friend request of %s ignored: %s", name, reason)
            return
        if self._accept(request.key):
            log.info("friend request of %s accepted", name)
        else:
            log.warning("friend request of %s: toxcore does not take it", name)

    def _accept(self, key: bytes) -> bool:
        friend = self.loop.tox.accept_friend(key)
        if friend is not None:
            self._offline[friend] = key
        return friend is not None

    def _why_not(self, request: FriendRequest) -> str | None:
        if self._secret is not None:
            if not request.message.endswith(b"\0"):
                return "no secret in it"
            # What the original compares ends at the first NUL.
            given = request.message.split(b"\0", 1)[0]
            if not hmac.compare_digest(given, self._secret):
                return "wrong secret"
        if self._keys is not None and request.key not in self._keys:
            return "its Tox ID is not among those allowed with -i"
        if len(self.links) >= MAX_FRIENDS:
            return "too many friends are online"
        if len(self._offline) >= 2 * MAX_FRIENDS:
            return "too many at once"
        return None

    def on_link(self, link: Link) -> None:
        """A friend is online."""
        self._offline.pop(link.friend, None)

    def on_lost(self, link: Link) -> None:
        """A friend is offline: it may come back without a new request."""
        self._offline[link.friend] = self.loop.tox.friend_key(link.friend)
        self._left.append(link.friend)
        self.on_restarted(link)

    def _forget(self) -> None:
        """Have toxcore forget where friends were that left, and the first of too many altogether.

        It would go on looking for them there, and give what comes from there to nobody else: not to
        the next client of that host, if that has the port that the last one had. Between rounds of
        the loop, as a friend's number may be another's afterwards.
        """
        for friend in self._left:
            key = self._offline.pop(friend, None)
            if key is not None:  # neither back nor forgotten meanwhile
                self.loop.tox.delete_friend(friend)
                self._accept(key)
        self._left.clear()
        while len(self._offline) > MAX_FRIENDS:
            oldest = next(iter(self._offline))
            del self._offline[oldest]
            self.loop.tox.delete_friend(oldest)

    def on_restarted(self, link: Link) -> None:
        """Nobody waits for what is being connected any more."""
        for connecting in [each for each in self._connecting if each.link is link]:
            connecting.give_up()
            self._connecting.discard(connecting)
        self._names = deque(each for each in self._names if each[0] is not link)

    def on_requested(self, link: Link, request: protocol.Requested) -> None:
        """Connect a friend to a target."""
        target = f"{request.host}:{request.port}"
        reason = None
        by_rule = self._rules is None or allowed(self._rules, request.host, request.port)
        if not by_rule or not self._has_target(request):
            reason = packet.RULE
        elif self._is_full(link):
            reason = packet.FULL
        if reason:
            self._refuse(link, request, reason)
        elif self._targets is not None:
            self._take(link, request, self._targets[request.host, request.port])
        else:
            log.debug("peer %s: connecting to %s", link.name, target)
            self._look_up(link, request)

    def _is_full(self, link: Link) -> bool:
        """Return whether a friend, or all of them, have as many connections as they may.

        Streams are counted: those of slow readers outlive their tunnels.
        """
        streams = sum(len(each.streams) for each in self.links.values())
        return len(link.streams) >= protocol.MAX_TUNNELS or streams >= MAX_STREAMS

    def _has_target(self, request: protocol.Requested) -> bool:
        return self._targets is None or (request.host, request.port) in self._targets

    def _refuse(self, link: Link, request: protocol.Requested, reason: int) -> None:
        why = packet.REASONS[reason]
        log.info("peer %s: %s:%d: %s", link.name, request.host, request.port, why)
        link.peer.deny(request.forward_id, reason)

    def _take(self, link: Link, request: protocol.Requested, target: Target) -> None:
        """Connect a friend to a target inside this process."""
        try:
            ours, theirs = socket.socketpair()
        except OSError:  # no descriptors
            self._refuse(link, request, packet.FULL)
            return
        if target(theirs, link.name):
            self._opened(link, request.forward_id, ours)
            return
        ours.close()
        theirs.close()
        self._refuse(link, request, packet.FULL)

    def _opened(self, link: Link, forward_id: int, sock: socket.socket) -> None:
        tunnel = link.peer.accept(forward_id, None)
        if tunnel is None:
            sock.close()
            return
        Stream(link, sock, tunnel)

    def _look_up(self, link: Link, request: protocol.Requested) -> None:
        """Find the addresses of a target: at once if it is one, else on a thread."""
        try:
            self._connect(link, request, _addresses(request, socket.AI_NUMERICHOST))
            return
        except OSError:
            pass
        self._names.append((link, request))
        self._look_up_names()

    def _look_up_names(self) -> None:
        """Look up names that wait, as many at once as there may be threads."""
        while self._names and self._lookups < MAX_LOOKUPS:
            link, request = self._names.popleft()
            look_up = functools.partial(self._look_up_name, link, request)
            try:
                threading.Thread(target=look_up, name="ttun-lookup", daemon=True).start()
                self._lookups += 1
            except RuntimeError:  # as many threads as there may be
                self._refuse(link, request, packet.FULL)

    def _look_up_name(self, link: Link, request: protocol.Requested) -> None:
        """Look up a name, on a thread of its own."""
        addresses: list[Sockaddr] = []
        with contextlib.suppress(OSError, UnicodeError):
            addresses = _addresses(request, 0)

        def found() -> None:
            self._lookups -= 1
            if self.links.get(link.friend) is link:
                self._connect(link, request, addresses)
            self._look_up_names()

        self.loop.call(found)

    def _connect(self, link: Link, request: protocol.Requested, addresses: list[Sockaddr]) -> None:
        if not addresses:
            self._refuse(link, request, packet.NAME)
            return

        def done(sock: socket.socket | None, reason: int) -> None:
            self._connecting.discard(connecting)
            if sock is None:
                self._refuse(link, request, reason)
            else:
                self._opened(link, request.forward_id, sock)

        connecting = _Connecting(self.loop, link, addresses, done)
        self._connecting.add(connecting)
        connecting.next()

    def on_tick(self, now: float) -> None:
        """See who takes too long."""
        super().on_tick(now)
        for connecting in [each for each in self._connecting if each.deadline <= now]:
            connecting.time_out()
        self._forget()

    def on_stop(self) -> None:
        """Close everything."""
        for connecting in list(self._connecting):
            connecting.give_up()
        super().on_stop()


class _Connecting:
    """A connection to a target being made."""

    def __init__(
        self,
        loop: Loop,
        link: Link,
        addresses: list[Sockaddr],
        done: Callable[[socket.socket | None, int], None],
    ) -> None:
        self.link = link
        self.deadline = time.monotonic() + CONNECT_TIMEOUT
        self._loop, self._addresses, self._done = loop, addresses, done
        self._sock: socket.socket | None = None
        self._reason = packet.UNREACHABLE

    def next(self) -> None:
        """Try the next address; when none is left it has failed."""
        while self._addresses:
            family, address = self._addresses.pop(0)
            try:
                sock = socket.socket(family, socket.SOCK_STREAM)
            except OSError:
                self._reason = packet.FULL  # no descriptors, or no such family
                continue
            sock.setblocking(False)
            error = sock.connect_ex(address)
            if error in (0, errno.EINPROGRESS):
                self._sock = sock
                self._loop.add(sock, self._on_ready)
                return
            self._failed(error)
            sock.close()
        self._done(None, self._reason)

    def time_out(self) -> None:
        """Give up and say so."""
        self.give_up()
        self._done(None, packet.UNREACHABLE)

    def give_up(self) -> None:
        """Close it; nobody is told."""
        self._addresses = []
        if self._sock is not None:
            self._loop.remove(self._sock)
            self._sock.close()
            self._sock = None

    def _failed(self, error: int) -> None:
        refused = error == errno.ECONNREFUSED
        self._reason = packet.REFUSED if refused else packet.UNREACHABLE
        log.debug("connecting to a target: %s", os.strerror(error))

    def _on_ready(self, _: int) -> None:
        sock = self._sock
        assert sock is not None
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error == 0:
            try:
                sock.getpeername()
            except OSError:
                return  # not connected yet
        self._loop.remove(sock)
        self._sock = None
        if error:
            self._failed(error)
            sock.close()
            self.next()
        else:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._done(sock, 0)


def _addresses(request: protocol.Requested, flags: int) -> list[Sockaddr]:
    found = socket.getaddrinfo(
        request.host, request.port, type=socket.SOCK_STREAM, flags=flags | socket.AI_NUMERICSERV
    )
    return [(family, address) for family, _, _, _, address in found]
