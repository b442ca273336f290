"""End to end against the independent peer, and against hostile peers."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time

import pytest
from peer import Peer, echo_request
from strangers import STRANGERS, TO_SERVER, client_gets_in, connect, listen
from tunnel import CLIENT, SERVER, TUNNEL4, Bench

pytestmark = pytest.mark.hosts

CIPHERS = ["chacha20-poly1305", "aes-256-gcm"]
TO_CLIENT = TUNNEL4[SERVER], TUNNEL4[CLIENT]


@pytest.mark.parametrize("cipher", CIPHERS)
def test_an_independent_client_is_answered(bench: Bench, cipher: str) -> None:
    server = bench.server("-m", cipher)
    with connect(bench) as sock:
        peer = Peer(sock, b"secret", cipher)
        peer.handshake_as_client()
        for size in (0, 1, 56, 1000, 1252):
            request = echo_request(*TO_SERVER, os.urandom(size))
            peer.send(request)
            peer.receive_reply(request)
    assert "the peer closed the connection" in server.says("disconnected")


@pytest.mark.parametrize("cipher", CIPHERS)
def test_an_independent_server_is_answered(bench: Bench, cipher: str) -> None:
    with listen(bench) as listener:
        client = bench.client("-m", cipher)
        sock, _ = listener.accept()
        with sock:
            peer = Peer(sock, b"secret", cipher)
            peer.handshake_as_server()
            for size in (0, 1, 56, 1000, 1252):
                request = echo_request(*TO_CLIENT, os.urandom(size))
                peer.send(request)
                peer.receive_reply(request)
        assert "the peer closed the connection" in client.says("disconnected")


def test_a_frame_right_behind_the_magic_is_handled(bench: Bench) -> None:
    bench.server()
    with connect(bench) as sock:
        peer = Peer(sock, b"secret")
        request = echo_request(*TO_SERVER, b"early")
        peer.handshake_as_client(behind=request)
        peer.receive_reply(request)


def test_a_packet_of_60000_bytes_is_answered(bench: Bench) -> None:
    bench.server("-mtu", "65519")
    with connect(bench) as sock:
        peer = Peer(sock, b"secret")
        peer.handshake_as_client()
        request = echo_request(*TO_SERVER, os.urandom(60000 - 28))
        peer.send(request)
        peer.receive_reply(request)


@pytest.mark.parametrize("packet", [b"\x00" * 40, b"\xff", b"\x10garbage", b"\x75" + bytes(60000)])
def test_a_packet_that_the_kernel_refuses_does_not_end_the_session(
    bench: Bench, packet: bytes
) -> None:
    server = bench.server()
    with connect(bench) as sock:
        peer = Peer(sock, b"secret")
        peer.handshake_as_client()
        peer.send(packet)
        peer.send(b"")
        request = echo_request(*TO_SERVER, b"still there")
        peer.send(request)
        peer.receive_reply(request)
    assert "1 dropped: rejected by the kernel" in server.says("disconnected")


def test_packets_from_between_sessions_are_dropped(bench: Bench) -> None:
    with listen(bench) as listener:
        client = bench.client()
        sock, _ = listener.accept()
        with sock:
            Peer(sock, b"secret").handshake_as_server()
            client.says("authenticated")
        client.says("disconnected")
        sock, _ = listener.accept()  # connected, during the handshake
        with sock:
            sender = bench.on(CLIENT, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            with sender:
                for number in range(100):
                    sender.sendto(b"stale %d" % number, (TUNNEL4[SERVER], 9))
                peer = Peer(sock, b"secret")
                peer.handshake_as_server()
                client.says("authenticated", times=2)
                time.sleep(0.2)  # the session starts by emptying the device
                sender.sendto(b"fresh", (TUNNEL4[SERVER], 9))
            while True:
                packet = peer.receive()
                assert b"stale" not in packet
                if b"fresh" in packet:
                    break


@pytest.mark.parametrize("bench", ["x1"], indirect=True)
def test_a_session_that_is_over_at_once_is_followed_by_a_wait(bench: Bench) -> None:
    """Otherwise a server that ends each session would get hundreds of connections a second."""
    with listen(bench) as listener:
        client = bench.client()
        for number in range(1, 4):
            sock, _ = listener.accept()
            with sock:
                Peer(sock, b"secret").handshake_as_server()
                client.says("authenticated", times=number)
            ended = time.monotonic()
            client.says("reconnecting in", times=number)
        listener.accept()[0].close()
        assert time.monotonic() - ended > 1, "the third wait is 3 s at least"


@pytest.mark.parametrize("name", STRANGERS)
def test_a_stranger_is_refused_with_a_reason_and_the_next_client_gets_in(
    bench: Bench, name: str
) -> None:
    data, reason = STRANGERS[name]
    server = bench.server()
    with connect(bench) as sock:
        address = "{}:{}".format(*sock.getsockname())
        sock.sendall(data)
        with contextlib.suppress(OSError):  # it may have closed with data unread
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(100):
                pass
    line = next(x for x in server.says("failed:").splitlines() if "failed:" in x)
    assert address in line
    assert reason in line
    client_gets_in(bench)


V1_CHACHA, V1_AES = ("--wire", "v1"), ("--wire", "v1", "-m", "aes-256-gcm")


@pytest.mark.parametrize("bench", ["x1"], indirect=True)
@pytest.mark.parametrize(
    ("key", "ours", "theirs", "reason"),
    [
        ("wrong", (), (), "authentication failed"),
        ("wrong", V1_CHACHA, V1_CHACHA, "authentication failed"),
        ("secret", V1_CHACHA, V1_AES, "authentication failed"),
        ("secret", (), V1_AES, "authentication failed"),
        (
            "secret",
            ("-m", "chacha20-poly1305"),
            ("-m", "aes-256-gcm"),
            "no common cipher: ours chacha20-poly1305, the peer's aes-256-gcm",
        ),
        ("secret", ("--wire", "x1"), V1_CHACHA, "different pre-shared key (--wire x1 re"),
        ("secret", ("-m", "aegis-256"), V1_CHACHA, "pre-shared key (aegis-256 requires x1)"),
    ],
)
def test_a_client_that_does_not_fit_is_refused(
    bench: Bench, key: str, ours: tuple[str, ...], theirs: tuple[str, ...], reason: str
) -> None:
    server = bench.server(*ours)
    client = bench.client(*theirs, key=key)
    assert reason in server.says("failed:")
    client.says("failed:")
    client.says("reconnecting in")
    client.stop()
    bench.client(*ours).says("authenticated")


def test_a_wrong_magic_is_refused(bench: Bench) -> None:
    server = bench.server()
    with connect(bench) as sock:
        peer = Peer(sock, b"secret")
        peer.nonces_as_client()
        peer.send(b"TTUN/v9\0")
        assert sock.recv(1) == b"", "the server sends no frame to somebody with a wrong magic"
    assert "wrong magic" in server.says("failed:")


def test_silence_is_over_after_ten_seconds_also_if_it_drips(bench: Bench) -> None:
    server = bench.server()
    started = time.monotonic()
    with connect(bench) as silent, connect(bench) as dripping:
        while time.monotonic() - started < 8.5:
            dripping.send(b"x")
            time.sleep(1)
        assert server.log().count("failed:") == 0
        assert "timed out after 10 s" in server.says("failed:", times=2, seconds=5)
        assert 9.5 < time.monotonic() - started < 12
        assert silent.recv(1) == dripping.recv(1) == b""


def test_silent_connections_do_not_keep_the_client_out(bench: Bench) -> None:
    bench.server()
    socks = [connect(bench) for _ in range(300)]
    client_gets_in(bench)
    for sock in socks:
        sock.close()


def test_only_the_first_to_prove_the_key_stays(bench: Bench) -> None:
    server = bench.server()
    with connect(bench) as first, connect(bench) as second:
        late = Peer(second, b"secret")
        late.nonces_as_client()
        winner = Peer(first, b"secret")
        winner.handshake_as_client()
        server.says("authenticated")
        assert second.recv(1) == b"", "others in the middle of a handshake are let go"
        request = echo_request(*TO_SERVER, b"mine")
        winner.send(request)
        winner.receive_reply(request)


def test_strangers_do_not_touch_a_session(bench: Bench) -> None:
    server, _ = bench.tunnel()
    for data, _ in STRANGERS.values():
        with connect(bench) as sock:
            sock.sendall(data)
    assert bench.ping(CLIENT, TUNNEL4[SERVER], 20) == 20
    assert "disconnected" not in server.log()


# Invalid input from a peer with the key, after the handshake.
MISDEEDS = {
    "a length below the tag": (struct.pack(">H", 3) + b"abc", "length 3, shorter than the tag"),
    "a forged frame": (struct.pack(">H", 40) + bytes(40), "failed authentication"),
    "half a frame": (struct.pack(">H", 40) + bytes(10), "closed 12 bytes into a frame"),
}


@pytest.mark.parametrize("name", MISDEEDS)
def test_a_misdeed_ends_that_session_and_no_more(bench: Bench, name: str) -> None:
    data, reason = MISDEEDS[name]
    server = bench.server()
    with connect(bench) as sock:
        Peer(sock, b"secret").handshake_as_client()
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        assert reason in server.says("disconnected")
    client_gets_in(bench)


def test_a_replayed_handshake_and_session_open_nothing(bench: Bench) -> None:
    """Nonces of both sides are in the key, so a replay is useless."""
    server = bench.server()
    recording = b""
    with connect(bench) as sock:
        peer = Peer(sock, b"secret")
        send = sock.sendall

        class Recorder:
            def __getattr__(self, name: str) -> object:
                return getattr(sock, name)

            def sendall(self, data: bytes) -> None:
                nonlocal recording
                recording += data
                send(data)

        peer.sock = Recorder()  # type: ignore[assignment]
        peer.handshake_as_client()
        peer.send(echo_request(*TO_SERVER, b"once"))
        server.says("authenticated")
    server.says("disconnected")
    with connect(bench) as sock:
        sock.sendall(recording)
        assert "authentication failed" in server.says("failed:")
