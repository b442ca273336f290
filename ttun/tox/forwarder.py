"""What the server and the client have in common: friends come and go, and each has a link.

1. The loop hands on what toxcore reports. A friend that comes online gets a link.
2. Its packets go through that link. What they mean to the role goes to the role's methods.
3. flush() writes what came for sockets, then lets each link fill toxcore.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Sequence

from ttun.tox import identity, protocol, toxcore
from ttun.tox.instance import Event, FriendPacket, FriendRequest, FriendStatus, SelfStatus
from ttun.tox.link import UNKNOWN_WAY, Link
from ttun.tox.loop import Loop
from ttun.tox.nodes import Bootstrap, Node

log = logging.getLogger("ttun")

PING_INTERVAL = 5.0  # seconds
SILENT_AFTER = 60.0  # seconds, for a friend whose arrival toxcore has not reported
SHOWN_PEERS = 10  # in the line of log_status()


class Forwarder:
    """The owner of the loop: hands events to links and to the role, a subclass."""

    is_server = False

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.links: dict[int, Link] = {}
        self.growth = protocol.Growth()
        self.nodes: Sequence[Node] = ()  # to bootstrap from
        self.online = False
        self._way = toxcore.TRANSPORTS[toxcore.OFFLINE]  # how we are on the network
        self._bootstrap = Bootstrap(loop)

    def on_event(self, event: Event) -> None:
        """Take what toxcore reports."""
        if isinstance(event, FriendPacket):
            # toxcore reports a friend once it knows the way to it. Packets may have come through a
            # relay before that, the friend's HELLO first of all.
            link = self.links.get(event.friend) or self._meet(event.friend)
            meaning = link.receive(event.data)
            if meaning is not None:
                self._handle(link, meaning)
        elif isinstance(event, FriendStatus):
            self._friend_status(event)
        elif isinstance(event, SelfStatus):
            self.online = event.connection != toxcore.OFFLINE
            self._way = toxcore.TRANSPORTS.get(event.connection, "?")
            log.info("%s", self._network())
        else:
            self.on_request(event)

    def _network(self) -> str:
        """Return whether and how we are on the Tox network."""
        return f"{'on the Tox network over' if self.online else 'off the Tox network:'} {self._way}"

    def log_status(self) -> None:
        """Log one line about the network and the peers."""
        links = list(self.links.values())
        peers = [
            f"peer {link.name} over {link.way}, {len(link.streams.all)} connections"
            for link in links[:SHOWN_PEERS]
        ]
        if rest := links[SHOWN_PEERS:]:
            count = sum(len(link.streams.all) for link in rest)
            peers.append(f"{len(rest)} more peers, {count} connections")
        log.info("status: %s", "; ".join([self._network(), *(peers or ["no peer"])]))

    def _friend_status(self, event: FriendStatus) -> None:
        link = self.links.get(event.friend)
        way = toxcore.TRANSPORTS.get(event.connection, "?")
        if event.connection == toxcore.OFFLINE:
            if link is not None:
                self.lose(link)
        elif link is not None:
            link.way = way
            log.info("peer %s: now over %s", link.name, way)
        else:
            self._meet(event.friend, way)

    def _meet(self, friend: int, way: str = UNKNOWN_WAY) -> Link:
        """Make the link of a friend that came online."""
        name = identity.short_name(self.loop.tox.friend_key(friend))
        mux = protocol.Multiplexer(
            server=self.is_server, first_id=int.from_bytes(os.urandom(4), "big"), growth=self.growth
        )
        link = self.links[friend] = Link(self.loop, mux, friend, name, way)
        log.info("peer %s connected over %s", name, way)
        self.on_link(link)
        return link

    def lose(self, link: Link) -> None:
        """End everything that went through a friend that is offline."""
        del self.links[link.friend]
        log.info("peer %s is gone; %d connections closed", link.name, len(link.streams.all))
        link.drop()
        self.on_lost(link)

    def _handle(self, link: Link, event: protocol.Event) -> None:
        if isinstance(event, protocol.Requested):
            self.on_requested(link, event)
        elif isinstance(event, (protocol.Opened, protocol.Denied)):
            self.on_answered(link, event)
        elif isinstance(event, protocol.Pong):
            self.on_pong(link)
        elif isinstance(event, protocol.Restarted):
            self.on_restarted(link)

    def on_tick(self, now: float) -> None:
        """Bootstrap until we are on the network; measure the round trip to each friend."""
        if not self.online:
            self._bootstrap.try_some(self.nodes, now)
        for link in list(self.links.values()):
            if now - link.heard > SILENT_AFTER and link.way == UNKNOWN_WAY:
                self.lose(link)  # toxcore never reported that it came, nor will it that it left
            elif now - link.pinged >= PING_INTERVAL:
                link.ping(now)

    def flush(self, now: float) -> tuple[bool, float]:
        """Write to sockets, fill toxcore; return whether it is full, and when to come again."""
        links = list(self.links.values())
        for link in links:
            link.streams.flush()
        any_full, first = False, math.inf
        for link in links:
            if len(link.mux.control) > protocol.MAX_CONTROL:
                log.warning("peer %s asks faster than it takes answers: dropped", link.name)
                self.lose(link)
                continue
            full, again = link.fill(now)
            any_full, first = any_full or full, min(first, again)
        return any_full, first

    def on_stop(self) -> None:
        """Close everything; what is queued for friends is sent if toxcore takes it now."""
        for link in list(self.links.values()):
            link.drop()
            link.fill(time.monotonic())
        if self.links:
            self.loop.tox.iterate()

    # What the two roles do differently.

    def on_request(self, request: FriendRequest) -> None:
        """Answer a friend request."""

    def on_link(self, link: Link) -> None:
        """Take note that a friend is online."""

    def on_lost(self, link: Link) -> None:
        """Take note that a friend is offline; its streams are closed."""

    def on_restarted(self, link: Link) -> None:
        """Take note that a friend is a new process; its streams are closed."""

    def on_requested(self, link: Link, request: protocol.Requested) -> None:
        """Connect a friend to a target."""

    def on_answered(self, link: Link, answer: protocol.Opened | protocol.Denied) -> None:
        """Take a friend's answer to a request for a connection."""

    def on_pong(self, link: Link) -> None:
        """Take note of a round trip that was measured."""
