"""The handshake without a socket: bytes in, bytes out, against the independent peer."""

from __future__ import annotations

import os
import socket

import pytest
from peer import MAGIC, Peer
from shaking import K, against, drive

from ttun import handshake
from ttun.cipher import CIPHERS
from ttun.errors import ProtocolError

V1 = handshake.Terms("v1")
V1_CIPHERS = ["chacha20-poly1305", "aes-256-gcm"]


@pytest.mark.parametrize("wire", ["v1", "auto"])
@pytest.mark.parametrize("cipher", V1_CIPHERS)
@pytest.mark.parametrize("role", ["client", "server"])
def test_it_agrees_with_an_independent_peer(cipher: str, role: str, wire: str) -> None:
    peers: list[Peer] = []

    def peer(sock: socket.socket) -> None:
        peers.append(Peer(sock, b"secret", cipher))
        if role == "client":
            peers[0].handshake_as_server()
        else:
            peers[0].handshake_as_client()

    ours = handshake.client if role == "client" else handshake.server
    keys = against(ours(K, handshake.Terms(wire, CIPHERS[cipher])), peer)
    assert peers[0].receiving.open(keys.sending.seal(b"there")[2:]) == b"there"
    assert keys.receiving.open(peers[0].sending.seal(b"back")[2:]) == b"back"


def test_both_of_ours_agree() -> None:
    mine = handshake.client(K, V1)
    keys = against(mine, lambda sock: drive(handshake.server(K, V1), sock) and None)
    assert keys.wire == "v1"


@pytest.mark.parametrize(
    ("psk", "cipher", "magic", "why"),
    [
        (b"wrong", "chacha20-poly1305", MAGIC, "authentication failed"),
        (b"secret", "aes-256-gcm", MAGIC, "authentication failed"),
        (b"secret", "chacha20-poly1305", b"TTUN/v2\0", "wrong magic"),
        (b"secret", "chacha20-poly1305", b"", "length 16"),
        (b"secret", "chacha20-poly1305", MAGIC * 2, "length 32"),
    ],
)
@pytest.mark.parametrize("role", ["client", "server"])
def test_a_peer_that_does_not_prove_the_key_is_refused(
    role: str, psk: bytes, cipher: str, magic: bytes, why: str
) -> None:
    def peer(sock: socket.socket) -> None:
        them = Peer(sock, psk, cipher)
        if role == "server":
            them.handshake_as_client(magic)
            return
        theirs, mine = them.exactly(16), os.urandom(16)
        sock.sendall(mine)
        them.key(theirs, mine, sends=1)
        them.send(magic)
        them.exactly(1000)

    ours = handshake.client if role == "client" else handshake.server
    with pytest.raises(ProtocolError, match=why):
        against(ours(K, V1), peer)


def test_the_server_sends_no_frame_before_it_has_seen_the_magic() -> None:
    steps = handshake.server(K, V1)
    assert next(steps) == (b"", 16)
    nonce, wanted = steps.send(os.urandom(16))
    assert (len(nonce), wanted) == (16, 2)
    sent, wanted = steps.send((24).to_bytes(2, "big"))
    assert (sent, wanted) == (b"", 24)
    with pytest.raises(ProtocolError):
        steps.send(os.urandom(24))


def test_a_web_browser_is_recognised_after_18_bytes() -> None:
    steps = handshake.server(K, V1)
    next(steps)
    request = b"GET / HTTP/1.1\r\nHost: example\r\n\r\n"
    steps.send(request[:16])
    with pytest.raises(ProtocolError, match="not a ttun peer"):
        steps.send(request[16:18])


def test_a_pending_handshake_wants_few_bytes() -> None:
    for length in range(65536):
        steps = handshake.server(K, V1)
        next(steps)
        steps.send(bytes(16))
        try:
            _, wanted = steps.send(length.to_bytes(2, "big"))
        except ProtocolError:
            continue
        assert wanted == length == 24


def test_nonces_are_fresh() -> None:
    assert next(handshake.client(K, V1)) != next(handshake.client(K, V1))
