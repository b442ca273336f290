"""Drive one side of a protocol over a socket that does not block: a handshake, SOCKS5, a proxy.

That side is a generator without I/O. It yields what to send and how many bytes it wants next, is
sent exactly those, and returns the result. So no byte is read that belongs to what follows.
"""

from __future__ import annotations

import socket
from collections.abc import Generator
from typing import Generic, TypeVar, cast

from ttun.errors import ProtocolError

CLOSED = "connection closed during the handshake"
Result = TypeVar("Result")


class Conversation(Generic[Result]):
    """A generator and the socket that it talks over. The socket, and its end, are the caller's."""

    def __init__(
        self,
        sock: socket.socket,
        steps: Generator[tuple[bytes, int], bytes, Result],
        received: bytes | bytearray = b"",
    ) -> None:
        """Say nothing yet. received: what was read from the socket before."""
        self._sock, self._steps = sock, steps
        self._received = bytearray(received)
        self._wanted: int | None = None  # None: it has not begun
        self.heard = False  # whether anything was read from the socket here

    def advance(self) -> Result | None:
        """Go on to the end and return the result; return None where the peer has to say more first.

        To be called at the beginning, and when the socket is readable. Raises ProtocolError for
        what the peer does wrong, OSError when the socket fails.
        """
        try:
            while True:
                if self._wanted is None:
                    data, self._wanted = next(self._steps)
                else:
                    data, self._wanted = self._steps.send(self._take(self._wanted))
                # An answer is far less than an empty socket buffer takes at once.
                if data and self._sock.send(data) != len(data):
                    raise OSError("the peer does not read")
        except BlockingIOError:
            return None
        except StopIteration as done:
            return cast(Result, done.value)

    def close(self) -> None:
        """End the generator."""
        self._steps.close()

    def _take(self, size: int) -> bytes:
        """Return the next bytes. Raises BlockingIOError where they have not come yet."""
        while len(self._received) < size:
            data = self._sock.recv(size - len(self._received))
            if not data:
                raise ProtocolError(CLOSED)
            self.heard = True
            self._received += data
        taken = bytes(self._received[:size])
        del self._received[:size]
        return taken
