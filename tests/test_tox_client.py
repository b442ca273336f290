"""A client's server, played by the test: real sockets, real toxcore, but packets of our making.

toxcore is not on any network here, so what the client says stays in ``Multiplexer.control``, where
the test reads it.
"""

from __future__ import annotations

import functools
import queue
import socket
import time
from collections.abc import Iterator
from typing import Any, Callable, TypeVar

import pytest
from toxnet import on_loop, reset
from tunnel import eventually

from ttun.tox import client as tox_client
from ttun.tox import instance, packet, protocol, toxcore
from ttun.tox.client import ForwardingClient
from ttun.tox.instance import FriendPacket, FriendStatus, Tox
from ttun.tox.loop import TICK, Loop
from ttun.tox.protocol import Growth, Multiplexer, Requested
from ttun.tox.stream import Stream

pytestmark = pytest.mark.tox

T = TypeVar("T")


class Server:
    """What a client's server would be, and one connection that it is asked for."""

    def __init__(self, client: ForwardingClient) -> None:
        self.client = client
        self.answers: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self.resets: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.app, theirs = socket.socketpair()
        self.app.settimeout(20)
        self.asks(theirs)
        self.start()

    def asks(self, sock: socket.socket) -> None:
        """Have the client ask for a connection."""
        on_reset = functools.partial(self.resets.put, None)
        self._do(lambda: self.client.open(sock, "target", 80, self.answers.put, on_reset))

    def streams(self) -> set[Stream]:
        """What the client forwards."""
        assert self.client.link is not None
        return self.client.link.streams.all

    def _do(self, function: Callable[[], T]) -> T:
        return on_loop(self.client.loop, function)

    def start(self) -> None:
        """Know nothing of what was before."""
        self.mux = Multiplexer(server=True, first_id=0, growth=Growth())

    def is_now(self, connection: int) -> None:
        """Have toxcore report it."""
        (friend,) = self._do(self.client.loop.tox.friends)
        self._do(lambda: self.client.on_event(FriendStatus(friend, connection)))

    def says(self, *packets: bytes) -> None:
        """Have the client receive what waits, and more."""
        waiting = [*self.mux.control, *packets]
        self.mux.control.clear()
        assert self.client.link is not None
        friend = self.client.link.friend

        def receive() -> None:
            for data in waiting:
                self.client.on_event(FriendPacket(friend, data))

        self._do(receive)

    def hears(self) -> list[Requested]:
        """Take what the client says, but for its greeting; return what it asks for."""

        def take() -> list[bytes]:
            assert self.client.link is not None
            said = list(self.client.link.mux.control)
            self.client.link.mux.control.clear()
            return said

        events = [self.mux.receive(data) for data in self._do(take)]
        return [event for event in events if isinstance(event, Requested)]

    def accepts(self, request: Requested) -> None:
        """Open the tunnel, on which the application and the target then talk."""
        tunnel = self.mux.accept(request.forward_id, None)
        assert tunnel is not None
        self.says(self.mux.data(tunnel, b"hello"))
        assert self.answers.get(timeout=20) is None
        assert self.app.recv(10) == b"hello"


@pytest.fixture
def server() -> Iterator[Server]:
    other = Tox(udp_ports=None)
    loop = Loop(Tox(udp_ports=None))
    client = ForwardingClient(loop, other.address(), None)
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


def test_an_application_that_has_vanished_is_noticed(server: Server) -> None:
    """Where -L listens for other hosts, one may lose its power while nothing is to be said."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = server.client
        on_loop(client.loop, lambda: client.listen(listener.dup(), ("target", 80)))
        with socket.create_connection(listener.getsockname()) as app:

            def find() -> socket.socket | None:
                socks = (each.sock for each in list(client._waiting))
                name = app.getsockname()
                tcp = (each for each in socks if each.family == socket.AF_INET)
                return next((each for each in tcp if each.getpeername() == name), None)

            waiting = eventually(find, "its connection")
            assert waiting.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_what_comes_before_toxcore_tells_of_the_server_is_heard(server: Server) -> None:
    """Its HELLO: else this client takes it for Tuntox, and the end of its input ends all."""
    (friend,) = on_loop(server.client.loop, server.client.loop.tox.friends)
    hello = server.mux.control.popleft()
    on_loop(server.client.loop, lambda: server.client.on_event(FriendPacket(friend, hello)))
    server.is_now(toxcore.UDP)
    (request,) = server.hears()
    server.accepts(request)
    (stream,) = server.streams()
    assert stream.tunnel.extended
    server.app.shutdown(socket.SHUT_WR)
    time.sleep(3 * TICK)
    assert server.streams() == {stream}, "the other half is still open"


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
    server.mux.deny(request.forward_id, packet.RULE)
    server.says()
    assert server.answers.get(timeout=20) == packet.RULE
    assert server.app.recv(1) == b""


@pytest.mark.parametrize(
    ("ends", "resets"),
    [([packet.EOF], 0), ([packet.TCP_FIN], 1), ([packet.EOF, packet.TCP_FIN], 0)],
)
def test_an_end_is_told_from_a_reset(server: Server, ends: list[int], resets: int) -> None:
    server.is_now(toxcore.UDP)
    (request,) = server.hears()
    server.accepts(request)
    (tunnel,) = server.mux.tunnels
    server.app.shutdown(socket.SHUT_WR)
    server.says(*(packet.pack(end, tunnel) for end in ends))
    assert server.app.recv(1) == b""
    eventually(lambda: not server.streams(), "the stream is closed")
    assert server.resets.qsize() == resets


def test_more_than_is_kept_for_the_original_is_a_reset(server: Server) -> None:
    server.is_now(toxcore.UDP)
    (request,) = server.hears()
    server.mux.control.clear()  # no HELLO: it knows no windows
    server.accepts(request)
    (tunnel,) = server.mux.tunnels
    data = packet.pack(packet.TCP, tunnel, bytes(packet.MAX_DATA))
    server.says(*[data] * (2 * protocol.BUFFER // packet.MAX_DATA))
    while server.app.recv(1 << 20):
        pass
    assert server.resets.qsize() == 1


def test_a_server_that_comes_and_goes_is_not_waited_for_without_end(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tox_client, "WAIT_MOST", 1.0)
    server.is_now(toxcore.UDP)

    def refused() -> bool:
        server.is_now(toxcore.OFFLINE)
        server.is_now(toxcore.UDP)
        return not server.answers.empty()

    eventually(refused, "a refusal", 20)
    assert server.answers.get() in (packet.SILENT, packet.OFFLINE)


def test_a_server_that_is_silent_is_given_up_after_toxcore_would_have(server: Server) -> None:
    """FRIEND_CONNECTION_TIMEOUT of toxcore (friend_connection.h) is 32 seconds."""
    server.is_now(toxcore.UDP)
    link = server.client.link
    assert link is not None
    for seconds, is_there in ((33, True), (60, False)):
        link.heard = time.monotonic() - seconds
        time.sleep(3 * TICK)
        assert (server.client.link is link) == is_there


def test_who_hangs_up_before_the_answer_is_waited_for_no_more(server: Server) -> None:
    server.is_now(toxcore.UDP)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        app = socket.create_connection(listener.getsockname())
        server.asks(listener.accept()[0])
    reset(app)
    assert server.answers.get(timeout=20) == packet.LEFT
    mine, others = server.hears()
    for request in (others, mine):
        assert server.mux.accept(request.forward_id, None) is not None
    server.says()
    assert len(server.streams()) == 1, "the other's was cancelled"


@pytest.mark.parametrize(
    ("request_", "answer"),
    [
        (b"\4\1\0\x50\1\2\3\4me\0", b"\0\x5b" + bytes(6)),
        (b"\5\1\2and what it sends without waiting", b"\5\xff"),
    ],
)
def test_a_socks_client_that_is_refused_reads_why(
    server: Server, request_: bytes, answer: bytes
) -> None:
    """All that it sent is read first: else the kernel resets the connection, answer or not."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        on_loop(server.client.loop, lambda: server.client.listen(listener, None))
        with socket.create_connection(listener.getsockname()) as app:
            app.settimeout(20)
            app.sendall(request_)
            assert app.recv(100) == answer
            assert app.recv(1) == b"", "an end, no reset"


def test_a_socks_client_that_says_nothing_is_given_up(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tox_client, "SOCKS_TIMEOUT", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        on_loop(server.client.loop, lambda: server.client.listen(listener, None))
        with socket.create_connection(listener.getsockname()) as app:
            app.settimeout(20)
            app.sendall(b"\5")
            assert app.recv(1) == b""


def test_a_client_takes_any_port_and_a_server_one_that_is_looked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ports: list[int] = []

    def record(**options: Any) -> object:
        ports.append(options["udp_ports"][0])
        return object()

    monkeypatch.setattr(instance, "Tox", record)
    for server in (True, False):
        ports.clear()
        for _ in range(100):
            instance.open_tox(None, 0, None, server=server)
        assert all(33445 <= port <= 33545 for port in ports) == server
