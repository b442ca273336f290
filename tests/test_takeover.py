"""``--takeover``: only an authenticated client replaces the connected one."""

from __future__ import annotations

import time

import pytest
from peer import Peer
from strangers import STRANGERS, arrive, client_gets_in, connect, vanished
from tunnel import CLIENT, SERVER, TUNNEL4, Bench, End, eventually

pytestmark = pytest.mark.hosts


def takeover_tunnel(bench: Bench) -> tuple[End, End]:
    """A server with --takeover, and a client."""
    server, client = bench.server("--takeover"), bench.client()
    client.says("authenticated")
    return server, client


def is_gone(peer: Peer) -> bool:
    """Read the rest; return whether the server has closed the connection."""
    try:
        while peer.sock.recv(65536):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True


def test_a_new_client_takes_over_at_once(plain: Bench) -> None:
    server = plain.server("--takeover")
    first = arrive(plain)
    started = time.monotonic()
    second = arrive(plain)
    assert time.monotonic() - started < 5, "0.05 s are usual"
    assert is_gone(first)
    name = "{}:{}".format(*second.sock.getsockname())
    assert f"{name} took over; uplink" in server.log()
    assert server.log().count("another client can take over") == 2
    second.sock.close()
    assert "the peer closed the connection" in server.says("disconnected", times=2)


def test_many_take_over_and_nothing_is_left_of_them(plain: Bench) -> None:
    server = plain.server("--takeover")
    peers = [arrive(plain)]
    before = server.usage()[:2]
    for _ in range(30):
        peers.append(arrive(plain))
    assert all(is_gone(peer) for peer in peers[:-1])
    eventually(
        lambda: server.usage()[:2] == before,
        "as many descriptors and threads as with one",
    )
    for peer in peers:
        peer.sock.close()


def test_two_that_arrive_together_leave_one(plain: Bench) -> None:
    """The second authenticates while the session of the first is being ended."""
    server = plain.server("--takeover")
    first = arrive(plain)
    peers = [Peer(connect(plain), b"secret") for _ in range(10)]
    for peer in peers:
        peer.nonces_as_client()
    for peer in peers:
        peer.send(b"TTUN/v1\0")
    eventually(lambda: sum(not is_gone_now(peer) for peer in peers) == 1, "one is left")
    assert is_gone(first)
    first = arrive(plain)
    assert "internal error" not in server.log()


def is_gone_now(peer: Peer) -> bool:
    peer.sock.settimeout(0.2)
    return is_gone(peer)


def test_nobody_without_the_key_touches_the_session(plain: Bench) -> None:
    server, _ = takeover_tunnel(plain)
    silent = [connect(plain) for _ in range(300)]
    for data, _ in STRANGERS.values():
        with connect(plain) as sock:
            sock.sendall(data)
    stranger = Peer(connect(plain), b"another key")
    stranger.nonces_as_client()
    stranger.send(b"TTUN/v1\0")
    assert plain.ping(CLIENT, TUNNEL4[SERVER], 20) == 20
    assert "disconnected" not in server.log()
    assert stranger.sock.recv(1) == b"", "it was shown the door"
    for sock in silent:
        sock.close()


@pytest.mark.nft
def test_a_client_that_changed_networks_is_back_before_the_old_connection_is_dead(
    plain: Bench,
) -> None:
    """The first client vanishes; the same key from another address is accepted."""
    server, first = takeover_tunnel(plain)
    plain.answers()
    with vanished(plain, first):
        client_gets_in(plain)
        assert "192.0.2.77" in server.says("took over")


def test_it_stops_within_a_second_and_ends_with_its_device(plain: Bench) -> None:
    server = plain.server("--takeover")
    peers = [arrive(plain)]
    started = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - started < 3, "0.1 s are usual"
    server = plain.server("--takeover")
    peers.append(arrive(plain))
    plain.run(SERVER, "ip", "link", "delete", "ttun0")
    assert server.ended() == 1
    assert "was ttun0 removed?" in server.log().splitlines()[-1]
    assert peers[-1].sock.fileno() >= 0, "it had not left by itself"
