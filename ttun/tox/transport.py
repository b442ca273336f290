"""The tunnel itself through Tox: a client's dialer and a server's listener for ttun's sessions.

A session takes any stream socket: it gets one end of a socketpair, and the other end is a stream of
the forwarder. The client asks for 127.0.0.1:20203, so a plain ``ttun tox`` (or the original) beside
an ordinary ``ttun server`` serves it as well; ``ttun server --tox`` answers that one target inside
its own process and refuses every other.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import socket
from collections.abc import Sequence
from pathlib import Path

from ttun import transport
from ttun.errors import TtunError
from ttun.flag import Flag
from ttun.settings import DEFAULT_PORT
from ttun.tox import identity, nodes, packet
from ttun.tox.client import ForwardingClient
from ttun.tox.instance import open_tox
from ttun.tox.loop import Loop
from ttun.tox.options import SECRET_VARIABLE
from ttun.tox.server import ForwardingServer
from ttun.transport import Candidate

log = logging.getLogger("ttun")

TARGET = ("127.0.0.1", DEFAULT_PORT)
DEFAULT_DIRECTORY = Path("/etc/ttun")
SHOWN_WHOLE = 64  # characters of a server's name; a Tox ID has more


def _secret() -> bytes | None:
    secret = os.environb.get(SECRET_VARIABLE.encode())
    return identity.check_secret(secret) if secret else None


class Dialer(transport.Dialer):
    """Reaches the server that a Tox ID, or a name in the file of names, belongs to."""

    def __init__(self, server: str, node_file: Path | None = None) -> None:
        """Look up who is meant. Raises TtunError."""
        self.name = server if len(server) < SHOWN_WHOLE else server[:12]
        self._contact = identity.find_contact(server)
        self._secret = _secret() or self._contact.secret
        self._nodes = nodes.load(node_file)
        self._loop: Loop | None = None
        self._client: ForwardingClient | None = None

    def start(self) -> None:
        """Open Tox and begin to look for the server. Raises TtunError."""
        self._loop = Loop(open_tox(None, 0, None, server=False))
        self._client = ForwardingClient(self._loop, self._contact.address, self._secret)
        self._client.nodes = self._nodes
        self._loop.start(self._client)

    def close(self) -> None:
        """Leave the network."""
        if self._loop is not None:
            self._loop.stop()

    def candidates(self, stop: Flag) -> Sequence[Candidate]:
        """Return the only one."""
        return [Candidate(self.name, None, self.dial)]

    def kind(self, sock: socket.socket) -> str:
        """Return "tox"."""
        return "tox"

    def dial(self, stop: Flag) -> socket.socket:
        """Return a socket connected to the server's end of the tunnel, when it is online.

        Raises OSError with the reason, InterruptedError when stop was set.
        """
        assert self._loop is not None and self._client is not None
        loop, client = self._loop, self._client
        answers: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        ours, theirs = socket.socketpair()
        try:
            loop.call(lambda: client.open(theirs, *TARGET, answers.put))
            while not stop.is_set() and not loop.over.is_set():
                stop.beat()
                with contextlib.suppress(queue.Empty):
                    reason = answers.get(timeout=0.1)
                    if reason is not None:
                        raise OSError(packet.describe(reason))
                    return ours
            if loop.over.is_set() and not stop.is_set():
                raise TtunError(f"Tox ended: {loop.error}")
            raise InterruptedError
        except BaseException:
            ours.close()
            raise


class Listener(transport.GivenSockets):
    """What a server accepts from: sockets whose other ends are streams through Tox."""

    def __init__(self, directory: Path = DEFAULT_DIRECTORY, node_file: Path | None = None) -> None:
        """Open Tox with the identity in directory; nobody is served before start()."""
        super().__init__()
        known = nodes.load(node_file)
        secret = _secret()
        with contextlib.suppress(OSError):
            directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        tox = open_tox(directory, 0, None, server=True)
        self.name = identity.SCHEME + tox.address().hex().upper()
        self._loop = Loop(tox)
        self._server = ForwardingServer(self._loop, secret=secret, targets={TARGET: self._take})
        self._server.nodes = known
        self._count = 0

    def start(self) -> None:
        """Serve."""
        self._loop.start(self._server)

    def close(self) -> None:
        """Leave the network."""
        self._loop.stop()
        super().close()

    def kind(self, sock: socket.socket) -> str:
        """Return "tox"."""
        return "tox"

    def _take(self, sock: socket.socket, name: str) -> bool:
        self._count += 1
        return self.give(sock, f"tox-{name}:{self._count}", f"tox-{name}")
