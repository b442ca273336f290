"""The server: listens, lets one peer in at a time, and lets the next in when that one has left.

While a peer is connected nobody accepts: others wait in the TCP backlog.
"""

from __future__ import annotations

import logging
import socket
from typing import TYPE_CHECKING, Any, cast

from ttun import handshake, link
from ttun.device import SERVER
from ttun.endpoint import Endpoint
from ttun.handshakes import Handshakes, Peer

if TYPE_CHECKING:
    from ttun.tox.transport import Listener

log = logging.getLogger("ttun")

DEFAULT_LISTEN = f":{link.DEFAULT_PORT}"


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
        tox: Listener | None = None,
        **options: Any,
    ) -> None:
        """Take the address to listen on, or a Tox to listen on instead, and Endpoint's options."""
        super().__init__(key, **options)
        self._tox = tox
        self._listen = link.parse_address(listen, listening=True)
        self._listener: socket.socket | None = None

    @property
    def port(self) -> int:
        """The port that it listens on, after start(): the real one also for port 0."""
        assert self._listener is not None
        port: int = self._listener.getsockname()[1]
        return port

    def _open(self) -> None:
        if self._tox is not None:
            self._tox.start()
            log.info("listening on %s", self._tox.address)
            return
        self._listener = link.listen(self._listen, self._mptcp)
        log.info("listening on %s (%s)", link.show(self._listener.getsockname()), self._kinds())

    def _kinds(self) -> str:
        assert self._listener is not None
        return "tcp and mptcp" if self._listener.proto == link.IPPROTO_MPTCP else "tcp"

    def _close(self) -> None:
        if self._tox is not None:
            self._tox.close()
        if self._listener is not None:
            self._listener.close()

    def _run(self) -> None:
        while not self._stop.is_set():
            peer = self._let_in()
            if peer is not None:
                self._authenticated(peer, "; the listener is idle until it leaves")
                self._carry(peer)

    def _let_in(self) -> Peer | None:
        """Return the first peer that proves the key; None when stop was set."""
        # A Tox listener has what is used of a socket here: fileno() and accept().
        listener = cast(socket.socket, self._tox or self._listener)
        handshakes = Handshakes(self._stop)
        handshakes.listen(listener, lambda: handshake.server(self._k, self._terms))
        try:
            return handshakes.wait()
        finally:
            handshakes.close()
