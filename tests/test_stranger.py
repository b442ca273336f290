"""Active probing of a server that accepts only x1: no answer, a close at a random time."""

from __future__ import annotations

import contextlib
import selectors
import socket
import time

import pytest
from peer import X1Peer
from strangers import connect
from tunnel import CLIENT, Bench

from ttun.tcp import network

SIZES = [0, 1, 15, 16, 17, 18, 100, 100_000]


def watch(socks: list[socket.socket], seconds: float) -> list[tuple[float, bytes]]:
    """Read from all until they close, for at most so long: time of close, and data."""
    started, seen = time.monotonic(), {sock: (float("inf"), b"") for sock in socks}
    with selectors.DefaultSelector() as selector:
        for sock in socks:
            selector.register(sock, selectors.EVENT_READ)
        while selector.get_map() and (left := started + seconds - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                sock = next(sock for sock in socks if sock is key.fileobj)
                data = b""
                with contextlib.suppress(ConnectionError):
                    data = sock.recv(100)
                end = float("inf") if data else time.monotonic() - started
                seen[sock] = end, seen[sock][1] + data
                if not data:
                    selector.unregister(sock)
    return [seen[sock] for sock in socks]


@pytest.mark.hosts
@pytest.mark.slow
def test_a_stranger_sees_a_port_that_never_answers(plain: Bench) -> None:
    """Two of each kind, without a session and during one: no byte, no end within 10 s, a random
    end within 60 s, also for whoever has said that no more comes.
    """
    server = plain.server("--wire", "x1")
    for session in (False, True):
        if session:
            plain.client("--wire", "x1").says("authenticated")
        kinds = [(size, closes) for size in SIZES for closes in (False, True)]
        socks = [connect(plain) for _ in kinds]
        for (size, closes), sock in zip(kinds, socks):
            sock.sendall(bytes(size))
            if closes:
                sock.shutdown(socket.SHUT_WR)
        seen = watch(socks, 65)
        print({kind: round(end, 1) for kind, (end, _) in zip(kinds, seen)})
        assert all(got == b"" for _, got in seen), seen
        ends = [end for end, _ in seen]
        assert all(9 <= end <= 64 for end in ends)
        assert max(ends) - min(ends) > 10, "at different times"
        for sock in socks:
            sock.close()
    assert server.log().count("authenticated") == 1


@pytest.mark.hosts
def test_a_recorded_mark_gets_no_answer_and_a_client_still_gets_in(plain: Bench) -> None:
    server = plain.server("--wire", "x1")
    with connect(plain) as first:
        peer = X1Peer(first)
        nonce = peer.marked(0)
        first.sendall(nonce)
        assert len(peer.exactly(16)) == 16
    with connect(plain) as again:
        again.sendall(nonce)
        again.settimeout(3)
        with contextlib.suppress(TimeoutError):
            assert again.recv(16) == b"never"
        client = plain.client("--wire", "x1")
        client.says("authenticated")
    assert "different pre-shared key" in server.log()


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False),
        ("2001:db8:1:2::1", "2001:db8:1:2:ffff::1", True),
        ("2001:db8:1:2::1", "2001:db8:1:3::1", False),
        ("fe80::1%eth0", "fe80::2%eth0", True),
        ("tox-ab", "tox-ab", True),
        ("tox-ab", "tox-cd", False),
    ],
)
def test_an_ipv6_network_counts_as_one_address(one: str, other: str, same: bool) -> None:
    assert (network(one) == network(other)) is same


@pytest.mark.hosts
def test_many_addresses_of_one_ipv6_network_are_one(plain: Bench) -> None:
    """Each once could have 64 connections."""
    server = plain.server()
    for number in range(2, 8):
        plain.run(CLIENT, "ip", "address", "add", f"2001:db8::{number:x}00/64", "dev", "vclient",
                  "nodad")  # fmt: skip
    try:
        socks = []
        for number in range(2, 8):
            source = (f"2001:db8::{number:x}00", 0)
            socks += plain.on(
                CLIENT,
                lambda source=source: [
                    socket.create_connection(("2001:db8::1", 20203), 15, source) for _ in range(30)
                ],
            )
        server.says("too many pending handshakes")
        assert server.usage()[0] < 64 + 30, "180 connections were made"
        for sock in socks:
            sock.close()
    finally:
        for number in range(2, 8):
            plain.run(CLIENT, "ip", "address", "delete", f"2001:db8::{number:x}00/64",
                      "dev", "vclient")  # fmt: skip
