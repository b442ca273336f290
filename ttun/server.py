"""The server: listens, lets one peer in at a time, and lets the next in when that one has left.

While a peer is connected nobody accepts: others wait in the TCP backlog. With takeover a thread
goes on accepting, and whoever proves the key replaces the peer that is there: for a client that
comes from another network before its old connection is known to be dead.
"""

from __future__ import annotations

import logging
import socket
import threading
from typing import TYPE_CHECKING, Any, cast

from ttun import handshake, link
from ttun.device import SERVER
from ttun.endpoint import Endpoint
from ttun.errors import TtunError
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
        self._successor: Peer | None = None  # under the lock: waits until the session has ended
        self._arrived = threading.Event()  # there is a successor, or none will come any more
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
            log.info("listening on %s", self._tox.address)
            return
        self._listener = link.listen(self._listen, self._mptcp)
        log.info("listening on %s (%s)", link.show(self._listener.getsockname()), self._kinds())

    def _begin(self) -> None:
        if self._tox is not None:
            self._tox.start()

    def _kinds(self) -> str:
        assert self._listener is not None
        return "tcp and mptcp" if self._listener.proto == link.IPPROTO_MPTCP else "tcp"

    def _close(self) -> None:
        if self._tox is not None:
            self._tox.close()
        if self._listener is not None:
            self._listener.close()

    def _run(self) -> None:
        if self._takeover:
            self._run_with_takeover()
            return
        while not self._stop.is_set():
            peer = self._let_in()
            if peer is not None:
                self._authenticated(peer, "; the listener is idle until it leaves")
                self._carry(peer)

    def _let_in(self) -> Peer | None:
        """Return the first peer that proves the key; None when stop was set."""
        handshakes = self._handshakes()
        try:
            return handshakes.wait()
        finally:
            handshakes.close()

    def _handshakes(self) -> Handshakes:
        # A Tox listener has what is used of a socket here: fileno() and accept().
        listener = cast(socket.socket, self._tox or self._listener)
        handshakes = Handshakes(self._stop)
        handshakes.listen(listener, lambda: handshake.server(self._k, self._terms))
        return handshakes

    def _run_with_takeover(self) -> None:
        door = threading.Thread(target=self._let_in_always, name="ttun-door", daemon=True)
        door.start()
        try:
            while (peer := self._next_peer()) is not None:
                self._authenticated(peer, "; another client may take over")
                self._carry(peer)
        finally:
            self._stop.set()  # also where the device was lost: the door has to close
            door.join()
            self._succeed(None)

    def _let_in_always(self) -> None:
        """Let peers in, one after the other, until stop is set. The latest one counts."""
        handshakes = self._handshakes()
        try:
            while (peer := handshakes.wait()) is not None:
                self._succeed(peer)
        except Exception as error:  # a bug: the server ends with it, as with any other
            self._error = TtunError(f"internal error: {type(error).__name__}: {error}")
        finally:
            handshakes.close()
            self._stop.set()
            self._arrived.set()

    def _next_peer(self) -> Peer | None:
        """Wait for the next peer; None when stop was set."""
        peer = None
        while peer is None and not self._stop.is_set():
            self._arrived.wait()
            with self._lock:
                self._arrived.clear()
                peer, self._successor = self._successor, None
        return peer

    def _succeed(self, peer: Peer | None) -> None:
        """Put a peer in the place of whoever waits for the session to end, and end that."""
        with self._lock:
            before, self._successor = self._successor, peer
            session = self._session  # nobody takes the successor before `arrived`
        if before is not None:
            before.keys.wipe()
            if before.keys.agreement is not None:
                before.keys.agreement.p.wipe()
            before.sock.close()
        if session is not None and peer is not None:
            self._end_session(session, f"{peer.name} took over")
        self._arrived.set()

    def _is_unwanted(self) -> bool:
        return super()._is_unwanted() or self._successor is not None
