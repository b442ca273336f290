"""A client's server, played by the test: real sockets, real toxcore, but packets of our making.

toxcore is not on any network here, so what the client says stays in ``Peer.control``, where the
test reads it.
"""

from __future__ import annotations

import queue
import socket
from collections.abc import Iterator
from typing import Callable, TypeVar

import pytest

from ttun.tox import packet, toxcore
from ttun.tox.client import Client
from ttun.tox.loop import Loop
from ttun.tox.protocol import Growth, Peer, Requested
from ttun.tox.toxcore import FriendStatus, Packet, Tox

pytestmark = pytest.mark.tox

T = TypeVar("T")


class Server:
    """What a client's server would be, and one connection that it is asked for."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.answers: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self.resets: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.app, theirs = socket.socketpair()
        self.app.settimeout(20)
        self._do(
            lambda: client.open(
                theirs, "target", 80, self.answers.put, lambda: self.resets.put(None)
            )
        )
        self.start()

    def _do(self, function: Callable[[], T]) -> T:
        """Call function on the client's loop."""
        results: queue.SimpleQueue[T] = queue.SimpleQueue()
        self.client.loop.call(lambda: results.put(function()))
        return results.get(timeout=20)

    def start(self) -> None:
        """Know nothing of what was before."""
        self.peer = Peer(server=True, first_id=0, growth=Growth())

    def is_now(self, connection: int) -> None:
        """Have toxcore report it."""
        (friend,) = self._do(self.client.loop.tox.friends)
        self._do(lambda: self.client.on_event(FriendStatus(friend, connection)))

    def says(self, *packets: bytes) -> None:
        """Have the client receive what waits, and more."""
        waiting = [*self.peer.control, *packets]
        self.peer.control.clear()
        assert self.client.link is not None
        friend = self.client.link.friend

        def receive() -> None:
            for data in waiting:
                self.client.on_event(Packet(friend, data))

        self._do(receive)

    def hears(self) -> list[Requested]:
        """Take what the client says, but for its greeting; return what it asks for."""

        def take() -> list[bytes]:
            assert self.client.link is not None
            said = list(self.client.link.peer.control)
            self.client.link.peer.control.clear()
            return said

        events = [self.peer.receive(data) for data in self._do(take)]
        return [event for event in events if isinstance(event, Requested)]

    def accepts(self, request: Requested) -> None:
        """Open the tunnel, on which the application and the target then talk."""
        tunnel = self.peer.accept(request.forward_id, None)
        assert tunnel is not None
        self.says(self.peer.data(tunnel, b"hello"))
        assert self.answers.get(timeout=20) is None
        assert self.app.recv(10) == b"hello"


@pytest.fixture
def server() -> Iterator[Server]:
    other = Tox(udp_ports=None)
    loop = Loop(Tox(udp_ports=None))
    client = Client(loop, other.address(), None)
    loop.start(client)
    played = Server(client)
    yield played
    loop.stop()
    other.close()
    played.app.close()
    assert loop.error is None


def test_what_was_asked_for_waits_for_a_server_that_starts_afresh(server: Server) -> None:
    server.is_now(toxcore.UDP)
    assert len(server.hears()) == 1
    server.says()
    server.start()
    server.says()  # its second HELLO
    (request,) = server.hears()
    server.accepts(request)


def test_what_was_asked_for_waits_for_a_server_that_was_lost(server: Server) -> None:
    server.is_now(toxcore.UDP)
    assert len(server.hears()) == 1
    server.is_now(toxcore.OFFLINE)
    server.start()
    server.is_now(toxcore.UDP)
    server.says()
    (request,) = server.hears()
    assert (request.host, request.port) == ("target", 80)
    server.accepts(request)


def test_a_refusal_is_told_and_closes_the_connection(server: Server) -> None:
    server.is_now(toxcore.UDP)
    (request,) = server.hears()
    server.peer.deny(request.forward_id, packet.RULE)
    server.says()
    assert server.answers.get(timeout=20) == packet.RULE
    assert server.app.recv(1) == b""


@pytest.mark.parametrize("end", [packet.EOF, packet.TCP_FIN])
def test_an_end_is_told_from_a_reset(server: Server, end: int) -> None:
    server.is_now(toxcore.UDP)
    (request,) = server.hears()
    server.accepts(request)
    (tunnel,) = server.peer.tunnels
    server.app.shutdown(socket.SHUT_WR)
    server.says(packet.pack(end, tunnel))
    assert server.app.recv(1) == b""
    assert server.resets.empty() == (end == packet.EOF)
