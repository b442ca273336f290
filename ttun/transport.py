"""What a tunnel needs of whatever carries it: a Dialer for a client, a Listener for a server.

tcp.py is the usual one. A program may write its own, or hand over stream sockets that it has
connected by itself, a socketpair's too: GivenSocket for a client, GivenSockets for a server.
"""

from __future__ import annotations

import abc
import collections
import contextlib
import socket
from collections.abc import Sequence
from typing import Callable, NamedTuple

from ttun.errors import TtunError
from ttun.flag import Flag


class Candidate(NamedTuple):
    """How a server may be reached, such as at one of the addresses of its name."""

    name: str  # for people: "192.0.2.1:20203"
    address: str | None  # the IP address that is dialled, if there is one: a route could catch it
    dial: Callable[[Flag], socket.socket]  # raises OSError, InterruptedError when stop was set


class Dialer(abc.ABC):
    """How a client reaches its server."""

    name: str  # the server, for people
    outside = False  # other users' packets go through the tunnel: those of a local name server too

    def look_up(self, stop: Flag) -> Sequence[str]:
        """Return the IP addresses of the server, as far as routes could catch them.

        It is called while the tunnel has no routes that catch the question. Raises OSError with a
        line that names the server, InterruptedError when stop was set.
        """
        return ()

    def start(self) -> None:  # noqa: B027 - most have no thread
        """Start what threads it needs. Raises TtunError."""

    def close(self) -> None:  # noqa: B027
        """End them, and what they have open."""

    @abc.abstractmethod
    def candidates(self, stop: Flag) -> Sequence[Candidate]:
        """Return how the server may be reached now. Raises as look_up() does."""

    @abc.abstractmethod
    def kind(self, sock: socket.socket) -> str:
        """Return what a connection really is: "tcp", say."""


class Arrival(NamedTuple):
    """A connection that a listener accepted."""

    sock: socket.socket
    name: str  # where it comes from, for people
    source: str  # those that one host can easily have many of count as one, as an IPv6 /64 does


class Listener(abc.ABC):
    """How a server meets its clients."""

    name: str  # where it listens, for people
    port: int | None = None  # of TCP, once it is open

    def open(self, stop: Flag) -> None:  # noqa: B027
        """Open what takes privileges. Raises TtunError, InterruptedError when stop was set."""

    def start(self) -> None:  # noqa: B027
        """Start what threads it needs. Raises TtunError."""

    @abc.abstractmethod
    def fileno(self) -> int:
        """Return a descriptor that is readable when somebody waits to be accepted."""

    @abc.abstractmethod
    def accept(self) -> Arrival:
        """Return who waits. Raises OSError: BlockingIOError when it is nobody."""

    @abc.abstractmethod
    def close(self) -> None:
        """Accept nobody any more."""

    @abc.abstractmethod
    def kind(self, sock: socket.socket) -> str:
        """Return what a connection really is: "tcp", say."""


class GivenSocket(Dialer):
    """A client's one connection, made by the program. The client ends with it."""

    def __init__(self, sock: socket.socket, name: str = "the given socket") -> None:
        """Take a connected stream socket over."""
        self.name = name
        self._sock: socket.socket | None = sock

    def candidates(self, stop: Flag) -> Sequence[Candidate]:
        """Return the only one; raise TtunError when that is over."""
        if self._sock is None:
            raise TtunError(f"the connection over {self.name} has ended, and there is no other")
        return [Candidate(self.name, None, self._take)]

    def _take(self, stop: Flag) -> socket.socket:
        sock, self._sock = self._sock, None
        assert sock is not None
        return sock

    def kind(self, sock: socket.socket) -> str:
        """Return that it is a socket: what is behind it, the program knows."""
        return "socket"

    def close(self) -> None:
        """Close the socket, if nobody took it."""
        if self._sock is not None:
            self._sock.close()


class GivenSockets(Listener):
    """Connections that a program hands to a server one by one, from any thread."""

    name = "sockets that it is given"
    MOST = 16  # that wait for accept()

    def __init__(self) -> None:
        """Begin with none."""
        self._waiting: collections.deque[Arrival] = collections.deque()
        self._readable, self._writable = socket.socketpair()
        self._readable.setblocking(False)

    def give(self, sock: socket.socket, name: str, source: str | None = None) -> bool:
        """Hand over a connected stream socket, and say where it comes from; source as in Arrival.

        False when too many wait, or after close(): then it stays the caller's.
        """
        if len(self._waiting) >= self.MOST:
            return False
        arrival = Arrival(sock, name, source or name)
        self._waiting.append(arrival)
        try:
            self._writable.send(b"\0")
        except OSError:  # closed
            with contextlib.suppress(ValueError):  # close() has it, and closes it
                self._waiting.remove(arrival)
            return False
        return True

    def fileno(self) -> int:
        """Return a descriptor that is readable when accept() has something."""
        return self._readable.fileno()

    def accept(self) -> Arrival:
        """Return the one that has waited longest."""
        self._readable.recv(1)
        return self._waiting.popleft()

    def close(self) -> None:
        """Close all that wait."""
        for end in (self._readable, self._writable):
            end.close()
        with contextlib.suppress(IndexError):
            while True:
                self._waiting.popleft().sock.close()

    def kind(self, sock: socket.socket) -> str:
        """Return that it is a socket: what is behind it, the program knows."""
        return "socket"
