"""One forwarded connection (a local socket and its tunnel), and all streams of a friend.

From the socket: epoll reports once that it is readable, and the stream joins its friend's queue. In
its turn it sends a few packets while toxcore accepts them. Apart from one small chunk, it reads
nothing that toxcore or the peer's window has no room for: the application blocks, and memory does
not grow.

To the socket: a packet is appended to the stream's buffer. flush() writes everything received since
the last time at once, and grants the peer as much again.
"""

from __future__ import annotations

import contextlib
import enum
import itertools
import socket
import struct
import time
from collections import deque
from typing import Callable

from ttun.tox import loop as loops
from ttun.tox import packet, protocol
from ttun.tox.protocol import Multiplexer, Tunnel

CHUNK = 16 * packet.MAX_DATA  # bytes read from a socket at once, and sent in a turn
BUFFERS = 64  # buffers written to a socket at once
NO_LINGER = struct.pack("ii", 1, 0)

Send = Callable[[bytes], bool]  # hands a packet to toxcore; False if toxcore is full


class Turn(enum.Enum):
    """How a stream's turn to send ended: toxcore is full, more is left, or nothing is left."""

    FULL, MORE, DONE = range(3)


class Streams:
    """The streams of one friend, and the queues of those with work to do."""

    def __init__(self, loop: loops.Loop, mux: Multiplexer) -> None:
        self.loop, self.mux = loop, mux
        self.all: set[Stream] = set()
        self.sending: deque[Stream] = deque()  # may have data for the friend
        self.writing: list[Stream] = []  # have data for their sockets

    def flush(self) -> None:
        """Write received data to the sockets."""
        while self.writing:
            writing, self.writing = self.writing, []
            for stream in writing:
                stream.flush()

    def buffered(self) -> int:
        """Return how many received bytes wait for their sockets."""
        return sum(stream.tunnel.buffered for stream in self.all)

    def reset_largest(self) -> None:
        """Reset the connection with the largest buffer."""
        max(self.all, key=lambda stream: stream.tunnel.buffered).reset()

    def take_turn(self, send: Send) -> bool:
        """Let the next stream send; return whether toxcore accepted everything."""
        turn = self.sending[0].send(send)
        if turn is Turn.FULL:
            return False
        stream = self.sending.popleft()
        if turn is Turn.MORE:
            self.sending.append(stream)
        else:
            stream.queued = False
        return True


class Stream:
    """A local socket and its open tunnel.

    on_reset is called before the socket is reset: through a socket pair, a reset looks like an
    orderly close.
    """

    def __init__(
        self,
        streams: Streams,
        sock: socket.socket,
        tunnel: Tunnel,
        on_reset: Callable[[], None] | None = None,
    ) -> None:
        self._streams, self._mux, self._sock = streams, streams.mux, sock
        self.tunnel, self._on_reset = tunnel, on_reset
        self.queued = False
        self._readable = self._writable = True
        self._pending = memoryview(b"")  # read, not yet sent
        self._buffer: deque[bytes | memoryview] = deque()  # received, not yet written
        self._dirty = False
        self._remote_ended = self._remote_closed = self._shut = self._gone = False
        self._aborted = self._unwritable = False
        tunnel.owner = self
        streams.all.add(self)
        streams.loop.add(sock, self._on_ready)
        self.wake()

    def wake(self) -> None:
        """Join the queue for sending."""
        if not self.queued and not self._gone:
            self.queued = True
            self._streams.sending.append(self)

    def send(self, send: Send) -> Turn:
        """Take a turn: send some packets."""
        tunnel = self.tunnel
        for _ in range(CHUNK // packet.MAX_DATA):
            if not self._has_pending(tunnel):
                return Turn.DONE
            room = tunnel.room()
            piece = self._pending[:room]
            if not send(self._mux.data(tunnel, piece)):
                return Turn.FULL
            self._mux.sent(tunnel, len(piece))
            self._pending = self._pending[room:]
        return Turn.MORE

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
        if self._unwritable:
            self.reset()
            return False
        self._mux.end(tunnel)
        if tunnel.extended:
            self._finish_if_over()
        else:
            self._remote_close(aborted=False)  # Tuntox has no half-close
        return False

    def handle(self, event: protocol.TunnelEvent) -> None:
        """Handle an event of the tunnel."""
        if isinstance(event, protocol.Data):
            self._receive(event.data)
        elif isinstance(event, protocol.MaySend):
            self.wake()
        elif isinstance(event, protocol.Ended):
            self._remote_ended = True
            self._set_dirty()
        else:
            self._remote_close(aborted=event.tunnel.extended or event.tunnel.overrun)

    def _receive(self, data: bytes) -> None:
        """Buffer data for the socket and join small packets.

        The window limits bytes; unjoined, tiny packets could take fifty times as much memory.
        """
        if self._buffer and len(self._buffer[-1]) + len(data) <= packet.MAX_DATA:
            data = bytes(self._buffer.pop()) + data
        self._buffer.append(data)
        self._set_dirty()

    def _remote_close(self, *, aborted: bool) -> None:
        """Write the buffer, then close; with a reset if aborted before the peer's EOF."""
        self._remote_closed = True
        self._aborted = aborted and not self._remote_ended
        self._set_dirty()

    def reset(self) -> None:
        """Close both ends at once."""
        self._mux.close(self.tunnel)
        self._aborted = True
        self._close()

    def flush(self) -> None:
        """Write received data to the socket."""
        self._dirty = False
        if self._gone:
            return
        taken = 0
        try:
            while self._buffer and self._writable:
                parts = list(itertools.islice(self._buffer, BUFFERS))
                sent = self._sock.sendmsg(parts, (), socket.MSG_NOSIGNAL)
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
            self._cannot_write()
            return
        if taken:
            self._mux.consumed(self.tunnel, taken, time.monotonic())
        if self._buffer:
            return
        if self._remote_closed:
            self._close()
        elif self._remote_ended and not self._shut:
            self._shut = True
            try:
                self._sock.shutdown(socket.SHUT_WR)
            except OSError:
                self._cannot_write()
                return
            self._finish_if_over()

    def _cannot_write(self) -> None:
        """Reset the connection after forwarding what the application has already sent."""
        if self._remote_closed or self.tunnel.ended or not self.tunnel.room():
            self.reset()
            return
        self._unwritable = self._readable = True
        self._buffer.clear()
        self._mux.discard(self.tunnel)
        self.wake()

    def _finish_if_over(self) -> None:
        """Close once both directions have ended and everything is written."""
        if self.tunnel.ended and self._shut:
            self._mux.forget(self.tunnel)
            self._close()

    def _on_ready(self, what: int) -> None:
        if what & loops.ERROR:
            self._cannot_write()
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
            self._streams.writing.append(self)

    def _close(self) -> None:
        if self._gone:
            return
        self._gone = True
        self._streams.all.discard(self)
        self._streams.loop.remove(self._sock)
        if self._aborted and not self._shut:
            if self._on_reset is not None:
                self._on_reset()
            with contextlib.suppress(OSError):
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
        self._sock.close()
        self._buffer.clear()
        self._mux.discard(self.tunnel)
        self._pending = memoryview(b"")
