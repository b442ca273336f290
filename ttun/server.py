"""The server: listen, and serve one authenticated client at a time.

During a session, a few other connections are held: accepted, but answered only after the session
has ended. With takeover, a client that authenticates replaces the connected one: for a client that
reconnects from another network before its old connection has timed out.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Callable

from ttun import handshake, tcp
from ttun.endpoint import Endpoint
from ttun.errors import TtunError
from ttun.peer import Host, Peer
from ttun.session import Session
from ttun.settings import (
    DEFAULT_LIMITS,
    DEFAULT_PORT,
    SERVER,
    Addresses,
    Limits,
    Network,
    Settings,
    check_type,
    several,
)
from ttun.transport import Listener
from ttun.x1 import AnsweredNonces

log = logging.getLogger("ttun")

DEFAULT_LISTEN = f":{DEFAULT_PORT}"


class Server(Endpoint):
    """The end that listens.

    >>> server = ttun.Server(b"secret", on_connected=lambda peer: print("hello", peer))
    >>> server.start()           # opens ttunN and the port; raises ttun.TtunError
    >>> server.status().device
    'ttun0'
    >>> server.wait(60)          # False: still running
    False
    >>> server.stop()
    """

    role = "server"
    addresses = SERVER

    def __init__(
        self,
        key: bytes | Sequence[bytes],
        *,
        listen: str | Sequence[str] | Listener = DEFAULT_LISTEN,
        takeover: bool = False,
        cipher: str | None = Settings.cipher,
        wire: str = Settings.wire,
        mtu: int = Settings.mtu,
        mptcp: bool | None = Settings.mptcp,
        offload: bool = Settings.offload,
        congestion_control: str = Settings.congestion_control,
        buffers: str = Settings.buffers,
        device: str = Settings.device,
        addresses: Addresses | None = Settings.addresses,
        routes: Sequence[Network] = Settings.routes,
        limits: Limits = DEFAULT_LIMITS,
        on_connected: Callable[[str], object] | None = None,
        on_disconnected: Callable[[str, str], object] | None = None,
    ) -> None:
        """key: the pre-shared key, any bytes; or up to four, of which a client needs one.

        For options of both ends, see Settings.

        listen: HOST:PORT, :PORT, several of these, or another Listener. takeover: a new client
        replaces the connected one instead of waiting. For callbacks and errors, see Endpoint.
        """
        settings = Settings(
            cipher, wire, mtu, mptcp, offload, congestion_control,
            buffers, device, addresses, routes, limits,
        )  # fmt: skip
        super().__init__(key, settings, on_connected, on_disconnected)
        check_type("takeover", takeover, bool)
        if isinstance(listen, Listener):
            check_type("the name of a listener", getattr(listen, "name", None), str)
        else:
            several("listen", listen, str, Listener)
            listen = tcp.Listener(listen, mptcp, congestion_control)
        self._listener = listen
        self._takeover = takeover
        self._answered = AnsweredNonces(self._buffers.nonces)
        self._successor: Peer | None = None  # starts when the session has ended
        self._is_listening = False

    @property
    def port(self) -> int:
        """The port it listens on, also if :0 was given. Raises TtunError before open()."""
        if self._listener.port is None:
            raise TtunError("this server has no port yet (open or start it first)")
        return self._listener.port

    @property
    def _endpoint(self) -> str:
        return self._listener.name

    def _open(self) -> None:
        self._listener.open(self._stop)
        log.info("listening on %s", self._listener.name)

    def _begin(self) -> None:
        super()._begin()
        self._listener.start()

    def _close(self) -> None:
        if self._successor is not None:
            self._successor.close()
        self._listener.close()

    def _run(self) -> None:
        if not self._is_listening:
            self._pending.listen(self._host())
            self._is_listening = True
        while (peer := self._next_peer()) is not None:
            if self._takeover:
                self._authenticated(peer, "; another client can take over")
                self._carry(peer)
                continue
            others = "" if self._listener.single else "; other clients wait"
            self._authenticated(peer, others)
            self._pending.hold()
            try:
                self._carry(peer)
            finally:
                self._pending.release()

    def _host(self) -> Host:
        k, *others = self._ks
        return Host(
            self._listener,
            begin=lambda: handshake.server(k, self._terms, self._answered, others),
            knows_key=lambda nonce: any(
                handshake.knows_key(each, self._terms, nonce, self._answered) for each in self._ks
            ),
            silent=self._terms.wire == "x1" and not self._listener.single,
        )

    def _next_peer(self) -> Peer | None:
        """Return the next authenticated peer, or None when stop was set."""
        peer, self._successor = self._successor, None
        while peer is None and not self._stop.is_set():
            peer = self._pending.turn()
        return peer

    def _new_peer(self, session: Session, peer: Peer) -> None:
        """Make this peer the next one, and end the current session."""
        if self._successor is not None:
            self._successor.close()
        self._successor = peer
        session.end(f"{peer.name} took over")
