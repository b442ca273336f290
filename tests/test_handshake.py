"""The handshake without a socket: bytes in, bytes out, against the independent peer."""

from __future__ import annotations

import os
import re
import socket

import pytest
from peer import MAGIC, Peer, X1Peer
from shaking import K, against, drive, terms

from ttun import handshake
from ttun.cipher import CIPHERS, Cipher, CipherState
from ttun.errors import ProtocolError, UsageError

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


def test_the_log_tells_which_keys_are_forward_secret() -> None:
    for wire, said in (
        ("v1", "protocol v1, chacha20-poly1305"),
        ("x1", "protocol x1, aes-256-gcm, forward secrecy"),
    ):
        mine = handshake.agreeable(wire, None if wire == "v1" else "aes-256-gcm", 1280)
        peer = handshake.server(K, mine)
        keys = against(
            handshake.client(K, mine), lambda sock, peer=peer: drive(peer, sock) and None
        )
        assert (keys.wire, keys.describe()) == (wire, said)


@pytest.mark.parametrize(
    ("wire", "name", "needs_x1"),
    [("auto", "aes-256-gcm", False), ("x1", None, False), ("v1", None, False),
     ("auto", "aegis-256", True), ("x1", "aegis-256", True)],
)  # fmt: skip
def test_a_cipher_that_v1_lacks_requires_x1(wire: str, name: str, needs_x1: bool) -> None:
    agreed = handshake.agreeable(wire, name, 1280)
    assert agreed.wire == ("x1" if needs_x1 else wire)
    assert ("aegis-256 requires x1" in agreed.needs_x1) == needs_x1
    with pytest.raises(UsageError, match=r"v1 does not support aegis-256 \(remove --wire v1\)"):
        handshake.agreeable("v1", "aegis-256", 1280)


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


@pytest.mark.parametrize("wire", ["v1", "auto", "x1"])
@pytest.mark.parametrize(
    ("greeting", "what"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n", "HTTP (a captive portal?)"),
        (b"HTTP/1.0 302 Found\r\n", "HTTP (a captive portal?)"),
        (b"SSH-2.0-OpenSSH_9.2p1\r\n", "SSH (another port?)"),
    ],
)
def test_a_server_of_another_protocol_is_named_and_no_key_suspected(
    wire: str, greeting: bytes, what: str
) -> None:
    steps = handshake.client(K, V1._replace(wire=wire))
    next(steps)
    with pytest.raises(ProtocolError, match=re.escape(f"not a ttun peer: it speaks {what}")):
        steps.send(greeting[:16])


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


SEVERAL = [b"first", b"second", b"third", b"secret"]


@pytest.mark.parametrize("theirs", SEVERAL)
@pytest.mark.parametrize("wire", ["v1", "x1"])
def test_any_of_a_servers_keys_opens_and_the_others_are_wiped(
    theirs: bytes, wire: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    k, *others = map(handshake.psk_key, SEVERAL)
    made: list[CipherState] = []
    wiped: list[CipherState] = []
    init, wipe = CipherState.__init__, CipherState.wipe

    def note(state: CipherState, cipher: Cipher, direction: int, key: bytes | bytearray) -> None:
        made.append(state)
        init(state, cipher, direction, key)

    monkeypatch.setattr(CipherState, "__init__", note)

    def wipe_and_note(state: CipherState) -> None:
        wiped.append(state)
        wipe(state)

    monkeypatch.setattr(CipherState, "wipe", wipe_and_note)
    peers: list[Peer] = []

    def peer(sock: socket.socket) -> None:
        if wire == "x1":
            peers.append(X1Peer(sock, theirs))
            peers[0].shake(0)
        else:
            peers.append(Peer(sock, theirs))
            peers[0].handshake_as_client()

    keys = against(handshake.server(k, terms(), others=others), peer)
    assert (keys.wire, keys.key) == (wire, SEVERAL.index(theirs))
    assert keys.receiving.open(peers[0].sending.seal(b"x")[2:]) == b"x"
    assert {*map(id, made)} == {*map(id, [*wiped, keys.sending, keys.receiving])}


@pytest.mark.parametrize("wire", ["v1", "auto"])
def test_a_stranger_costs_four_opens_of_one_short_frame(
    wire: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[int] = []
    real = CipherState.open

    def count(state: CipherState, ciphertext: bytes) -> bytes | None:
        opened.append(len(ciphertext))
        return real(state, ciphertext)

    monkeypatch.setattr(CipherState, "open", count)
    k, *others = map(handshake.psk_key, SEVERAL)

    def stranger(sock: socket.socket) -> None:
        peer = Peer(sock, b"guessed")
        peer.nonces_as_client()
        peer.send(MAGIC)

    with pytest.raises(ProtocolError, match="authentication failed"):
        against(handshake.server(k, handshake.Terms(wire), others=others), stranger)
    assert opened == [24] * 4
