"""One forwarded connection: a local socket and its tunnel.

A byte's way out: the socket says that it is readable; the stream queues up at its friend's link;
in its turn it sends a few packets while toxcore takes them. Nothing is read that toxcore has not
taken, or the peer's window has no room for, but one small chunk: so the application waits, not the
memory.

A byte's way in: a packet is appended to the stream's buffer; flush() writes all that came since
the last time at once. What left the buffer is granted to the peer again.
"""

from __future__ import annotations

import contextlib
import enum
import itertools
import logging
import socket
import struct
import time
from collections import deque
from typing import TYPE_CHECKING, Callable

from ttun.tox import loop as loops
from ttun.tox import packet
from ttun.tox.protocol import Tunnel

if TYPE_CHECKING:
    from ttun.tox.forwarder import Link

log = logging.getLogger("ttun")

CHUNK = 16 * packet.MAX_DATA  # bytes read from a socket at once, and a stream's turn
BUFFERS = 64  # buffers written to a socket at once
NO_LINGER = struct.pack("ii", 1, 0)


class Turn(enum.Enum):
    """How a stream's turn to send ended: toxcore is full, or it has more, or nothing more."""

    FULL, MORE, DONE = range(3)


FULL, MORE, DONE = Turn.FULL, Turn.MORE, Turn.DONE


class Stream:
    """A local socket and its open tunnel."""

    def __init__(
        self,
        link: Link,
        sock: socket.socket,
        tunnel: Tunnel,
        on_reset: Callable[[], None] | None = None,
    ) -> None:
        """Take over the socket and start to forward. on_reset is called before the socket is reset.

        The other end of a socket pair learns only so that it did not simply end.
        """
        self.link, self._sock, self.tunnel, self._on_reset = link, sock, tunnel, on_reset
        self.queued = False
        self._readable = self._writable = True
        self._pending = memoryview(b"")  # read, not yet sent
        self._buffer: deque[bytes | memoryview] = deque()  # received, not yet written
        self._dirty = False
        self._remote_ended = self._remote_closed = self._shut = self._gone = False
        self._aborted = self._unwritable = False
        tunnel.owner = self
        link.streams.add(self)
        link.forwarder.loop.add(sock, self._on_ready)
        self.wake()

    def wake(self) -> None:
        """Queue up for sending."""
        if not self.queued and not self._gone:
            self.queued = True
            self.link.queue.append(self)

    def send(self, send: Callable[[int, bytes], bool]) -> Turn:
        """Take a turn: send some packets."""
        tunnel, peer, friend = self.tunnel, self.link.peer, self.link.friend
        for _ in range(CHUNK // packet.MAX_DATA):
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
        if self._unwritable:
            self.reset()
            return False
        self.link.peer.end(tunnel)
        if tunnel.extended:
            self._finish_if_over()
        else:
            self.remote_closed()  # the original knows no half of a connection
        return False

    def receive(self, data: bytes) -> None:
        """Take bytes for the socket. Two neighbours in the buffer have more than a packet's bytes.

        A window counts bytes; kept one by one they would take fifty times as many.
        """
        if self._buffer and len(self._buffer[-1]) + len(data) <= packet.MAX_DATA:
            data = bytes(self._buffer.pop()) + data
        self._buffer.append(data)
        self._set_dirty()

    def remote_ended(self) -> None:
        """No more bytes will come."""
        self._remote_ended = True
        self._set_dirty()

    def remote_closed(self, *, aborted: bool = False) -> None:
        """The tunnel is gone: write what there is, then close; if aborted so that it shows.

        Who has said that no more comes has told all there was.
        """
        self._remote_closed = True
        self._aborted = aborted and not self._remote_ended
        self._set_dirty()

    def reset(self) -> None:
        """Close both ends at once."""
        self.link.peer.close(self.tunnel)
        self._aborted = True
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
            self._cannot_write()
            return
        if taken:
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
                self._cannot_write()
                return
            self._finish_if_over()

    def _cannot_write(self) -> None:
        """Reset the connection when all that came before its end is read and sent."""
        if self._remote_closed or self.tunnel.ended or not self.tunnel.room():
            self.reset()
            return
        self._unwritable = self._readable = True
        self._buffer.clear()
        self.wake()

    def _finish_if_over(self) -> None:
        """Close when both sides have said that there is no more, and all of it was written."""
        if self.tunnel.ended and self._shut:
            self.link.peer.forget(self.tunnel)
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
            self.link.forwarder.dirty.append(self)

    def _close(self) -> None:
        if self._gone:
            return
        self._gone = True
        self.link.streams.discard(self)
        self.link.forwarder.loop.remove(self._sock)
        if self._aborted and not self._shut:
            if self._on_reset is not None:
                self._on_reset()
            with contextlib.suppress(OSError):
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
        self._sock.close()
        self._buffer.clear()
        self._pending = memoryview(b"")
