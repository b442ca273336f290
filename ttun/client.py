"""The client: dials, runs a session, and dials again, for ever."""

from __future__ import annotations

import logging
import random
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttun import handshake, link
from ttun.device import CLIENT
from ttun.endpoint import Endpoint
from ttun.errors import UsageError
from ttun.handshakes import Handshakes, Peer
from ttun.routes import catching

if TYPE_CHECKING:
    from ttun.tox.transport import Dialer

log = logging.getLogger("ttun")


class Backoff:
    """How long to wait before the next dial, in seconds.

    At once after a session of over 10 s. Else 1 s, doubled with each attempt up to 30 s, with
    jitter so that many clients of a server that comes back do not come all at once; back to 1 s
    after a session of over 60 s. In the first minute after a session never more than 1 s: most
    outages are short.
    """

    FIRST, MOST, MOST_AT_FIRST = 1.0, 30.0, 1.0
    GOOD_SESSION, LONG_SESSION, AT_FIRST = 10.0, 60.0, 60.0

    def __init__(self) -> None:
        """Start as if there had never been a session."""
        self._delay = self.FIRST
        self._last_session = float("-inf")

    def after_session(self, duration: float, now: float) -> float:
        """Return the wait after a session that lasted duration seconds and ended now."""
        self._last_session = now
        if duration > self.LONG_SESSION:
            self._delay = self.FIRST
        return 0.0 if duration > self.GOOD_SESSION else self.after_failure(now)

    def after_failure(self, now: float) -> float:
        """Return the wait after a dial or a handshake that failed now."""
        wait = self._delay * random.uniform(0.75, 1.0)
        self._delay = min(2 * self._delay, self.MOST)
        if now - self._last_session < self.AT_FIRST:
            wait = min(wait, self.MOST_AT_FIRST)
        return wait


class Client(Endpoint):
    """The end that dials.

    >>> client = ttun.Client(b"secret", server="192.0.2.1:20203")
    >>> client.start()           # opens ttunN, then dials in the background; raises ttun.TtunError
    >>> client.status().peer     # None until it is connected
    >>> client.stop()
    """

    role = "client"
    addresses = CLIENT

    def __init__(
        self, key: bytes, *, server: str, tox_nodes: str | None = None, **options: Any
    ) -> None:
        """Take the server's HOST:PORT, or tox:TOXID, and the options of Endpoint.

        tox_nodes: a file of nodes to enter the Tox network by, None for the usual ones.
        """
        super().__init__(key, **options)
        self._tox: Dialer | None = None
        self._server: link.Address | str
        if server.startswith("tox:"):
            from ttun.tox.transport import Dialer

            self._tox = Dialer(server[4:], Path(tox_nodes) if tox_nodes else None)
            self._server = server if len(server) < 64 else server[:12]  # for the log
        else:
            self._server = link.parse_address(server, listening=False)

    def _open(self) -> None:
        if isinstance(self._server, str):  # through Tox
            return
        if why := self._caught(self._server.host):  # of a name it is known when that is looked up
            raise UsageError(why)

    def _begin(self) -> None:
        if self._tox is not None:
            self._tox.start()

    def _close(self) -> None:
        if self._tox is not None:
            self._tox.stop()

    def _run(self) -> None:
        backoff = Backoff()
        while not self._stop.is_set():
            peer = self._connect()
            if self._stop.is_set() and peer is None:
                return
            if peer is None:
                wait = backoff.after_failure(time.monotonic())
            else:
                self._authenticated(peer)
                duration = self._carry(peer)
                wait = backoff.after_session(duration, time.monotonic())
            if not self._stop.is_set():
                log.info("reconnecting %s", f"in {wait:.1f} s" if wait else "at once")
                self._stop.wait(wait)

    def _caught(self, address: str) -> str | None:
        """Return why an address cannot be dialled: a route of ours would carry it."""
        assert self._device is not None
        route = catching(self._routes, address, self._device.name)
        if route is None:
            return None
        return f"the route to {route} would carry the tunnel's own way to {address}"

    def _connect(self) -> Peer | None:
        """Dial and shake hands; None if either failed, or stop was set."""
        try:
            sock = self._dial()
        except InterruptedError:
            return None
        except OSError as error:
            log.info("cannot connect to %s: %s", self._server, error)
            return None
        handshakes = Handshakes(self._stop)
        try:
            name = str(self._server)
            handshakes.add(sock, name, name, handshake.client(self._k, self._terms))
            return handshakes.wait()
        finally:
            handshakes.close()

    def _dial(self) -> socket.socket:
        if self._tox is not None:
            return self._tox.dial(self._stop)
        assert isinstance(self._server, link.Address)
        return link.dial(self._server, self._mptcp, self._stop, self._caught)
