"""A server's friends, played by the test: real sockets, real toxcore, but packets of our making.

toxcore is not on any network here, so what the server says stays in ``Multiplexer.control``, where
the test reads it.
"""

from __future__ import annotations

import contextlib
import resource
import socket
import struct
import threading
import time
from typing import Any

import pytest
from friends import FRIEND, OTHER, Friend, listening, offline_tox, port_of, serving  # noqa: F401
from toxnet import reset
from tunnel import eventually

from ttun.tox import packet, protocol, toxcore
from ttun.tox import server as server_module
from ttun.tox.instance import FriendRequest, FriendStatus
from ttun.tox.loop import Loop
from ttun.tox.packet import MAX_DATA, TCP, pack
from ttun.tox.protocol import FIRST_WINDOW
from ttun.tox.server import ForwardingServer

pytestmark = pytest.mark.tox


def test_a_friend_that_left_may_come_back_but_where_it_was_is_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """toxcore takes no packet of another friend from where it still looks for one that left."""
    loop = Loop(offline_tox())
    server = ForwardingServer(loop)
    forgotten: list[int] = []
    delete = loop.tox.delete_friend
    monkeypatch.setattr(loop.tox, "delete_friend", lambda n: (forgotten.append(n), delete(n)))
    keys = []
    for _ in range(3):
        other = offline_tox()
        keys.append(other.address()[: toxcore.PUBLIC_KEY_SIZE])
        other.close()
        server.on_event(FriendRequest(keys[-1], b"ttun\0"))
    left, flapping, online = loop.tox.friends()
    for friend in (left, flapping, online):
        server.on_event(FriendStatus(friend, toxcore.UDP))
    for friend in (left, flapping):
        server.on_event(FriendStatus(friend, toxcore.OFFLINE))
    server.on_event(FriendStatus(flapping, toxcore.UDP))
    server.on_tick(time.monotonic())
    assert forgotten == [left]
    assert sorted(map(loop.tox.friend_key, loop.tox.friends())) == sorted(keys)
    server.on_tick(time.monotonic())
    assert forgotten == [left]
    loop.start(server)
    loop.stop()


def test_of_friends_that_do_not_come_the_last_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """None is forgotten before the tick: its number could be another's in the same round."""
    monkeypatch.setattr(server_module, "MAX_FRIENDS", 2)
    loop = Loop(offline_tox())
    server = ForwardingServer(loop)
    keys = []
    for count in (1, 2, 3, 4, 4):
        other = offline_tox()
        keys.append(other.address()[: toxcore.PUBLIC_KEY_SIZE])
        other.close()
        server.on_event(FriendRequest(keys[-1], b"ttun\0"))
        assert len(loop.tox.friends()) == count
    server.on_tick(time.monotonic())
    assert [loop.tox.friend_key(friend) for friend in loop.tox.friends()] == keys[2:4]
    loop.start(server)
    loop.stop()


def test_a_friend_cannot_touch_the_tunnel_of_another(
    server: ForwardingServer, target: socket.socket
) -> None:
    victim, attacker = Friend(server, FRIEND), Friend(server, OTHER)
    tunnel = victim.open(port_of(target))
    with target.accept()[0] as far:
        for kind, body in ((TCP, b"forged"), (packet.TCP_FIN, b""), (packet.EOF, b"")):
            attacker.forge(*(pack(kind, number, body) for number in range(65536)))
        victim.forge(pack(TCP, tunnel.id, b"genuine"))
        far.settimeout(20)
        assert far.recv(100) == b"genuine"
    assert packet.TCP_FIN not in attacker.said


def test_who_sends_more_than_its_window_loses_that_tunnel_alone(
    server: ForwardingServer, target: socket.socket
) -> None:
    friend = Friend(server, FRIEND)
    greedy, good = friend.open(port_of(target)), friend.open(port_of(target))
    with target.accept()[0], target.accept()[0] as far:
        flood = [pack(TCP, greedy.id, bytes(MAX_DATA))] * (64 * FIRST_WINDOW // MAX_DATA)
        friend.forge(*flood)
        friend.talk()
        assert greedy.id not in friend.mux.tunnels
        friend.forge(pack(TCP, good.id, b"still here"))
        far.settimeout(20)
        assert far.recv(100) == b"still here"


def test_a_reset_shows_though_the_window_is_full(
    server: ForwardingServer, target: socket.socket
) -> None:
    friend = Friend(server, FRIEND)
    friend.open(port_of(target))
    next(iter(friend.link.streams.all)).tunnel.send_window = 0
    far = target.accept()[0]
    reset(far)
    eventually(lambda: (friend.talk(), packet.TCP_FIN in friend.said)[1], "its end")


def test_a_window_of_small_packets_takes_no_more_memory_than_one_of_large_ones(
    server: ForwardingServer, target: socket.socket
) -> None:
    target.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    friend = Friend(server, FRIEND)
    tunnel = friend.open(port_of(target))
    with target.accept()[0]:
        stream = next(iter(friend.link.streams.all))
        stream._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        friend.forge(*[pack(TCP, tunnel.id, b"x")] * (FIRST_WINDOW // 2))
        assert len(stream._buffer) < 4 * FIRST_WINDOW // MAX_DATA


def test_a_target_that_has_vanished_is_noticed(
    server: ForwardingServer, target: socket.socket
) -> None:
    """One that lost its power took one of 1024 connections for good, if nothing was to be said."""
    Friend(server, FRIEND).open(port_of(target))
    (stream,) = server.links[FRIEND].streams.all
    assert stream._sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_a_storm_of_requests_is_refused_beyond_the_bound(
    server: ForwardingServer, target: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "MAX_TUNNELS", 20)
    storm, other = Friend(server, FRIEND), Friend(server, OTHER)
    for _ in range(200):
        storm.mux.request("127.0.0.1", port_of(target), object())
    storm.talk()
    eventually(lambda: (storm.talk(), len(storm.link.streams.all) == 20)[1], "all that it may have")
    assert storm.refusals == [packet.FULL] * 180
    other.open(port_of(target))


def test_streams_that_outlive_their_tunnels_are_counted(
    server: ForwardingServer, target: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose target does not read may not collect buffers by closing the tunnels before them."""
    monkeypatch.setattr(protocol, "MAX_TUNNELS", 3)
    friend = Friend(server, FRIEND)
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            tunnel = friend.open(port_of(target))
            stack.enter_context(target.accept()[0])
            window = [pack(TCP, tunnel.id, bytes(MAX_DATA))] * (FIRST_WINDOW // MAX_DATA)
            stream = next(each for each in friend.link.streams.all if each.tunnel.id == tunnel.id)
            stream._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            friend.forge(*window, pack(packet.TCP_FIN, tunnel.id))
            friend.mux.forget(tunnel)
        friend.mux.request("127.0.0.1", port_of(target), "one more")
        eventually(lambda: (friend.talk(), friend.refusals)[1], "an answer")
        assert friend.refusals == [packet.FULL]


def test_connections_to_a_name_at_once_are_all_made(
    server: ForwardingServer, target: socket.socket
) -> None:
    """More than are looked up at once; under load some of 200 were refused."""
    friend = Friend(server, FRIEND)
    for _ in range(200):
        friend.mux.request("localhost", port_of(target), object())
    eventually(lambda: (friend.talk(), len(friend.mux.tunnels) == 200)[1], "all tunnels", 30)
    assert not friend.refusals


def test_names_of_a_friend_that_started_afresh_are_not_looked_up(server: ForwardingServer) -> None:
    friend = Friend(server, FRIEND)
    for _ in range(4):
        for _ in range(protocol.MAX_TUNNELS):
            friend.mux.request("name.invalid", 1, object())
        friend.mux.control.append(pack(packet.HELLO, 0, b"\1\0"))
        friend.talk()
    assert len(server._connector._names) <= protocol.MAX_TUNNELS


def test_a_name_that_is_found_after_its_friend_started_afresh_is_not_connected_to(
    server: ForwardingServer, target: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_be_found, look_up = threading.Event(), socket.getaddrinfo

    def slow(*arguments: Any, flags: int, **options: Any) -> list[Any]:
        if not flags & socket.AI_NUMERICHOST:
            may_be_found.wait(20)
        return look_up(*arguments, flags=flags, **options)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    friend = Friend(server, FRIEND)
    friend.mux.request("localhost", port_of(target), object())
    friend.talk()
    friend.forge(pack(packet.HELLO, 0, b"\1\0"))
    may_be_found.set()
    eventually(lambda: server._connector._lookups == 0, "the end of the look-up")
    target.settimeout(1)
    with pytest.raises(TimeoutError):
        target.accept()


def test_a_name_is_refused_where_there_are_no_threads(
    server: ForwardingServer, target: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    friend = Friend(server, FRIEND)
    with monkeypatch.context() as context:
        context.setattr(threading.Thread, "start", no_thread)
        friend.mux.request("localhost", 1, "owner")
        friend.talk()
        assert friend.refusals == [packet.FULL]
    friend.open(target.getsockname()[1])


@pytest.mark.parametrize("host", ["a" * 64, "a..b", ".", "ä"])
def test_a_name_that_cannot_be_one_is_refused_and_ends_nothing(
    server: ForwardingServer, host: str
) -> None:
    """getaddrinfo() raises UnicodeError for these, no OSError: any friend could end the server."""
    friend = Friend(server, FRIEND)
    friend.mux.request(host, 1, object())
    eventually(lambda: (friend.talk(), friend.refusals)[1], "an answer")
    assert friend.refusals == [packet.NAME]


def no_thread(_: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_a_target_inside_is_refused_where_there_are_no_descriptors() -> None:
    loop = Loop(offline_tox())
    server = ForwardingServer(loop, targets={("127.0.0.1", 20203): lambda sock, _: False})
    loop.start(server)
    friend = Friend(server, FRIEND)
    friend.mux.request("127.0.0.1", 20203, object())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        friend.talk()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert friend.refusals == [packet.FULL]
    loop.stop()
    assert loop.error is None


@pytest.mark.parametrize(
    "data", [struct.pack(">d", value) for value in (float("-inf"), float("nan"), -1e9, 1e18)]
)
def test_a_forged_pong_says_nothing_about_the_round_trip(
    server: ForwardingServer, data: bytes
) -> None:
    friend = Friend(server, FRIEND)
    friend.forge(pack(packet.PONG, 0, struct.pack(">d", time.monotonic() - 0.5)))
    assert friend.link.mux.round_trip == pytest.approx(0.5, abs=0.4)
    before = friend.link.mux.round_trip
    friend.forge(pack(packet.PONG, 0, data))
    assert friend.link.mux.round_trip == before
