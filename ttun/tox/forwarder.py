"""Friends and their streams: what the server and the client have in common.

1. The loop hands on what toxcore reports: a friend that comes online gets a link.
2. Its packets go through its protocol state, and what they mean to streams and to the role.
3. flush() writes what came for sockets, then lets each link fill toxcore: first what the protocol
   has to say, then the streams in turn, a few packets each.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import random
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Sequence

from ttun.errors import ProtocolError
from ttun.tox import instance, protocol, toxcore
from ttun.tox import loop as loops
from ttun.tox.instance import FriendPacket, FriendRequest, FriendStatus, SelfStatus
from ttun.tox.nodes import Node
from ttun.tox.pace import Pace
from ttun.tox.protocol import Peer
from ttun.tox.stream import FULL, MORE, Stream

log = logging.getLogger("ttun")

PING_INTERVAL = 5.0  # seconds
MAX_ROUND_TRIP = 60.0  # seconds
BOOTSTRAP_INTERVAL, BOOTSTRAP_NODES = 10.0, 8
UNKNOWN_WAY = "a way that is not known yet"
SILENT_AFTER = 60.0  # seconds, of a friend of which toxcore has not told that it is there
SHOWN_PEERS = 10  # in the line of log_status()
COMPLAINTS = 5  # lines about a peer's wrong packets; the rest goes to the debug log


class Link:
    """A friend that is online: its tunnels, its streams, and who is next to send."""

    def __init__(
        self, forwarder: Forwarder, friend: int, name: str, way: str = UNKNOWN_WAY
    ) -> None:
        """Greet it. way: over what it is connected, for the log."""
        self.forwarder, self.friend, self.name, self.way = forwarder, friend, name, way
        first_id = int.from_bytes(os.urandom(4), "big")
        self.peer = Peer(server=forwarder.is_server, first_id=first_id, growth=forwarder.growth)
        self.streams: set[Stream] = set()
        self.queue: deque[Stream] = deque()  # streams that may have something to send
        self.heard = self.pinged = time.monotonic()
        self.complaints = 0
        self._pace = Pace(self.heard)

    def fill(self, now: float) -> tuple[bool, float]:
        """Send what may be sent; return whether toxcore is full, and when to come again."""
        self._pace.refill(now)
        if not self._fill():
            return False, math.inf
        if self._pace.take():  # so it was toxcore that refused
            self._pace.refused(now)
            return True, math.inf  # until there is room
        return False, now + self._pace.wait(now)

    def _fill(self) -> bool:
        """Send; return whether there is more."""
        toxcore_send, pace, control = self.forwarder.loop.tox.send, self._pace, self.peer.control

        def send(friend: int, packet: bytes) -> bool:
            if not pace.take() or not toxcore_send(friend, packet):
                return False
            pace.sent()
            return True

        while True:
            while control:
                if not send(self.friend, control[0]):
                    return True
                control.popleft()
            if not self.queue:
                return False
            turn = self.queue[0].send(send)
            if turn is FULL:
                return True
            stream = self.queue.popleft()
            if turn is MORE:
                self.queue.append(stream)
            else:
                stream.queued = False

    def complain(self, error: ProtocolError) -> None:
        """Log what the peer did, but not for ever."""
        self.complaints += 1
        level = logging.WARNING if self.complaints <= COMPLAINTS else logging.DEBUG
        log.log(level, "peer %s: %s", self.name, error)

    def drop(self) -> None:
        """End all streams, for a reason that is not theirs."""
        counts = len(self.peer.tunnels), len(self.streams)
        log.debug("peer %s: %d tunnels, %d connections end", self.name, *counts)
        for stream in list(self.streams):
            stream.reset()


class Forwarder:
    """What the loop calls: friends come and go, packets arrive, streams are served."""

    is_server = False

    def __init__(self, loop: loops.Loop) -> None:
        """Serve nobody yet."""
        self.loop = loop
        self.links: dict[int, Link] = {}
        self.dirty: list[Stream] = []
        self.growth = protocol.Growth()
        self.nodes: Sequence[Node] = ()  # to bootstrap from
        self.online = False
        self._way = toxcore.TRANSPORTS[toxcore.OFFLINE]  # over which we are on the network
        self._next_bootstrap = 0.0
        self._bootstrapping = False

    def on_event(self, event: instance.Event) -> None:
        """Take what toxcore reports."""
        if isinstance(event, FriendPacket):
            # toxcore tells that a friend is there once it knows over what. Before that some packets
            # may have come through a relay, the friend's HELLO first of all.
            link = self.links.get(event.friend) or self._meet(event.friend)
            self._receive(link, event.data)
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
        """Log one line that says what we are doing."""
        links = list(self.links.values())
        peers = [
            f"peer {link.name} over {link.way}, {len(link.streams)} connections"
            for link in links[:SHOWN_PEERS]
        ]
        if len(links) > SHOWN_PEERS:
            rest = links[SHOWN_PEERS:]
            count = sum(len(link.streams) for link in rest)
            peers.append(f"{len(rest)} more peers, {count} connections")
        log.info("status: %s", "; ".join([self._network(), *(peers or ["no peer"])]))

    def _friend_status(self, event: FriendStatus) -> None:
        link = self.links.get(event.friend)
        if event.connection == toxcore.OFFLINE:
            if link is not None:
                self.lose(link)
            return
        way = toxcore.TRANSPORTS.get(event.connection, "?")
        if link is not None:
            link.way = way
            log.info("peer %s: now over %s", link.name, way)
            return
        self._meet(event.friend, way)

    def _meet(self, friend: int, way: str = UNKNOWN_WAY) -> Link:
        """Begin with a friend that is there."""
        name = self.loop.tox.friend_key(friend).hex()[:8].upper()
        link = self.links[friend] = Link(self, friend, name, way)
        log.info("peer %s connected over %s", name, way)
        self.on_link(link)
        return link

    def lose(self, link: Link) -> None:
        """End everything that went through a friend that is gone."""
        del self.links[link.friend]
        log.info("peer %s is gone; %d connections closed", link.name, len(link.streams))
        link.drop()
        self.on_lost(link)

    def _receive(self, link: Link, data: bytes) -> None:
        link.heard = time.monotonic()
        try:
            event = link.peer.receive(data)
        except ProtocolError as error:
            link.complain(error)
            return
        if isinstance(event, protocol.Data):
            owner = event.tunnel.owner
            if isinstance(owner, Stream):
                owner.receive(event.data)
        elif event is not None:
            self._handle(link, event)

    def _handle(self, link: Link, event: protocol.Event) -> None:
        if isinstance(event, protocol.Pong):
            seconds = _round_trip(event.data)
            if seconds is not None:
                self.on_pong(link, seconds)
        elif isinstance(event, protocol.Requested):
            self.on_requested(link, event)
        elif isinstance(event, (protocol.Opened, protocol.Denied)):
            self.on_answered(link, event)
        elif isinstance(event, protocol.Restarted):
            log.info("peer %s started afresh; %d connections closed", link.name, len(link.streams))
            link.drop()
            self.on_restarted(link)
        elif isinstance(event, (protocol.MaySend, protocol.Ended, protocol.Closed)):
            stream = event.tunnel.owner
            if not isinstance(stream, Stream):
                return
            if isinstance(event, protocol.MaySend):
                stream.wake()
            elif isinstance(event, protocol.Ended):
                stream.remote_ended()
            else:
                stream.remote_closed(aborted=event.tunnel.extended or event.tunnel.overrun)

    def on_tick(self, now: float) -> None:
        """Get to know the network until we are on it; measure the round trip to each friend."""
        if not self.online and now >= self._next_bootstrap:
            self._next_bootstrap = now + BOOTSTRAP_INTERVAL
            self._bootstrap(random.sample(self.nodes, min(len(self.nodes), BOOTSTRAP_NODES)))
        for link in list(self.links.values()):
            if now - link.heard > SILENT_AFTER and link.way == UNKNOWN_WAY:
                self.lose(link)  # toxcore does not tell that it left, as it never told that it came
            elif now - link.pinged >= PING_INTERVAL:
                link.pinged = now
                if len(link.peer.control) < protocol.MAX_CONTROL // 2:
                    link.peer.ping(struct.pack(">d", now))

    def _bootstrap(self, some: Sequence[Node]) -> None:
        """Get to know some nodes, each when its name has been looked up."""

        def look_up(node: Node) -> None:
            with contextlib.suppress(OSError, UnicodeError):
                found = socket.getaddrinfo(node.host, None, type=socket.SOCK_DGRAM)
                for host in {str(address[0]) for _, _, _, _, address in found}:
                    self.loop.call(functools.partial(self.loop.tox.bootstrap, host, *node[1:]))

        def look_up_all() -> None:
            for node in some:
                look_up(node)
            self.loop.call(done)

        def done() -> None:
            self._bootstrapping = False

        if not self._bootstrapping:
            with contextlib.suppress(RuntimeError):  # as many threads as there may be: later
                threading.Thread(target=look_up_all, name="ttun-nodes", daemon=True).start()
                self._bootstrapping = True

    def on_pong(self, link: Link, seconds: float) -> None:
        """Take the answer to a PING of on_tick()."""
        link.peer.round_trip = seconds

    def flush(self, now: float) -> tuple[bool, float]:
        """Write to sockets, fill toxcore; return whether it is full, and when to come again."""
        while self.dirty:
            dirty, self.dirty = self.dirty, []
            for stream in dirty:
                stream.flush()
        any_full, first = False, math.inf
        for link in list(self.links.values()):
            if len(link.peer.control) > protocol.MAX_CONTROL:
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
        """Somebody wants to be a friend."""

    def on_link(self, link: Link) -> None:
        """A friend is online."""

    def on_lost(self, link: Link) -> None:
        """A friend is offline; its streams are closed."""

    def on_restarted(self, link: Link) -> None:
        """A friend is a new process; its streams are closed."""

    def on_requested(self, link: Link, request: protocol.Requested) -> None:
        """A friend wants a connection to a target."""

    def on_answered(self, link: Link, answer: protocol.Opened | protocol.Denied) -> None:
        """A friend says what became of a connection that it was asked for."""


def _round_trip(data: bytes) -> float | None:
    """Return the seconds since a PING of on_tick(); None for data that cannot be of one."""
    if len(data) != 8:
        return None
    seconds = time.monotonic() - float(struct.unpack(">d", data)[0])
    return seconds if 0 <= seconds <= MAX_ROUND_TRIP else None
