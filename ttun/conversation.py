"""Drive one side of a protocol over a non-blocking socket: a handshake, SOCKS5, a proxy.

The protocol is a generator without I/O. It yields the bytes to send and the number of bytes that it
needs next, receives exactly that many, and returns the result. Bytes after the end of the protocol
stay in the socket.
"""

from __future__ import annotations

import socket
from collections.abc import Generator
from typing import Generic, TypeVar, cast

from ttun.errors import ProtocolError

CLOSED = "connection closed during the handshake"
Result = TypeVar("Result")


class Conversation(Generic[Result]):
    """A protocol generator and its socket. The caller owns and closes the socket."""

    def __init__(
        self,
        sock: socket.socket,
        steps: Generator[tuple[bytes, int], bytes, Result],
        received: bytes | bytearray = b"",
    ) -> None:
        """received: bytes already read from the socket."""
        self._sock, self._steps = sock, steps
        self._received = bytearray(received)
        self._wanted: int | None = None  # None: not started
        self.heard = False  # whether any byte was received
        self.answered = False  # whether all bytes were received that the protocol wanted first

    def advance(self) -> Result | None:
        """Run until the protocol ends and return its result, or None if more input is needed.

        Call it once to start and whenever the socket is readable. Raises ProtocolError on invalid
        input from the peer, OSError when the socket fails.
        """
        try:
            while True:
                if self._wanted is None:
                    data, self._wanted = next(self._steps)
                else:
                    data, self._wanted = self._steps.send(self._take(self._wanted))
                # A message always fits an empty send buffer. No SIGPIPE: a program may die of it.
                if data and self._sock.send(data, socket.MSG_NOSIGNAL) != len(data):
                    raise OSError("the peer does not read")
        except BlockingIOError:
            return None
        except StopIteration as done:
            return cast(Result, done.value)

    def close(self) -> None:
        """End the generator."""
        self._steps.close()

    def _take(self, size: int) -> bytes:
        """Return the next size bytes. Raises BlockingIOError if they have not arrived yet."""
        while len(self._received) < size:
            data = self._sock.recv(size - len(self._received))
            if not data:
                raise ProtocolError(CLOSED)
            self.heard = True
            self._received += data
        self.answered = True
        taken = bytes(self._received[:size])
        del self._received[:size]
        return taken
