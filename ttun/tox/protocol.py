"""The tunnels of one friend: packets in, events out, no I/O and no clock.

    client                                   server
      HELLO                  <->               HELLO           ttun only
      REQUESTTUNNEL          -->                               host, port, a forward ID
                             <--               ACKTUNNEL       the tunnel ID, or DENYTUNNEL
      TCP                    <->               TCP             the connection's data
      WINDOW                 <->               WINDOW          flow control       ttun only
      EOF                    <->               EOF             half-close         ttun only
      TCP_FIN                <->               TCP_FIN         the socket is closed

Each side sends HELLO first. So when a tunnel opens, both know whether it has flow control and
half-close. Tuntox ignores HELLO and gets no other packet type that it does not know.

Tunnel IDs are looked up among the tunnels of the friend who sent the packet: no friend can reach
another friend's tunnels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple, Union

from ttun.errors import ProtocolError
from ttun.tox.packet import (
    ACKTUNNEL,
    DENYTUNNEL,
    EOF,
    FULL,
    HELLO,
    MAX_DATA,
    NAME,
    PING,
    PONG,
    REQUESTTUNNEL,
    TCP,
    TCP_FIN,
    U32,
    WINDOW,
    pack,
    unpack,
)

FIRST_WINDOW = 256 << 10  # bytes, the initial window in each direction
MAX_WINDOW = 4 << 20
MAX_GROWTH = 64 << 20  # bytes that all windows of a process may grow together
BUFFER = 4 << 20  # bytes buffered for a slow reader of a tunnel with Tuntox, which has no windows
MAX_BUFFERED = 128 << 20  # bytes buffered in a process; beyond that, connections are reset
MAX_TUNNELS = 1024  # per friend
ANSWER = 1  # flag of a HELLO that answers a second one: it is not answered in turn
MAX_CONTROL = 4096  # packets in the control queue of one friend


class Requested(NamedTuple):
    """The client requests a connection to a target; answer with accept() or deny()."""

    forward_id: int
    host: str
    port: int


class Opened(NamedTuple):
    """The server accepted the request of owner."""

    owner: Hashable
    tunnel: Tunnel


class Denied(NamedTuple):
    """The server refused the request of owner."""

    owner: Hashable
    reason: int


class Data(NamedTuple):
    """Data of the connection. Call consumed() when it has left the buffer."""

    tunnel: Tunnel
    data: bytes


class MaySend(NamedTuple):
    """The peer's window has room for more."""

    tunnel: Tunnel


class Ended(NamedTuple):
    """The peer half-closed the tunnel; the other direction stays open."""

    tunnel: Tunnel


class Closed(NamedTuple):
    """The tunnel is closed. Data received before must still be delivered."""

    tunnel: Tunnel


class Restarted(NamedTuple):
    """The peer lost its state: all tunnels and requests are void."""


class Pong(NamedTuple):
    """The answer to a PING."""

    data: bytes


TunnelEvent = Union[Data, MaySend, Ended, Closed]
TUNNEL_EVENTS = (Data, MaySend, Ended, Closed)
Event = Union[Requested, Opened, Denied, Restarted, Pong, TunnelEvent]


@dataclass(eq=False)
class Tunnel:
    """One connection through Tox. owner: the local object that it belongs to."""

    id: int
    extended: bool  # between two ttun ends: windows, EOF
    owner: Hashable = None
    send_window: int = FIRST_WINDOW  # bytes that the peer accepts now
    receive_window: int = FIRST_WINDOW  # bytes that we still accept
    window: int = FIRST_WINDOW  # full size of receive_window
    consumed: int = 0  # bytes that left the buffer and were not granted again yet
    buffered: int = 0
    granted_at: float = 0.0
    ended: bool = False  # we sent EOF
    overrun: bool = False  # the peer exceeded the window or the buffer

    def room(self) -> int:
        """Return how many bytes the next packet may carry."""
        return min(MAX_DATA, self.send_window) if self.extended else MAX_DATA


class Growth:
    """How many bytes the windows of all tunnels together may still grow, and have buffered."""

    def __init__(self, left: int = MAX_GROWTH) -> None:
        self.left = left
        self.buffered = 0

    def take(self, size: int, own: int) -> bool:
        """Take size bytes, if that leaves as much as the windows of this friend have grown.

        own: how much that is already.
        """
        if own + size > self.left - size:
            return False
        self.left -= size
        return True


class Multiplexer:
    """All tunnels between us and one friend. ``control`` is the queue of packets to send.

    server: whether the friend may request tunnels. first_id: where tunnel and forward IDs start.
    An ID is reused only after all others, so that no late packet reaches a new tunnel.
    """

    def __init__(self, *, server: bool, first_id: int, growth: Growth) -> None:
        self.control: deque[bytes] = deque()
        self.tunnels: dict[int, Tunnel] = {}
        self.round_trip: float | None = None  # seconds, of the last PING
        self._server = server
        self._next_id = first_id
        self._growth, self._grown = growth, 0  # bytes that our windows have grown
        self._requests: dict[int, Hashable] = {}
        self.asked: set[int] = set()  # forward IDs that the client is waiting for
        self.extended = False
        self._say_hello()

    def request(self, host: str, port: int, owner: Hashable) -> int:
        """Request a connection from the server; return the forward ID."""
        forward_id = self._take_id(0xFFFFFFFF, self._requests)
        self._requests[forward_id] = owner
        self.control.append(pack(REQUESTTUNNEL, port, U32.pack(forward_id) + host.encode()))
        return forward_id

    def cancel(self, forward_id: int) -> None:
        """Forget a request. If the server accepts it later, the tunnel is closed at once."""
        self._requests.pop(forward_id, None)

    def accept(self, forward_id: int, owner: Hashable) -> Tunnel | None:
        """Open the requested tunnel; return None if the peer has restarted since."""
        if forward_id not in self.asked:
            return None
        self.asked.remove(forward_id)
        tunnel = Tunnel(self._take_id(0xFFFF, self.tunnels), self.extended, owner)
        self.tunnels[tunnel.id] = tunnel
        self.control.append(pack(ACKTUNNEL, tunnel.id, U32.pack(forward_id)))
        return tunnel

    def deny(self, forward_id: int, reason: int) -> None:
        """Refuse a request. Tuntox has no packet for that: it gets a tunnel that closes."""
        if forward_id not in self.asked:
            return
        if self.extended:
            self.asked.remove(forward_id)
            self.control.append(pack(DENYTUNNEL, 0, U32.pack(forward_id) + bytes([reason])))
        else:
            tunnel = self.accept(forward_id, None)
            assert tunnel is not None
            self.close(tunnel)

    def data(self, tunnel: Tunnel, data: bytes | memoryview) -> bytes:
        """Return the packet for the next data, at most tunnel.room() bytes."""
        return pack(TCP, tunnel.id, data)

    def sent(self, tunnel: Tunnel, size: int) -> None:
        """Count bytes in a packet that toxcore accepted."""
        if tunnel.extended:
            tunnel.send_window -= size

    def consumed(self, tunnel: Tunnel, size: int, now: float) -> None:
        """Count bytes that left the buffer; grant them to the peer by the quarter of a window.

        If the peer uses up a quarter within half a round trip, the window is too small: double it.
        """
        tunnel.buffered -= size
        self._growth.buffered -= size
        if not tunnel.extended or self.tunnels.get(tunnel.id) is not tunnel:
            return
        tunnel.consumed += size
        if tunnel.consumed < tunnel.window // 4:
            return
        grant = tunnel.consumed
        quick = self.round_trip is not None and now - tunnel.granted_at < self.round_trip / 2
        may_grow = quick and tunnel.window < MAX_WINDOW
        if may_grow and self._growth.take(tunnel.window, self._grown):
            grant += tunnel.window
            self._grown += tunnel.window
            tunnel.window *= 2
        tunnel.consumed, tunnel.granted_at = 0, now
        tunnel.receive_window += grant
        self.control.append(pack(WINDOW, tunnel.id, U32.pack(grant)))

    def discard(self, tunnel: Tunnel) -> None:
        """Count what is left in the buffer as gone."""
        self._growth.buffered -= tunnel.buffered
        tunnel.buffered = 0

    def end(self, tunnel: Tunnel) -> None:
        """Half-close a tunnel; close it if the peer is Tuntox."""
        if self.tunnels.get(tunnel.id) is not tunnel or tunnel.ended:
            return
        if not tunnel.extended:
            self.close(tunnel)
            return
        tunnel.ended = True
        self.control.append(pack(EOF, tunnel.id))

    def close(self, tunnel: Tunnel) -> None:
        """Close a tunnel and tell the peer, unless it is closed already."""
        if self.tunnels.get(tunnel.id) is tunnel:
            self.control.append(pack(TCP_FIN, tunnel.id))
            self.forget(tunnel)

    def forget(self, tunnel: Tunnel) -> None:
        """Remove a tunnel that both sides have closed."""
        if self.tunnels.get(tunnel.id) is tunnel:
            del self.tunnels[tunnel.id]
            grown = tunnel.window - FIRST_WINDOW
            self._growth.left += grown
            self._grown -= grown

    def ping(self, data: bytes) -> None:
        """Request a PONG with the same data."""
        self._push_unless_many(PING, data)

    def reset(self) -> None:
        """Remove all tunnels and requests."""
        for tunnel in list(self.tunnels.values()):
            self.forget(tunnel)
        self._requests.clear()
        self.asked.clear()
        self.control.clear()

    def receive(self, packet: bytes) -> Event | None:
        """Handle a packet; return the event, or None.

        Raises ProtocolError for a malformed packet, which changes nothing.
        """
        kind, number, data = unpack(packet)
        if kind == TCP:
            return self._receive_data(number, data)
        if kind == WINDOW:
            tunnel = self.tunnels.get(number)
            if tunnel is None or len(data) != U32.size:
                return None
            tunnel.send_window = min(tunnel.send_window + U32.unpack(data)[0], 0xFFFFFFFF)
            return MaySend(tunnel)
        if kind in (EOF, TCP_FIN):
            tunnel = self.tunnels.get(number)
            if tunnel is None:
                return None
            if kind == EOF:
                return Ended(tunnel)
            self.forget(tunnel)
            return Closed(tunnel)
        if kind == REQUESTTUNNEL:
            return self._receive_request(number, data)
        if kind in (ACKTUNNEL, DENYTUNNEL):
            return self._receive_answer(kind, number, data)
        if kind == PING:
            self._push_unless_many(PONG, data)
            return None
        if kind == PONG:
            return Pong(data)
        if kind == HELLO:
            return self._receive_hello(data)
        raise ProtocolError(f"unknown type {kind:#06x}")

    def _receive_data(self, number: int, data: bytes) -> Event | None:
        tunnel = self.tunnels.get(number)
        if tunnel is None or not data:
            return None  # sent before our TCP_FIN arrived
        tunnel.buffered += len(data)
        self._growth.buffered += len(data)
        if tunnel.extended:
            tunnel.receive_window -= len(data)
            tunnel.overrun = tunnel.receive_window < 0
        else:
            tunnel.overrun = tunnel.buffered > BUFFER
        if tunnel.overrun:
            self.close(tunnel)
            return Closed(tunnel)
        return Data(tunnel, data)

    def _receive_request(self, port: int, data: bytes) -> Event | None:
        if not self._server:
            raise ProtocolError("a tunnel request, but this is a client")
        if len(data) < U32.size:
            raise ProtocolError("a tunnel request without a forward ID")
        forward_id = U32.unpack_from(data)[0]
        if forward_id in self.asked:
            raise ProtocolError("a tunnel request with the forward ID of a pending one")
        self.asked.add(forward_id)
        host = data[U32.size :].rstrip(b"\0").decode("ascii", errors="replace")
        if len(self.tunnels) + len(self.asked) > MAX_TUNNELS:
            self.deny(forward_id, FULL)
            return None
        # Python's IDNA encoder takes milliseconds for a long name: a name that needs it is refused.
        if not host or not host.isascii() or not host.isprintable() or port == 0:
            self.deny(forward_id, NAME)
            return None
        return Requested(forward_id, host, port)

    def _receive_answer(self, kind: int, number: int, data: bytes) -> Event | None:
        if len(data) < U32.size or (kind == DENYTUNNEL and len(data) <= U32.size):
            raise ProtocolError("an answer without a forward ID")
        if kind == ACKTUNNEL and number in self.tunnels:
            raise ProtocolError("ACKTUNNEL for a tunnel that is already open")
        forward_id = U32.unpack_from(data)[0]
        known = forward_id in self._requests
        owner = self._requests.pop(forward_id, None)
        if kind == DENYTUNNEL:
            return Denied(owner, data[U32.size]) if known else None
        tunnel = Tunnel(number, self.extended, owner)
        self.tunnels[number] = tunnel
        if not known:
            self.close(tunnel)  # the request was cancelled
            return None
        return Opened(owner, tunnel)

    def _receive_hello(self, data: bytes) -> Event | None:
        if len(data) < 2 or data[0] < 1:
            raise ProtocolError("HELLO without a version")
        if not self.extended:
            self.extended = True
            return None
        if data[1] & ANSWER:
            return None  # to a HELLO of ours, after one that was on its way
        # A second HELLO: the peer lost its state, our HELLO included.
        self.reset()
        self._say_hello(ANSWER)
        return Restarted()

    def _push_unless_many(self, kind: int, data: bytes) -> None:
        """Queue an optional packet, unless the control queue is long."""
        if len(self.control) < MAX_CONTROL // 2:
            self.control.append(pack(kind, 0, data))

    def _say_hello(self, flags: int = 0) -> None:
        self.control.append(pack(HELLO, 0, bytes([1, flags])))

    def _take_id(self, most: int, used: dict[int, Tunnel] | dict[int, Hashable]) -> int:
        """Return the next free ID."""
        while True:
            self._next_id = (self._next_id + 1) & 0xFFFFFFFF
            number = self._next_id & most
            if number not in used:
                return number
