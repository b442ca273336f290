"""The transport interface: a Dialer for a client, a Listener for a server.

tcp.py is the usual transport. A program may implement its own, or pass connected stream sockets
(also of a socketpair): GivenSocket for a client, GivenSockets for a server.
"""

from __future__ import annotations

import abc
import collections
import contextlib
import os
import socket
from collections.abc import Sequence
from typing import Callable, NamedTuple

from ttun.errors import TtunError, UsageError
from ttun.flag import Flag
from ttun.network.resolver import FIRST_PATIENCE
from ttun.settings import check_type


class Candidate(NamedTuple):
    """One way to connect to a server, such as one of its addresses."""

    name: str  # for messages: "192.0.2.1:20203"
    address: str | None  # the IP address, if any, which a route could match
    dial: Callable[[Flag], socket.socket]  # raises OSError, InterruptedError when stop was set


class Dialer(abc.ABC):
    """How a client connects to its server."""

    name: str  # the server, for messages
    # Seconds for a handshake, if connecting may take longer than the usual 10 s.
    patience: float | None = None
    # Seconds for the first look-up of a name, set by the client: less if it has other servers.
    name_patience = FIRST_PATIENCE
    device: str | None = None  # that its connections are bound to
    outside = False  # the tunnel takes other users' packets, those of a local name server too

    def look_up(self, stop: Flag) -> Sequence[str]:
        """Return the IP addresses of the server that routes could match.

        Called before the tunnel's routes exist, which could capture the DNS query. Raises OSError
        with a line that names the server, InterruptedError when stop was set.
        """
        return ()

    def start(self) -> None:  # noqa: B027 - most have no thread
        """Start threads, if needed. Raises TtunError."""

    def close(self) -> None:  # noqa: B027
        """Stop them and close everything."""

    @abc.abstractmethod
    def candidates(self, stop: Flag) -> Sequence[Candidate]:
        """Return the ways to connect, in the order to try. Raises like look_up()."""

    @abc.abstractmethod
    def kind(self, sock: socket.socket) -> str:
        """Return the actual protocol of a connection, e.g. "tcp"."""


class Arrival(NamedTuple):
    """A connection that a listener accepted."""

    sock: socket.socket
    name: str  # its origin, for messages
    source: str  # groups connections of one host for limits, e.g. an IPv6 /64


class Listener(abc.ABC):
    """How a server accepts its clients."""

    name: str  # where it listens, for messages
    port: int | None = None  # TCP port, once open
    single = False  # serves one peer only: no probing to guard against, nobody waits

    def open(self, stop: Flag) -> None:  # noqa: B027
        """Open what needs privileges. Raises TtunError, InterruptedError when stop was set."""

    def start(self) -> None:  # noqa: B027
        """Start threads, if needed. Raises TtunError."""

    @abc.abstractmethod
    def fileno(self) -> int:
        """Return a descriptor that is readable when accept() has a connection."""

    @abc.abstractmethod
    def accept(self) -> Arrival:
        """Return the next connection. Raises OSError, BlockingIOError if there is none."""

    @abc.abstractmethod
    def close(self) -> None:
        """Stop accepting."""

    @abc.abstractmethod
    def kind(self, sock: socket.socket) -> str:
        """Return the actual protocol of a connection, e.g. "tcp"."""


def checked(sock: socket.socket) -> socket.socket:
    """Return a socket, or raise UsageError if it is no plain stream socket."""
    check_type("the socket", sock, socket.socket)
    if hasattr(sock, "unwrap"):
        raise UsageError("the socket must not be a TLS one (give an end of a socketpair)")
    if sock.type != socket.SOCK_STREAM:
        raise UsageError("the socket must be a stream socket")
    return sock


class GivenSocket(Dialer):
    """A client's only connection, made by the program. The client ends with it."""

    def __init__(self, sock: socket.socket, name: str = "the given socket") -> None:
        """Take ownership of a connected stream socket. name: for messages. Raises UsageError."""
        check_type("the name", name, str)
        self.name = name
        self._sock: socket.socket | None = checked(sock)

    def candidates(self, stop: Flag) -> Sequence[Candidate]:
        """Return the only candidate. Raises TtunError after its connection has ended."""
        if self._sock is None:
            raise TtunError(f"connection over {self.name} ended (it cannot be reopened)")
        return [Candidate(self.name, None, self._take)]

    def _take(self, stop: Flag) -> socket.socket:
        sock, self._sock = self._sock, None
        assert sock is not None
        return sock

    def kind(self, sock: socket.socket) -> str:
        """Return "socket"."""
        return "socket"

    def close(self) -> None:
        """Close the socket, if it is unused."""
        if self._sock is not None:
            self._sock.close()


class GivenSockets(Listener):
    """Connections that the program passes to a server, from any thread."""

    name = "the given sockets"
    MOST = 16  # queued for accept()

    def __init__(self) -> None:
        """Start with an empty queue."""
        self._waiting: collections.deque[Arrival] = collections.deque()
        self._readable, self._writable = socket.socketpair()
        self._readable.setblocking(False)
        self._process: int | None = None  # that serves them

    def start(self) -> None:
        """Serve in this process."""
        self._process = os.getpid()

    def give(self, sock: socket.socket, name: str, source: str | None = None) -> bool:
        """Pass a connected stream socket to the server. name, source: see Arrival.

        Return False if the queue is full or closed, and in a forked child, whose queue nobody
        serves: the caller then keeps the socket. Raises UsageError for another kind of socket.
        """
        checked(sock)
        check_type("the name", name, str)
        check_type("the source", source, str, type(None))
        if len(self._waiting) >= self.MOST or self._process not in (None, os.getpid()):
            return False
        arrival = Arrival(sock, name, source or name)
        self._waiting.append(arrival)
        try:
            self._writable.send(b"\0", socket.MSG_NOSIGNAL)
        except OSError:  # closed
            with contextlib.suppress(ValueError):  # close() closes it
                self._waiting.remove(arrival)
            return False
        return True

    def fileno(self) -> int:
        """Return a descriptor that is readable when accept() has something."""
        return self._readable.fileno()

    def accept(self) -> Arrival:
        """Return the oldest connection."""
        self._readable.recv(1)
        if not self._waiting:  # a forked child has given one, to itself
            raise BlockingIOError
        return self._waiting.popleft()

    def close(self) -> None:
        """Close all queued connections."""
        for end in (self._readable, self._writable):
            end.close()
        with contextlib.suppress(IndexError):
            while True:
                self._waiting.popleft().sock.close()

    def kind(self, sock: socket.socket) -> str:
        """Return "socket"."""
        return "socket"
