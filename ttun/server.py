"""The server: listens, lets one peer in at a time, and lets the next in when that one has left.

While a peer is connected a few others are held: their connections are accepted and not answered,
and they are served first once that peer has left. With takeover whoever proves the key replaces the
peer that is there: for a client that comes from another network before its old connection is known
to be dead.
"""

from __future__ import annotations

import logging
import socket
from typing import TYPE_CHECKING, Any

from ttun import handshake, tcp
from ttun.device import SERVER
from ttun.endpoint import Endpoint
from ttun.errors import TtunError
from ttun.peer import Host, Peer
from ttun.session import Session
from ttun.x1 import AnsweredNonces

if TYPE_CHECKING:
    from ttun.tox.transport import Listener

log = logging.getLogger("ttun")

DEFAULT_LISTEN = f":{tcp.DEFAULT_PORT}"


class Server(Endpoint):
    """The end that listens.

    >>> server = ttun.Server(b"secret", on_connected=lambda peer: print("hello", peer))
    >>> server.start()           # opens ttunN and the port; raises ttun.TtunError
    >>> server.status().device
    'ttun0'
    >>> server.wait(60)          # False: it goes on
    False
    >>> server.stop()
    """

    role = "server"
    addresses = SERVER

    def __init__(
        self,
        key: bytes,
        *,
        listen: str = DEFAULT_LISTEN,
        takeover: bool = False,
        tox: Listener | None = None,
        **options: Any,
    ) -> None:
        """Take the address to listen on, or a Tox to listen on instead, whether a new client
        replaces the one that is there, and the options of Endpoint.
        """
        super().__init__(key, **options)
        self._tox = tox
        self._takeover = takeover
        self._answered = AnsweredNonces(self._buffers.nonces)
        self._successor: Peer | None = None  # waits until the session has ended
        self._listen = tcp.parse_address(listen, listening=True)
        self._listener: socket.socket | None = None
        self._port: int | None = None
        self._is_listening = False

    @property
    def port(self) -> int:
        """The port that it listens on, the real one also for port 0. Raises TtunError without."""
        if self._port is None:
            raise TtunError("this server has no port: open or start it first")
        return self._port

    def _open(self) -> None:
        if self._tox is not None:
            log.info("listening on %s", self._tox.address)
            return
        self._listener = tcp.listen(self._listen, self._mptcp, self._stop, self._control)
        name = self._listener.getsockname()
        self._port = name[1]
        log.info("listening on %s (%s)", tcp.show(name), self._kinds())

    def _begin(self) -> None:
        if self._tox is not None:
            self._tox.start()

    def _kinds(self) -> str:
        assert self._listener is not None
        return "tcp and mptcp" if self._listener.proto == tcp.IPPROTO_MPTCP else "tcp"

    def _close(self) -> None:
        if self._successor is not None:
            self._successor.close()
        if self._tox is not None:
            self._tox.close()
        if self._listener is not None:
            self._listener.close()

    def _run(self) -> None:
        if not self._is_listening:
            self._pending.listen(self._host())
            self._is_listening = True
        while (peer := self._next_peer()) is not None:
            if self._takeover:
                self._authenticated(peer, "; another client may take over")
                self._carry(peer)
                continue
            self._authenticated(peer, "; other clients wait until it disconnects")
            self._pending.hold()
            try:
                self._carry(peer)
            finally:
                self._pending.release()

    def _host(self) -> Host:
        listener = self._tox or self._listener
        assert listener is not None
        return Host(
            listener,
            begin=lambda: handshake.server(self._k, self._terms, self._answered),
            knows_key=lambda nonce: handshake.knows_key(
                self._k, self._terms, nonce, self._answered
            ),
            silent=self._terms.wire == "x1",
        )

    def _next_peer(self) -> Peer | None:
        """Return the next peer that proves the key; None when stop was set."""
        peer, self._successor = self._successor, None
        while peer is None and not self._stop.is_set():
            peer = self._turn()
        return peer

    def _newcomer(self, session: Session, peer: Peer) -> None:
        """Put a peer in the place of whoever waits for the session to end, and end that."""
        if self._successor is not None:
            self._successor.close()
        self._successor = peer
        session.end(f"{peer.name} took over")
