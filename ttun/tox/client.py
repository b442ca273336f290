"""The client: finds the server, requests tunnels from it, and finds it again when it is lost.

1. Send the server a friend request with the secret. Repeat it if the server is not online within
   45 seconds.
2. When the server comes online, request a tunnel for each waiting connection.
3. When toxcore reports the server offline, or no packet came for 35 seconds despite pings, close
   all streams and go back to 1. The listening ports stay open. New connections and unanswered
   requests wait for the server to return.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from dataclasses import dataclass
from typing import Callable

from ttun.conversation import Conversation
from ttun.errors import ProtocolError
from ttun.tox import identity, packet, protocol, socks5
from ttun.tox.forwarder import Forwarder
from ttun.tox.link import Link
from ttun.tox.loop import Loop

log = logging.getLogger("ttun")

INVITE_AGAIN = 45.0  # seconds
# Seconds without a packet, with a ping every five. toxcore times out after 32
# (friend_connection.h); until then it may fall back to a relay if UDP stopped working.
LOST_AFTER = 35.0
WAIT_ONLINE = 60.0  # seconds that a connection waits for the server to come online
WAIT_ANSWER = 30.0  # seconds that it waits for an answer; Tuntox does not answer a refused request
WAIT_MOST = 120.0  # seconds for both together, even if the server comes and goes
MAX_WAITING = 1024
MAX_REQUEST = 1024  # bytes, more than any SOCKS request
SOCKS_TIMEOUT = 30.0  # seconds for the whole SOCKS5 negotiation

GREETING = b"ttun\0"

Answer = Callable[["int | None"], None]  # None: the tunnel is open; otherwise why it is not


@dataclass(eq=False)
class _Connection:
    """A connection that is waiting for its tunnel."""

    sock: socket.socket
    host: str
    port: int
    answer: Answer
    on_reset: Callable[[], None] | None
    since: float
    patience: float = WAIT_ONLINE
    forward_id: int = -1  # of the request, once sent

    def wait(self, seconds: float) -> None:
        """Extend the deadline to the given number of seconds from now."""
        self.patience = min(time.monotonic() - self.since + seconds, WAIT_MOST)


class ForwardingClient(Forwarder):
    """Reaches one server. address: its 38 bytes. on_online is called when it comes online.

    Raises TtunError if toxcore rejects the address.
    """

    def __init__(self, loop: Loop, address: bytes, secret: bytes | None) -> None:
        super().__init__(loop)
        self._address = address
        self._message = GREETING if secret is None else secret + b"\0"
        self._waiting: set[_Connection] = set()
        self._ports: list[_OpenPort] = []
        self._talks: set[_SocksTalk] = set()
        self.link: Link | None = None
        self.on_online: Callable[[], None] | None = None
        self.on_answer_to_ping: Callable[[float], None] | None = None
        self._invite()

    def listen(self, listener: socket.socket, target: tuple[str, int] | None) -> None:
        """Forward connections to a listening socket: to target, or as SOCKS5 requests (None)."""
        self._ports.append(_OpenPort(self, listener, target))

    def open(
        self,
        sock: socket.socket,
        host: str,
        port: int,
        answer: Answer,
        on_reset: Callable[[], None] | None = None,
    ) -> None:
        """Take over a socket and connect it to a target.

        answer is called with the result; on_reset is called if the connection is reset later.
        """
        connection = _Connection(sock, host, port, answer, on_reset, time.monotonic())
        if len(self._waiting) >= MAX_WAITING:
            self._refuse(connection, packet.FULL)
            return
        self._waiting.add(connection)
        if self.link is not None:
            self._request(connection, self.link)

    def _request(self, connection: _Connection, link: Link) -> None:
        connection.wait(WAIT_ANSWER)
        connection.forward_id = link.mux.request(connection.host, connection.port, connection)

    def on_answered(self, link: Link, answer: protocol.Opened | protocol.Denied) -> None:
        """Start forwarding, or refuse the connection with the server's reason."""
        connection = answer.owner
        assert isinstance(connection, _Connection)
        if isinstance(answer, protocol.Opened):
            self._waiting.discard(connection)
            connection.answer(None)
            link.join(connection.sock, answer.tunnel, connection.on_reset)
        else:
            self._refuse(connection, answer.reason)

    def _refuse(self, connection: _Connection, reason: int) -> None:
        self._waiting.discard(connection)
        if self.link is not None:
            self.link.mux.cancel(connection.forward_id)
        log.info("%s:%d: %s", connection.host, connection.port, packet.describe(reason))
        connection.answer(reason)
        connection.sock.close()

    def ping(self) -> None:
        """Ping the server, which must be online; on_answer_to_ping gets the seconds."""
        if self.link is not None:
            self.link.ping(time.monotonic())

    def _invite(self) -> None:
        """Send the server a friend request. Removing an existing friend makes toxcore resend it."""
        for friend in self.loop.tox.friends():
            self.loop.tox.delete_friend(friend)
        self.loop.tox.add_friend(self._address, self._message)
        self._invited = time.monotonic()
        log.info("looking for peer %s", identity.short_name(self._address))

    def on_link(self, link: Link) -> None:
        """Request tunnels for the waiting connections."""
        self.link = link
        for connection in list(self._waiting):
            self._request(connection, link)
        if self.on_online is not None:
            self.on_online()

    def on_lost(self, link: Link) -> None:
        """Look for the server again."""
        self.link = None
        for connection in self._waiting:
            connection.wait(WAIT_ONLINE)
        self._invite()

    def on_restarted(self, link: Link) -> None:
        """Repeat the requests that the restarted server has lost."""
        for connection in self._waiting:
            self._request(connection, link)

    def on_pong(self, link: Link) -> None:
        """Pass the round trip to on_answer_to_ping."""
        if self.on_answer_to_ping is not None and link.mux.round_trip is not None:
            self.on_answer_to_ping(link.mux.round_trip)

    def on_tick(self, now: float) -> None:
        """Enforce the time limits."""
        super().on_tick(now)
        if self.link is not None and now - self.link.heard > LOST_AFTER:
            self.lose(self.link)
        elif self.link is None and now - self._invited > INVITE_AGAIN:
            self._invite()
        for connection in list(self._waiting):
            if now - connection.since >= connection.patience:
                self._refuse(connection, packet.OFFLINE if self.link is None else packet.SILENT)
            elif connection.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                self._refuse(connection, packet.LEFT)
        for talk in [each for each in self._talks if each.deadline <= now]:
            talk.close()
        for port in self._ports:
            port.accept(0)

    def on_stop(self) -> None:
        """Close everything."""
        for port in self._ports:
            port.close()
        for talk in list(self._talks):
            talk.close()
        super().on_stop()
        for connection in list(self._waiting):
            self._refuse(connection, packet.OFFLINE)

    def talk_socks(self, sock: socket.socket) -> None:
        """Negotiate SOCKS5 with a local program to learn its target."""
        if len(self._talks) >= MAX_WAITING:
            sock.close()
            return
        talk = _SocksTalk(self, sock)
        self._talks.add(talk)
        talk.begin()

    def end_talk(self, talk: _SocksTalk) -> None:
        """Forget a finished negotiation."""
        self._talks.discard(talk)


class _OpenPort:
    """A listening socket on the loop."""

    def __init__(
        self, client: ForwardingClient, listener: socket.socket, target: tuple[str, int] | None
    ) -> None:
        self._client, self._listener, self._target = client, listener, target
        client.loop.add(listener, self.accept)

    def accept(self, _: int) -> None:
        """Accept all pending connections. If descriptors run out, the next tick tries again."""
        while True:
            try:
                sock, _address = self._listener.accept()
            except OSError:
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # it may be another host
            if self._target is None:
                self._client.talk_socks(sock)
            else:
                self._client.open(sock, *self._target, lambda _: None)

    def close(self) -> None:
        """Accept no more connections."""
        self._client.loop.remove(self._listener)
        self._listener.close()


class _SocksTalk:
    """A local connection whose SOCKS5 negotiation is not finished."""

    def __init__(self, client: ForwardingClient, sock: socket.socket) -> None:
        self.deadline = time.monotonic() + SOCKS_TIMEOUT
        self._client, self._sock = client, sock
        self._conversation = Conversation(sock, socks5.server())

    def begin(self) -> None:
        """Start reading."""
        self._client.loop.add(self._sock, self._on_ready)
        self._on_ready(0)

    def close(self) -> None:
        """Close the connection."""
        self._leave()
        self._sock.close()

    def _leave(self) -> None:
        self._client.end_talk(self)
        self._client.loop.remove(self._sock)

    def _on_ready(self, _: int) -> None:
        try:
            target = self._conversation.advance()
            if target is not None:
                self._connect(*target)
        except socks5.Refusal as refusal:
            log.info("SOCKS5 request refused: %s", refusal)
            with contextlib.suppress(OSError):
                self._sock.send(refusal.reply)
                # Closing with unread data resets the connection, and the reply may be lost.
                self._sock.recv(MAX_REQUEST)
            self.close()
        except (ProtocolError, OSError) as error:
            log.debug("SOCKS5 negotiation failed: %s", error)
            self.close()

    def _connect(self, host: str, port: int) -> None:
        sock = self._sock

        def answer(reason: int | None) -> None:
            with contextlib.suppress(OSError):
                sock.send(socks5.reply(reason))

        self._leave()
        self._client.open(sock, host, port, answer)
