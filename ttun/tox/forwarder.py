"""Streams and the friends they go through: what the server and the client have in common.

A byte's way out: the socket says that it is readable; its stream queues up at its friend's link;
flush() lets each stream of the queue send a few packets in turn while toxcore takes them. Nothing
is read that toxcore has not taken, or the peer's window has no room for, but one small chunk: so
the application waits, not the memory.

A byte's way in: a packet is appended to its stream's buffer; flush() writes all that came since
the last time at once. What left the buffer is granted to the peer again.
"""

from __future__ import annotations

import contextlib
import enum
import itertools
import logging
import os
import random
import socket
import struct
import time
from collections import deque
from collections.abc import Sequence
from typing import Callable

from ttun.errors import ProtocolError
from ttun.tox import loop as loops
from ttun.tox import protocol, toxcore
from ttun.tox.nodes import Node
from ttun.tox.protocol import Peer, Tunnel
from ttun.tox.toxcore import FriendStatus, Packet

log = logging.getLogger("ttun")

CHUNK = 16 * protocol.MAX_DATA  # bytes read from a socket at once, and a stream's turn
BUFFERS = 64  # buffers written to a socket at once
PING_INTERVAL = 5.0  # seconds
BOOTSTRAP_INTERVAL, BOOTSTRAP_NODES = 10.0, 8
COMPLAINTS = 5  # lines about a peer's wrong packets; the rest goes to the debug log
NO_LINGER = struct.pack("ii", 1, 0)


class Turn(enum.Enum):
    """How a stream's turn to send ended: toxcore is full, or it has more, or nothing more."""

    FULL, MORE, DONE = range(3)


FULL, MORE, DONE = Turn.FULL, Turn.MORE, Turn.DONE

Answer = Callable[["int | None"], None]  # None: the tunnel is open; else why not


class Link:
    """A friend that is online: its tunnels, its streams, and who is next to send."""

    def __init__(self, forwarder: Forwarder, friend: int, name: str) -> None:
        """Greet it."""
        self.forwarder, self.friend, self.name = forwarder, friend, name
        first_id = int.from_bytes(os.urandom(4), "big")
        self.peer = Peer(server=forwarder.is_server, first_id=first_id, growth=forwarder.growth)
        self.streams: set[Stream] = set()
        self.queue: deque[Stream] = deque()  # streams that may have something to send
        self.heard = self.pinged = time.monotonic()
        self.complaints = 0

    def fill(self) -> bool:
        """Send until toxcore takes no more (True), or there is nothing more to send (False)."""
        send, control = self.forwarder.loop.tox.send, self.peer.control
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

    def drop(self, streams: set[Stream]) -> None:
        """End streams whose tunnels are gone for a reason that is not theirs."""
        for stream in list(streams):
            stream.reset()


class Stream:
    """A local socket and its tunnel, from the moment that one was asked for."""

    def __init__(self, link: Link, sock: socket.socket) -> None:
        """Take over the socket. It is not read before open()."""
        self.link, self._sock = link, sock
        self.tunnel: Tunnel | None = None
        self.queued = False
        self.on_answer: Answer | None = None
        self.on_closed: Callable[[], None] | None = None
        self._readable = self._writable = True
        self._pending = memoryview(b"")  # read, not yet sent
        self._buffer: deque[bytes | memoryview] = deque()  # received, not yet written
        self._dirty = False
        self._remote_ended = self._remote_closed = self._shut = self._gone = False
        self._aborted = False
        link.streams.add(self)
        link.forwarder.loop.add(sock, self._on_ready)

    def open(self, tunnel: Tunnel) -> None:
        """Start to forward."""
        self.tunnel, tunnel.owner = tunnel, self
        self._answer(None)
        self.wake()

    def refuse(self, reason: int) -> None:
        """There will be no tunnel: say so and close the socket."""
        self._answer(reason)
        self._close()

    def wake(self) -> None:
        """Queue up for sending."""
        if not self.queued and self.tunnel is not None and not self._gone:
            self.queued = True
            self.link.queue.append(self)

    def send(self, send: Callable[[int, bytes], bool]) -> Turn:
        """Take a turn: send some packets."""
        tunnel, peer, friend = self.tunnel, self.link.peer, self.link.friend
        assert tunnel is not None
        for _ in range(CHUNK // protocol.MAX_DATA):
            if not self._has_pending(tunnel):
                return DONE
            room = tunnel.room()
            piece = self._pending[:room]
            if not send(friend, peer.data(tunnel, piece)):
                return FULL
            peer.sent(tunnel, len(piece))
            self._pending = self._pending[room:]
        return MORE

    def _has_pending(self, tunnel: Tunnel) -> bool:
        """Read a chunk if none is left; return whether there is something to send."""
        if self._gone or self._remote_closed or not tunnel.room():
            return False
        if self._pending:
            return True
        if not self._readable or tunnel.ended:
            return False
        try:
            data = self._sock.recv(CHUNK)
        except BlockingIOError:
            self._readable = False
            return False
        except OSError:
            self.reset()
            return False
        if data:
            self._pending = memoryview(data)
            return True
        self.link.peer.end(tunnel)
        if tunnel.extended:
            self._finish_if_over()
        else:
            self.remote_closed()  # the original knows no half of a connection
        return False

    def receive(self, data: bytes) -> None:
        """Take bytes for the socket."""
        self._buffer.append(data)
        self._set_dirty()

    def remote_ended(self) -> None:
        """No more bytes will come."""
        self._remote_ended = True
        self._set_dirty()

    def remote_closed(self, *, aborted: bool = False) -> None:
        """The tunnel is gone: write what there is, then close; if aborted so that it shows."""
        self._remote_closed = True
        self._aborted = aborted
        self._set_dirty()

    def reset(self) -> None:
        """Close both ends at once."""
        if self.tunnel is not None:
            self.link.peer.close(self.tunnel)
        self._aborted = True
        self._answer(protocol.UNREACHABLE)
        self._close()

    def flush(self) -> None:
        """Write what came."""
        self._dirty = False
        if self._gone:
            return
        taken = 0
        try:
            while self._buffer and self._writable:
                sent = self._sock.sendmsg(list(itertools.islice(self._buffer, BUFFERS)))
                taken += sent
                while sent:
                    first = self._buffer[0]
                    if sent < len(first):
                        self._buffer[0] = memoryview(first)[sent:]
                        break
                    sent -= len(first)
                    self._buffer.popleft()
        except BlockingIOError:
            self._writable = False
        except OSError:
            self.reset()
            return
        if taken and self.tunnel is not None:
            self.link.peer.consumed(self.tunnel, taken, time.monotonic())
        if self._buffer:
            return
        if self._remote_closed:
            self._close()
        elif self._remote_ended and not self._shut:
            self._shut = True
            try:
                self._sock.shutdown(socket.SHUT_WR)
            except OSError:
                self.reset()
                return
            self._finish_if_over()

    def _finish_if_over(self) -> None:
        """Close when both sides have said that there is no more, and all of it was written."""
        if self.tunnel is not None and self.tunnel.ended and self._shut:
            self.link.peer.forget(self.tunnel)
            self._close()

    def _on_ready(self, what: int) -> None:
        if what & loops.ERROR and self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.reset()
            return
        if what & (loops.READABLE | loops.BROKEN):
            self._readable = True
            self.wake()
        if what & loops.WRITABLE:
            self._writable = True
            if self._buffer:
                self._set_dirty()

    def _set_dirty(self) -> None:
        if not self._dirty:
            self._dirty = True
            self.link.forwarder.dirty.append(self)

    def _answer(self, reason: int | None) -> None:
        answer, self.on_answer = self.on_answer, None
        if answer is not None:
            answer(reason)

    def _close(self) -> None:
        if self._gone:
            return
        self._gone = True
        self.link.streams.discard(self)
        self.link.forwarder.loop.remove(self._sock)
        if self._aborted:
            with contextlib.suppress(OSError):
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
        self._sock.close()
        self._buffer.clear()
        self._pending = memoryview(b"")
        if self.on_closed is not None:
            self.on_closed()


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
        self._next_bootstrap = 0.0

    def on_event(self, event: toxcore.Event) -> None:
        """Take what toxcore reports."""
        if isinstance(event, Packet):
            link = self.links.get(event.friend)
            if link is not None:
                self._receive(link, event.data)
        elif isinstance(event, FriendStatus):
            self._friend_status(event)
        elif isinstance(event, toxcore.SelfStatus):
            self.online = event.connection != toxcore.OFFLINE
            way = toxcore.TRANSPORTS.get(event.connection, "?")
            log.info("on the Tox network over %s", way) if self.online else log.info(
                "off the Tox network"
            )
        else:
            self.on_request(event)

    def _friend_status(self, event: FriendStatus) -> None:
        link = self.links.get(event.friend)
        if event.connection == toxcore.OFFLINE:
            if link is not None:
                self.lose(link)
            return
        way = toxcore.TRANSPORTS.get(event.connection, "?")
        if link is not None:
            log.info("peer %s: now over %s", link.name, way)
            return
        name = self.loop.tox.friend_key(event.friend).hex()[:8].upper()
        link = self.links[event.friend] = Link(self, event.friend, name)
        log.info("peer %s connected over %s", name, way)
        self.on_link(link)

    def lose(self, link: Link) -> None:
        """End everything that went through a friend that is gone."""
        del self.links[link.friend]
        log.info("peer %s is gone; %d connections closed", link.name, len(link.streams))
        link.drop(link.streams)
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
            self.on_pong(link, event.data)
        elif isinstance(event, protocol.Requested):
            self.on_requested(link, event)
        elif isinstance(event, (protocol.Opened, protocol.Denied)):
            stream = event.owner
            assert isinstance(stream, Stream)
            if isinstance(event, protocol.Opened):
                stream.open(event.tunnel)
            else:
                stream.refuse(event.reason)
        elif isinstance(event, protocol.Restarted):
            log.info("peer %s started afresh; %d connections closed", link.name, len(link.streams))
            link.drop(link.streams)
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
                stream.remote_closed(aborted=event.tunnel.extended)

    def on_tick(self, now: float) -> None:
        """Get to know the network until we are on it; measure the round trip to each friend."""
        if not self.online and now >= self._next_bootstrap:
            self._next_bootstrap = now + BOOTSTRAP_INTERVAL
            for node in random.sample(self.nodes, min(len(self.nodes), BOOTSTRAP_NODES)):
                self.loop.tox.bootstrap(*node)
        for link in list(self.links.values()):
            if now - link.pinged >= PING_INTERVAL:
                link.pinged = now
                if len(link.peer.control) < protocol.MAX_CONTROL // 2:
                    link.peer.ping(struct.pack(">d", now))

    def on_pong(self, link: Link, data: bytes) -> None:
        """Take the answer to a PING of on_tick()."""
        if len(data) == 8:
            link.peer.round_trip = max(0.0, time.monotonic() - struct.unpack(">d", data)[0])

    def flush(self) -> bool:
        """Write to sockets, then fill toxcore; return whether more waits for room in toxcore."""
        while self.dirty:
            dirty, self.dirty = self.dirty, []
            for stream in dirty:
                stream.flush()
        full = False
        for link in list(self.links.values()):
            if len(link.peer.control) > protocol.MAX_CONTROL:
                log.warning("peer %s asks faster than it takes answers: dropped", link.name)
                self.on_flood(link)
            elif link.fill():
                full = True
        return full

    def on_stop(self) -> None:
        """Close everything; what is queued for friends is sent if toxcore takes it now."""
        for link in list(self.links.values()):
            link.drop(link.streams)
            link.fill()
        if self.links:
            self.loop.tox.iterate()

    # What the two roles do differently.

    def on_request(self, request: toxcore.FriendRequest) -> None:
        """Somebody wants to be a friend."""

    def on_link(self, link: Link) -> None:
        """A friend is online."""

    def on_lost(self, link: Link) -> None:
        """A friend is offline; its streams are closed."""

    def on_restarted(self, link: Link) -> None:
        """A friend is a new process; its streams are closed."""

    def on_flood(self, link: Link) -> None:
        """A friend makes us say more than it listens to."""
        friend = link.friend
        self.lose(link)
        self.loop.tox.delete_friend(friend)

    def on_requested(self, link: Link, request: protocol.Requested) -> None:
        """A friend wants a connection to a target."""
