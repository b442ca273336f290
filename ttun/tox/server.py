"""The server: accepts friends and connects them to targets.

1. A friend request arrives: check the secret and the list of allowed keys.
2. A friend requests a target: check the rules and connect to it.
3. Acknowledge the tunnel, or refuse it with the reason.

A target may also be a function in this process that takes the socket (see ttun.tox.transport).
"""

from __future__ import annotations

import functools
import hmac
import logging
import socket
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import Callable

from ttun.address import Address
from ttun.tox import identity, packet, protocol
from ttun.tox.connecting import Connector
from ttun.tox.forwarder import Forwarder
from ttun.tox.instance import FriendRequest
from ttun.tox.link import Link
from ttun.tox.loop import Loop
from ttun.tox.rules import allowed

log = logging.getLogger("ttun")

MAX_STREAMS = 4096  # connections of all friends together, with those being made
REFUSED_FOR = 30.0  # seconds: a request arrives several times, and is repeated by the minute
MAX_REFUSED = 32  # keys whose requests toxcore remembers
MAX_FRIENDS = 256  # online, and as many offline; beyond that the longest offline is removed

NOT_LISTED = "its Tox ID is not allowed by -i"  # for as long as this server runs

# Takes a connected socket and the peer's name; returns False if it accepts no more.
Take = Callable[[socket.socket, str], bool]


class ForwardingServer(Forwarder):
    """Serves friends. secret: None accepts anyone who knows our ID. keys: None accepts any key.

    targets: if given, the only targets allowed, served inside this process.
    """

    is_server = True

    def __init__(
        self,
        loop: Loop,
        *,
        secret: bytes | None = None,
        keys: Collection[bytes] | None = None,
        rules: Sequence[Address] | None = None,
        targets: Mapping[tuple[str, int], Take] | None = None,
    ) -> None:
        super().__init__(loop)
        self._secret, self._keys, self._rules = secret, keys, rules
        self._targets = targets
        self._connector = Connector(loop)
        self._offline: dict[int, bytes] = {}  # keys of friends, the longest offline first
        self._refused: deque[tuple[float, bytes]] = deque(maxlen=MAX_REFUSED)  # keys, and when
        self._left: set[int] = set()  # friends that went offline since the last tick

    def on_request(self, request: FriendRequest) -> None:
        """Accept a friend, or log why not. The message may be a secret and is never logged."""
        name = identity.short_name(request.key)
        reason = self._why_not(request)
        if reason is None and self._accept(request.key):
            self.accepted.log(time.monotonic(), "friend request from %s accepted", name)
            return
        if reason is not None and reason != NOT_LISTED:
            self._refused.append((time.monotonic(), request.key))
        what = f"ignored: {reason}" if reason else "failed: toxcore cannot add the friend"
        self.requests.log(time.monotonic(), "friend request from %s %s", name, what)

    def _accept(self, key: bytes) -> bool:
        friend = self.loop.tox.accept_friend(key)
        if friend is not None:
            self._offline[friend] = key
        return friend is not None

    def _why_not(self, request: FriendRequest) -> str | None:
        if self._secret is not None:
            if not request.message.endswith(b"\0"):
                return "no secret"
            # Tuntox compares up to the first NUL.
            given = request.message.split(b"\0", 1)[0]
            if not hmac.compare_digest(given, self._secret):
                return "wrong secret"
        if self._keys is not None and request.key not in self._keys:
            return NOT_LISTED
        if len(self.links) >= MAX_FRIENDS:
            return "too many friends online"
        if len(self._offline) >= 2 * MAX_FRIENDS:
            return "too many friend requests at once"
        return None

    def on_link(self, link: Link) -> None:
        """Mark a friend as online."""
        self._offline.pop(link.friend, None)

    def on_lost(self, link: Link) -> None:
        """Cancel its connection attempts. It may return without a new friend request."""
        self._offline[link.friend] = self.loop.tox.friend_key(link.friend)
        self._left.add(link.friend)
        self._connector.give_up(link.friend)

    def _hear_refused(self, now: float) -> None:
        """Hear those again who were refused some time ago: the secret may be the right one now."""
        while self._refused and now - self._refused[0][0] >= REFUSED_FOR:
            self.loop.tox.forget_request(self._refused.popleft()[1])

    def _forget(self) -> None:
        """Re-add friends that went offline; remove the longest offline if there are too many.

        Otherwise toxcore would go on looking for them at their last address, and a new client that
        uses the same address and port by now could not connect. Call it only between rounds of the
        loop: toxcore may give a freed number to another friend.
        """
        for friend in self._left:
            key = self._offline.pop(friend, None)
            if key is not None:  # neither online again nor removed
                self.loop.tox.delete_friend(friend)
                self._accept(key)
        self._left.clear()
        while len(self._offline) > MAX_FRIENDS:
            oldest = next(iter(self._offline))
            del self._offline[oldest]
            self.loop.tox.delete_friend(oldest)

    def on_restarted(self, link: Link) -> None:
        """Cancel its connection attempts."""
        self._connector.give_up(link.friend)

    def on_requested(self, link: Link, request: protocol.Requested) -> None:
        """Connect a friend to a target."""
        target = request.host, request.port
        answer = functools.partial(self._answer, link, request)
        by_rule = self._rules is None or allowed(self._rules, *target)
        if not by_rule or (self._targets is not None and target not in self._targets):
            answer(None, packet.RULE)
        elif self._is_full(link):
            answer(None, packet.FULL)
        elif self._targets is not None:
            answer(_connect_inside(self._targets[target], link.name), packet.FULL)
        else:
            log.debug("peer %s: connecting to %s:%d", link.name, *target)
            self._connector.connect(link.friend, *target, answer)

    def _is_full(self, link: Link) -> bool:
        """Return whether this friend, or all friends together, are at the connection limit.

        It counts streams, because those of slow readers outlive their tunnels.
        """
        total = sum(len(each.streams.all) for each in self.links.values()) + len(self._connector)
        return len(link.streams.all) >= protocol.MAX_TUNNELS or total >= MAX_STREAMS

    def _answer(
        self, link: Link, request: protocol.Requested, sock: socket.socket | None, reason: int
    ) -> None:
        """Open the tunnel to a socket, or refuse it with the reason."""
        if sock is not None:
            link.join(sock, link.mux.accept(request.forward_id, None))
            return
        text, why = "peer %s: %s:%d: %s", packet.describe(reason)
        target = request.host, request.port
        self.refusals.log(time.monotonic(), text, link.name, *target, why)
        link.mux.deny(request.forward_id, reason)

    def on_tick(self, now: float) -> None:
        """Enforce the time limits and tidy up friends that left."""
        super().on_tick(now)
        self._connector.on_tick(now)
        self._forget()
        self._hear_refused(now)

    def on_stop(self) -> None:
        """Close everything."""
        self._connector.on_stop()
        super().on_stop()


def _connect_inside(take: Take, name: str) -> socket.socket | None:
    """Connect to a target inside this process; return None if it accepts no more."""
    try:
        ours, theirs = socket.socketpair()
    except OSError:  # out of descriptors
        return None
    if take(theirs, name):
        return ours
    ours.close()
    theirs.close()
    return None
