"""Friends of a Tox server who repeat, withhold and flood: what they can take from the others."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from friends import FRIEND, OTHER, Friend, listening, port_of, serving  # noqa: F401
from toxnet import on_loop, receive
from tunnel import eventually

from ttun.summary import MOST
from ttun.tox import connecting, packet, protocol, toxcore
from ttun.tox import server as server_module
from ttun.tox.instance import FriendPacket, FriendRequest, FriendStatus
from ttun.tox.packet import MAX_DATA, TCP, pack
from ttun.tox.protocol import FIRST_WINDOW
from ttun.tox.server import ForwardingServer

pytestmark = pytest.mark.tox


def test_what_anybody_may_repeat_does_not_fill_the_log(
    server: ForwardingServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A restart, a target that is refused, a friend request: each was a line, however many came."""
    caplog.set_level(logging.INFO, "ttun")
    friend = Friend(server, FRIEND)
    for _ in range(300):
        friend.mux.request("127.0.0.1", 1, object())
    eventually(lambda: (friend.talk(), len(friend.refusals) == 300)[1], "all are refused")
    server._secret = b"secret"

    def repeat() -> None:
        for _ in range(300):
            server.on_event(FriendPacket(FRIEND, pack(packet.HELLO, 0, b"\1\0")))
            server.on_event(FriendRequest(os.urandom(32), b"x\0"))

    on_loop(server.loop, repeat)
    said = [record.getMessage() for record in caplog.records]
    for what in (" restarted: ", "refused the connection", "ignored: wrong secret"):
        assert 0 < sum(what in line for line in said) <= MOST, what
    server.loop.stop()
    assert "290 more friend requests in the last" in caplog.text, "the rest is counted"


def test_who_is_accepted_and_what_it_says_wrongly_does_not_fill_the_log_either(
    server: ForwardingServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a secret, each new key is a friend; each time one comes online, it may err anew."""
    caplog.set_level(logging.INFO, "ttun")

    def repeat() -> None:
        for _ in range(100):
            server.on_event(FriendRequest(os.urandom(31) + b"\0", b"ttun\0"))
            server.on_event(FriendStatus(FRIEND, toxcore.UDP))
            for _ in range(3):
                server.on_event(FriendPacket(FRIEND, b"nonsense"))
            server.on_event(FriendStatus(FRIEND, toxcore.OFFLINE))

    on_loop(server.loop, repeat)
    said = [record.getMessage() for record in caplog.records]
    for what in (" accepted", "bad packet"):
        assert 0 < sum(what in line for line in said) <= MOST, what
    server.loop.stop()
    assert "90 more friend requests accepted in the last" in caplog.text
    assert "290 more bad packets in the last" in caplog.text


class Names:
    """getaddrinfo(), with names for which nobody answers until the end of the test."""

    SLOW = "slow.invalid"

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.over = threading.Event()
        self._look_up = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", self)

    def __call__(self, host: str, *arguments: Any, flags: int = 0, **options: Any) -> list[Any]:
        if host == self.SLOW and not flags & socket.AI_NUMERICHOST:
            self.over.wait(60)
        return self._look_up(host, *arguments, flags=flags, **options)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Iterator[Names]:
    made = Names(monkeypatch)
    yield made
    made.over.set()


def test_a_friend_whose_names_nobody_answers_for_holds_up_no_other(
    server: ForwardingServer, target: socket.socket, names: Names
) -> None:
    """It had all look-ups, as long as it liked."""
    hostile, other = Friend(server, FRIEND), Friend(server, OTHER)
    for _ in range(500):
        hostile.mux.request(names.SLOW, 1, object())
    hostile.talk()
    for _ in range(100):
        other.mux.request("localhost", port_of(target), object())
    eventually(lambda: (other.talk(), len(other.mux.tunnels) == 100)[1], "the other's tunnels")
    assert not hostile.refusals


def test_a_name_that_nobody_answers_for_is_given_up(
    server: ForwardingServer, names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that waits for its turn, however long the C library waits."""
    monkeypatch.setattr(connecting, "LOOKUP_TIMEOUT", 0.3, raising=False)
    friend = Friend(server, FRIEND)
    for _ in range(100):
        friend.mux.request(names.SLOW, 1, object())
    eventually(lambda: (friend.talk(), len(friend.refusals) == 100)[1], "all answers")
    assert set(friend.refusals) == {packet.NAME}
    assert not server._connector._names


def test_what_one_friend_leaves_unread_resets_no_connection_of_another(
    server: ForwardingServer, target: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had all of the memory, and whoever else had 32 KiB to write lost the connection."""
    monkeypatch.setattr(protocol, "MAX_BUFFERED", 1 << 20)
    target.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    hostile, other = Friend(server, FRIEND), Friend(server, OTHER)
    with contextlib.ExitStack() as stack:
        while True:
            left = (1 << 20) - on_loop(server.loop, lambda: server.growth.buffered)
            if left < 64 << 10:
                break
            tunnel = hostile.open(port_of(target))
            stack.enter_context(target.accept()[0])
            stream = next(each for each in hostile.link.streams.all if each.tunnel.id == tunnel.id)
            stream._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            packets = min(left, FIRST_WINDOW) // MAX_DATA
            hostile.forge(*[pack(TCP, tunnel.id, bytes(MAX_DATA))] * packets)
        good = other.open(port_of(target))
        far = stack.enter_context(target.accept()[0])
        far.settimeout(20)
        data = os.urandom(100 * MAX_DATA)
        pieces = [data[start : start + MAX_DATA] for start in range(0, len(data), MAX_DATA)]
        other.forge(*(pack(TCP, good.id, piece) for piece in pieces))
        assert receive(far, len(data)) == data
        assert len(hostile.link.streams.all) > 1, "no more of them are reset than it takes"


def test_a_friend_that_comes_and_goes_has_no_more_lookups(
    server: ForwardingServer, target: socket.socket, names: Names
) -> None:
    """Each time it came back, it had a new share, while the old lookups went on."""
    hostile = Friend(server, FRIEND)
    for _ in range(connecting.SHARE):
        for _ in range(connecting.MAX_LOOKUPS):
            hostile.mux.request(names.SLOW, 1, object())
        hostile.talk()
        server.loop.call(lambda: server.on_event(FriendStatus(FRIEND, toxcore.OFFLINE)))
        hostile = Friend(server, FRIEND)
    other = Friend(server, OTHER)
    other.mux.request("localhost", port_of(target), object())
    eventually(lambda: (other.talk(), len(other.mux.tunnels) == 1)[1], "the other's tunnel")


def test_a_friend_that_comes_and_goes_does_not_fill_the_log(
    server: ForwardingServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two packets of one byte make toxcore report it offline and online again."""
    caplog.set_level(logging.INFO, "ttun")
    deleted: list[int] = []

    def flap() -> None:
        key = os.urandom(31) + b"\0"
        server.on_event(FriendRequest(key, b"x\0"))
        (friend,) = server.loop.tox.friends()
        monkeypatch.setattr(server.loop.tox, "delete_friend", deleted.append)
        for _ in range(300):
            server.on_event(FriendStatus(friend, toxcore.UDP))
            server.on_event(FriendStatus(friend, toxcore.OFFLINE))
        server._forget()

    on_loop(server.loop, flap)
    said = [record.getMessage() for record in caplog.records]
    assert 0 < sum("connected" in line for line in said) <= MOST
    assert len(deleted) == 1
    server.loop.stop()
    assert "590 more" in caplog.text, "the rest is counted"


def test_a_name_that_cannot_be_one_takes_no_time(server: ForwardingServer) -> None:
    """Python's IDNA encoder took 7 ms of the loop for each: 140 packets a second held up all."""
    friend = Friend(server, FRIEND)
    friend.forge(*[
        pack(packet.REQUESTTUNNEL, 80, packet.U32.pack(number) + b"\xff" * (MAX_DATA - 4))
        for number in range(500)
    ])  # fmt: skip
    assert friend.said.count(packet.DENYTUNNEL) == 500
    assert not server._connector._attempts


def test_of_a_name_with_thousands_of_addresses_a_few_are_tried(
    server: ForwardingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is up to the owner of the name. To 4000 without a route, it took 83 ms of the loop."""
    tried: list[object] = []
    found = [(socket.AF_INET, 1, 6, "", (f"224.0.{i >> 8}.{i & 255}", 9)) for i in range(4000)]
    create = socket.socket

    def look_up(*_: object, flags: int = 0, **__: object) -> list[Any]:
        if flags & socket.AI_NUMERICHOST:
            raise socket.gaierror
        return found

    def count(*arguments: Any) -> socket.socket:
        tried.append(arguments)
        return create(*arguments)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(connecting.socket, "socket", count)
    friend = Friend(server, FRIEND)
    friend.mux.request("many.invalid", 9, object())
    eventually(lambda: (friend.talk(), friend.refusals)[1], "an answer")
    assert friend.refusals == [packet.UNREACHABLE]
    assert 1 < len(tried) < 20


@pytest.fixture
def silent() -> Iterator[tuple[str, int]]:
    """An address that does not answer: the kernel has no room for one more connection there."""
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("127.0.0.2", 0), backlog=0))
        for _ in range(3):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(full.getsockname())
        yield full.getsockname()


def test_a_target_with_an_address_that_does_not_answer_is_reached_at_the_next(
    server: ForwardingServer, silent: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where IPv6 has a default route to nowhere: the first address had all the time."""
    monkeypatch.setattr(connecting, "CONNECT_TIMEOUT", 4.0)
    port = silent[1]
    found = [(socket.AF_INET, 1, 6, "", (host, port)) for host in (silent[0], "127.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    friend = Friend(server, FRIEND)
    with socket.create_server(("127.0.0.1", port)):
        friend.mux.request("two.invalid", port, object())
        eventually(
            lambda: (friend.talk(), friend.refusals or friend.mux.tunnels)[1], "an answer", 30
        )
    assert not friend.refusals


def test_attempts_to_connect_count_as_connections(
    server: ForwardingServer, silent: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight friends whose targets did not answer had all 8192 descriptors; toxcore had none."""
    monkeypatch.setattr(server_module, "MAX_STREAMS", 20)
    friends = [Friend(server, number) for number in (FRIEND, OTHER)]
    for friend in friends:
        for _ in range(15):
            friend.mux.request(*silent, object())
        friend.talk()
    assert len(server._connector._attempts) == 20
    assert friends[0].refusals + friends[1].refusals == [packet.FULL] * 10


@pytest.mark.parametrize("extended", [False, True])
def test_what_targets_do_not_read_takes_no_more_than_so_much_memory(
    server: ForwardingServer, target: socket.socket, monkeypatch: pytest.MonkeyPatch, extended: bool
) -> None:
    """A friend chooses targets that read nothing: 4096 connections with Tuntox had 16 GiB."""
    monkeypatch.setattr(protocol, "MAX_BUFFERED", 1 << 20, raising=False)
    target.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    hostile, other = Friend(server, FRIEND), Friend(server, OTHER)
    hostile.link.mux.extended = extended
    with contextlib.ExitStack() as stack:
        for _ in range(12):
            tunnel = hostile.open(port_of(target))
            stack.enter_context(target.accept()[0])
            stream = next(each for each in hostile.link.streams.all if each.tunnel.id == tunnel.id)
            stream._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            packets = (FIRST_WINDOW if extended else 2 << 20) // MAX_DATA
            hostile.forge(*[pack(TCP, tunnel.id, bytes(MAX_DATA))] * packets)
        eventually(lambda: server.growth.buffered <= 1 << 20, "no more than that")

        def count() -> tuple[int, int]:
            streams = hostile.link.streams.all
            counts = [sum(map(len, stream._buffer)) for stream in streams]
            return sum(counts), server.growth.buffered

        buffered, counted = on_loop(server.loop, count)
        assert buffered == counted
        good = other.open(port_of(target))
        with target.accept()[0] as far:
            other.forge(pack(TCP, good.id, b"still here"))
            far.settimeout(20)
            assert far.recv(100) == b"still here"
        on_loop(server.loop, hostile.link.drop)
        assert server.growth.buffered == 0
