"""The code that server and client share: it keeps one link per online friend.

1. The loop passes on toxcore's events. A friend that comes online gets a link.
2. The friend's packets go through that link. Events for the role go to the role's methods.
3. flush() writes received data to the sockets, then lets each link hand packets to toxcore.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Sequence

from ttun.summary import Summary
from ttun.tox import identity, protocol, toxcore
from ttun.tox.instance import Event, FriendPacket, FriendRequest, FriendStatus, SelfStatus
from ttun.tox.link import UNKNOWN_WAY, Link
from ttun.tox.loop import Loop
from ttun.tox.nodes import Bootstrap, Node
from ttun.tox.stream import Streams

log = logging.getLogger("ttun")

PING_INTERVAL = 5.0  # seconds
SILENT_AFTER = 60.0  # seconds, for a friend that toxcore has not reported online
SHOWN_PEERS = 10  # in the status line


class Forwarder:
    """The owner of the loop: passes events to links and to the role, which is a subclass."""

    is_server = False

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.links: dict[int, Link] = {}
        self.growth = protocol.Growth()
        self.nodes: Sequence[Node] = ()  # to bootstrap from
        self.online = False
        self._way = ""  # how we are connected to the network
        self._bootstrap = Bootstrap(loop)
        # What a peer can cause as often as it likes must not fill the disk.
        self.changes = Summary("%d more connections and disconnections of peers", logging.INFO)
        self.restarts = Summary("%d more restarts of peers", logging.INFO)
        self.refusals = Summary("%d more targets refused", logging.INFO)
        self.requests = Summary("%d more friend requests")
        self.accepted = Summary("%d more friend requests accepted", logging.INFO)
        self.bad = Summary("%d more bad packets")
        self._summaries = (
            self.changes, self.restarts, self.refusals, self.requests, self.accepted, self.bad
        )  # fmt: skip

    def on_event(self, event: Event) -> None:
        """Handle an event of toxcore's."""
        if isinstance(event, FriendPacket):
            # Packets, above all the friend's HELLO, may arrive through a relay before toxcore
            # reports the friend online.
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
        """Return whether and how we are connected to the Tox network."""
        return f"on the Tox network over {self._way}" if self.online else "not on the Tox network"

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
        log.info("status: %s", "; ".join([self._network(), *(peers or ["no peers"])]))

    def _friend_status(self, event: FriendStatus) -> None:
        link = self.links.get(event.friend)
        way = toxcore.TRANSPORTS.get(event.connection, "?")
        if event.connection == toxcore.OFFLINE:
            if link is not None:
                self.lose(link)
        elif link is not None:
            link.way = way
            self.changes.log(time.monotonic(), "peer %s: now over %s", link.name, way)
        else:
            self._meet(event.friend, way)

    def _meet(self, friend: int, way: str = UNKNOWN_WAY) -> Link:
        """Create the link of a friend that came online."""
        name = identity.short_name(self.loop.tox.friend_key(friend))
        mux = protocol.Multiplexer(
            server=self.is_server, first_id=int.from_bytes(os.urandom(4), "big"), growth=self.growth
        )
        link = self.links[friend] = Link(self.loop, mux, friend, name, way, bad=self.bad)
        self.changes.log(time.monotonic(), "peer %s connected over %s", name, way)
        self.on_link(link)
        return link

    def lose(self, link: Link) -> None:
        """Close all streams of a friend that is offline."""
        del self.links[link.friend]
        text = "peer %s disconnected: %d connections closed"
        self.changes.log(time.monotonic(), text, link.name, len(link.streams.all))
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
            text = "peer %s restarted: %d connections closed"
            self.restarts.log(time.monotonic(), text, link.name, len(link.streams.all))
            link.drop()
            self.on_restarted(link)

    def _sum_up(self, now: float, *, end: bool = False) -> None:
        for summary in self._summaries:
            summary.tick(now, end=end)

    def on_tick(self, now: float) -> None:
        """Bootstrap while offline; measure the round trip to each friend."""
        self._sum_up(now)
        if not self.online:
            self._bootstrap.try_some(self.nodes, now)
        for link in list(self.links.values()):
            if now - link.heard > SILENT_AFTER and link.way == UNKNOWN_WAY:
                self.lose(link)  # never reported online, so it will not be reported offline
            elif now - link.pinged >= PING_INTERVAL:
                link.ping(now)

    def flush(self, now: float) -> tuple[bool, float]:
        """Write to sockets, fill toxcore; return whether it is full, and when to call again."""
        links = list(self.links.values())
        for link in links:
            link.streams.flush()
        self._limit_memory()
        any_full, first = False, math.inf
        for link in links:
            if len(link.mux.control) > protocol.MAX_CONTROL:
                if self.changes.count(now):
                    log.warning("peer %s: control queue full: disconnecting", link.name)
                self.lose(link)
                continue
            full, again = link.fill(now)
            any_full, first = any_full or full, min(first, again)
        return any_full, first

    def _limit_memory(self) -> None:
        """Reset connections while too much waits for slow readers, of the friend with most of it.

        What one friend leaves unread takes no connection from another.
        """
        while self.growth.buffered > protocol.MAX_BUFFERED:
            found = (link.streams for link in self.links.values())
            most = max(found, key=Streams.buffered, default=None)
            if most is None or most.buffered() == 0:
                return  # resetting more would free nothing
            most.reset_largest()

    def on_stop(self) -> None:
        """Close everything; send queued packets as far as toxcore takes them now."""
        self._sum_up(time.monotonic(), end=True)
        for link in list(self.links.values()):
            link.drop()
            link.fill(time.monotonic())
        if self.links:
            self.loop.tox.iterate()

    # For the two roles to override.

    def on_request(self, request: FriendRequest) -> None:
        """Accept or reject a friend request."""

    def on_link(self, link: Link) -> None:
        """Handle a friend that came online."""

    def on_lost(self, link: Link) -> None:
        """Handle a friend that went offline; its streams are closed."""

    def on_restarted(self, link: Link) -> None:
        """Handle a friend whose process restarted; its streams are closed."""

    def on_requested(self, link: Link, request: protocol.Requested) -> None:
        """Connect a friend to a target."""

    def on_answered(self, link: Link, answer: protocol.Opened | protocol.Denied) -> None:
        """Handle a friend's answer to a tunnel request."""

    def on_pong(self, link: Link) -> None:
        """Handle a measured round trip."""
