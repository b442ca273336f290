"""A ttun tunnel over Tox: the dialer of the client and the listener of the server.

A session takes any stream socket. It gets one end of a socket pair; the other end is a stream of
the forwarder. The client requests 127.0.0.1:20203, so ``ttun tox`` or Tuntox next to an ordinary
``ttun server`` serves it as well. ``ttun server --tox`` serves this target inside its own process
and refuses all others.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import select
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from ttun import transport
from ttun.errors import TtunError
from ttun.flag import Flag
from ttun.settings import DEFAULT_PORT
from ttun.tox import identity, nodes, packet
from ttun.tox.client import WAIT_MOST, ForwardingClient
from ttun.tox.instance import open_tox
from ttun.tox.loop import Loop
from ttun.tox.options import SECRET_VARIABLE
from ttun.tox.server import ForwardingServer
from ttun.transport import Arrival, Candidate

log = logging.getLogger("ttun")

TARGET = ("127.0.0.1", DEFAULT_PORT)
DEFAULT_DIRECTORY = Path("/etc/ttun")
SHOWN_WHOLE = 64  # characters of a server's name shown in full; a Tox ID is longer
LOOK_AGAIN = 1.0  # seconds until a dial that waits checks that the loop still runs


def _secret() -> bytes | None:
    secret = os.environb.get(SECRET_VARIABLE.encode())
    return identity.check_secret(secret) if secret else None


class Dialer(transport.Dialer):
    """Connects to the server with a given Tox ID, or name in a hosts file."""

    def __init__(self, server: str, node_file: Path | None = None) -> None:
        """Look up the server's Tox ID. Raises TtunError."""
        self.name = server if len(server) < SHOWN_WHOLE else server[:12]
        self._contact = identity.find_contact(server)
        self._secret = _secret() or self._contact.secret
        self._nodes = nodes.load(node_file)
        self._loop: Loop | None = None
        self._client: ForwardingClient | None = None

    def start(self) -> None:
        """Join the Tox network and look for the server. Raises TtunError."""
        self._loop = Loop(open_tox(None, 0, None, server=False))
        self._client = ForwardingClient(self._loop, self._contact.address, self._secret)
        self._client.nodes = self._nodes
        self._loop.start(self._client)

    def close(self) -> None:
        """Leave the Tox network."""
        if self._loop is not None:
            self._loop.stop()

    def candidates(self, stop: Flag) -> Sequence[Candidate]:
        """Return the only candidate."""
        return [Candidate(self.name, None, self.dial)]

    def kind(self, sock: socket.socket) -> str:
        """Return "tox"."""
        return "tox"

    def dial(self, stop: Flag) -> socket.socket:
        """Wait until the server is online and return a socket connected to it.

        Raises OSError with the reason, InterruptedError when stop was set.
        """
        assert self._loop is not None and self._client is not None
        loop, client = self._loop, self._client
        ours, theirs = socket.socketpair()
        refused: list[int] = []

        def answer(reason: int | None) -> None:
            # This wakes up the wait below: a byte, or the end when the client closes the socket.
            if reason is not None:
                refused.append(reason)
            else:
                with contextlib.suppress(OSError):
                    theirs.send(b"\0", socket.MSG_NOSIGNAL)

        end = time.monotonic() + WAIT_MOST + 2 * LOOK_AGAIN
        try:
            loop.call(lambda: client.open(theirs, *TARGET, answer))
            while not stop.wait_for(ours.fileno(), select.POLLIN, LOOK_AGAIN):
                if loop.over.is_set():
                    raise TtunError(f"Tox stopped: {loop.error}")
                if time.monotonic() > end:
                    raise OSError("toxcore does not respond")
            if not ours.recv(1):
                raise OSError(packet.describe(refused[0]))
            return ours
        except BaseException:
            ours.close()
            raise


class Listener(transport.GivenSockets):
    """Gives the server sockets whose other ends are streams over Tox."""

    def __init__(self, directory: Path = DEFAULT_DIRECTORY, node_file: Path | None = None) -> None:
        """Open Tox with the identity in directory; start() begins to serve."""
        super().__init__()
        known = nodes.load(node_file)
        secret = _secret()
        with contextlib.suppress(OSError):
            directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        tox = open_tox(directory, 0, None, server=True)
        self.name = identity.SCHEME + tox.address().hex().upper()
        self._loop = Loop(tox)
        self._loop.when_over = functools.partial(self._writable.shutdown, socket.SHUT_WR)
        self._server = ForwardingServer(self._loop, secret=secret, targets={TARGET: self._take})
        self._server.nodes = known
        self._count = 0

    def start(self) -> None:
        """Start serving."""
        self._loop.start(self._server)

    def accept(self) -> Arrival:
        """Return the oldest connection. Raises TtunError if Tox has stopped by itself."""
        if self._loop.over.is_set():
            raise TtunError(f"Tox stopped: {self._loop.error}")
        return super().accept()

    def close(self) -> None:
        """Leave the Tox network."""
        self._loop.stop()
        super().close()

    def kind(self, sock: socket.socket) -> str:
        """Return "tox"."""
        return "tox"

    def _take(self, sock: socket.socket, name: str) -> bool:
        self._count += 1
        return self.give(sock, f"tox-{name}:{self._count}", f"tox-{name}")
