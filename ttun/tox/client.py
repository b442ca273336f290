"""The client: finds the server, keeps finding it, and asks it for tunnels.

1. A friend request goes to the server, with the secret. It is repeated as a new one when nothing
   came of it within 45 seconds.
2. The server is online: what waited is requested.
3. Nothing was heard of it for 35 seconds though it was pinged, or toxcore says that it is gone:
   all streams end, and the search begins anew. Listening ports stay; connections made there
   meanwhile wait, and so do those whose request was not answered yet.
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
from ttun.tox import packet, protocol, socks5
from ttun.tox.forwarder import Forwarder, Link
from ttun.tox.loop import Loop
from ttun.tox.stream import Stream

log = logging.getLogger("ttun")

INVITE_AGAIN = 45.0  # seconds
# Seconds without a packet, pinged every five. toxcore gives up after 32 (friend_connection.h), and
# meanwhile goes on over a relay where UDP came to an end.
LOST_AFTER = 35.0
WAIT_ONLINE = 60.0  # seconds that a connection waits for the server to come online
WAIT_ANSWER = 30.0  # seconds that it waits for the tunnel; the original refuses by silence
WAIT_MOST = 120.0  # seconds for both together, also if the server comes and goes
MAX_WAITING = 1024
MAX_REQUEST = 1024  # bytes; more than SOCKS has in one
SOCKS_TIMEOUT = 30.0  # seconds for the whole SOCKS5 conversation

GREETING = b"ttun\0"

Answer = Callable[["int | None"], None]  # None: the tunnel is open; else why not


@dataclass(eq=False)
class _Wish:
    """A connection that waits for its tunnel."""

    sock: socket.socket
    host: str
    port: int
    answer: Answer
    on_reset: Callable[[], None] | None
    since: float
    patience: float = WAIT_ONLINE
    forward_id: int = -1  # of the request, once there is one

    def wait(self, seconds: float) -> None:
        """Be patient for so many seconds from now on."""
        self.patience = min(time.monotonic() - self.since + seconds, WAIT_MOST)


class Client(Forwarder):
    """Reaches one server. address: its 38 bytes. on_online is called when it is there."""

    def __init__(self, loop: Loop, address: bytes, secret: bytes | None) -> None:
        """Send the first friend request. Raises TtunError for an address that cannot be."""
        super().__init__(loop)
        self._address = address
        self._message = GREETING if secret is None else secret + b"\0"
        self._wishes: set[_Wish] = set()
        self._listeners: list[_Listener] = []
        self._talks: set[_SocksTalk] = set()
        self.link: Link | None = None
        self.on_online: Callable[[], None] | None = None
        self.on_answer_to_ping: Callable[[float], None] | None = None
        self._invite()

    def listen(self, listener: socket.socket, target: tuple[str, int] | None) -> None:
        """Forward what connects to a listening socket: to target, or where SOCKS5 says."""
        self._listeners.append(_Listener(self, listener, target))

    def open(
        self,
        sock: socket.socket,
        host: str,
        port: int,
        answer: Answer,
        on_reset: Callable[[], None] | None = None,
    ) -> None:
        """Take over a socket and connect it to a target.

        answer is told how that went; on_reset is called if what was opened is reset later.
        """
        wish = _Wish(sock, host, port, answer, on_reset, time.monotonic())
        if len(self._wishes) >= MAX_WAITING:
            self._refuse(wish, packet.FULL)
            return
        self._wishes.add(wish)
        if self.link is not None:
            self._request(wish, self.link)

    def _request(self, wish: _Wish, link: Link) -> None:
        wish.wait(WAIT_ANSWER)
        wish.forward_id = link.peer.request(wish.host, wish.port, wish)

    def on_answered(self, link: Link, answer: protocol.Opened | protocol.Denied) -> None:
        """The server has connected us to a target, or says why not."""
        wish = answer.owner
        assert isinstance(wish, _Wish)
        if isinstance(answer, protocol.Opened):
            self._wishes.discard(wish)
            wish.answer(None)
            Stream(link, wish.sock, answer.tunnel, wish.on_reset)
        else:
            self._refuse(wish, answer.reason)

    def _refuse(self, wish: _Wish, reason: int) -> None:
        self._wishes.discard(wish)
        if self.link is not None:
            self.link.peer.cancel(wish.forward_id)
        log.info("%s:%d: %s", wish.host, wish.port, packet.REASONS.get(reason, reason))
        wish.answer(reason)
        wish.sock.close()

    def ping(self) -> None:
        """Ping the server now; on_answer_to_ping is told the seconds. It must be online."""
        if self.link is not None:
            self.link.pinged = 0.0
            super().on_tick(time.monotonic())

    def _invite(self) -> None:
        """Make the server a friend, anew if it is one already: that sends a new request."""
        for friend in self.loop.tox.friends():
            self.loop.tox.delete_friend(friend)
        self.loop.tox.add_friend(self._address, self._message)
        self._invited = time.monotonic()
        log.info("looking for %s", self._address.hex()[:8].upper())

    def on_link(self, link: Link) -> None:
        """The server is online: ask it for what waited."""
        self.link = link
        for wish in list(self._wishes):
            self._request(wish, link)
        if self.on_online is not None:
            self.on_online()

    def on_lost(self, link: Link) -> None:
        """The server is gone: look for it anew."""
        self.link = None
        for wish in self._wishes:
            wish.wait(WAIT_ONLINE)
        self._invite()

    def on_restarted(self, link: Link) -> None:
        """The server knows nothing of what it was asked for: ask it again."""
        for wish in self._wishes:
            self._request(wish, link)

    def on_pong(self, link: Link, seconds: float) -> None:
        """Take the answer to a PING."""
        super().on_pong(link, seconds)
        if self.on_answer_to_ping is not None:
            self.on_answer_to_ping(seconds)

    def on_tick(self, now: float) -> None:
        """See who takes too long."""
        super().on_tick(now)
        if self.link is not None and now - self.link.heard > LOST_AFTER:
            self.lose(self.link)
        elif self.link is None and now - self._invited > INVITE_AGAIN:
            self._invite()
        for wish in list(self._wishes):
            if now - wish.since >= wish.patience:
                self._refuse(wish, packet.OFFLINE if self.link is None else packet.SILENT)
            elif wish.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                self._refuse(wish, packet.LEFT)
        for talk in [each for each in self._talks if each.deadline <= now]:
            talk.close()
        for listener in self._listeners:
            listener.accept(0)

    def on_stop(self) -> None:
        """Close everything."""
        for listener in self._listeners:
            listener.close()
        for talk in list(self._talks):
            talk.close()
        super().on_stop()
        for wish in list(self._wishes):
            self._refuse(wish, packet.OFFLINE)

    def talk_socks(self, sock: socket.socket) -> None:
        """Have a local program say in SOCKS5 where it wants to go."""
        if len(self._talks) >= MAX_WAITING:
            sock.close()
            return
        talk = _SocksTalk(self, sock)
        self._talks.add(talk)
        talk.begin()

    def end_talk(self, talk: _SocksTalk) -> None:
        """Forget a conversation that is over."""
        self._talks.discard(talk)


class _Listener:
    """A listening socket on the loop."""

    def __init__(
        self, client: Client, listener: socket.socket, target: tuple[str, int] | None
    ) -> None:
        self._client, self._listener, self._target = client, listener, target
        client.loop.add(listener, self.accept)

    def accept(self, _: int) -> None:
        """Take all that wait. Out of descriptors the rest waits for the next tick."""
        while True:
            try:
                sock, _address = self._listener.accept()
            except OSError:
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._target is None:
                self._client.talk_socks(sock)
            else:
                self._client.open(sock, *self._target, lambda _: None)

    def close(self) -> None:
        """Take nobody any more."""
        self._client.loop.remove(self._listener)
        self._listener.close()


class _SocksTalk:
    """A local connection that has not said yet where it wants to go."""

    def __init__(self, client: Client, sock: socket.socket) -> None:
        self.deadline = time.monotonic() + SOCKS_TIMEOUT
        self._client, self._sock = client, sock
        self._conversation = Conversation(sock, socks5.server())

    def begin(self) -> None:
        """Listen to it."""
        self._client.loop.add(self._sock, self._on_ready)
        self._on_ready(0)

    def close(self) -> None:
        """Hang up."""
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
            log.info("SOCKS5: %s", refusal)
            with contextlib.suppress(OSError):
                self._sock.send(refusal.reply)
                # What is not read when a socket is closed resets it, and may cost the answer.
                self._sock.recv(MAX_REQUEST)
            self.close()
        except (ProtocolError, OSError) as error:
            log.debug("SOCKS5: %s", error)
            self.close()

    def _connect(self, host: str, port: int) -> None:
        sock = self._sock

        def answer(reason: int | None) -> None:
            with contextlib.suppress(OSError):
                sock.send(socks5.reply(reason))

        self._leave()
        self._client.open(sock, host, port, answer)
