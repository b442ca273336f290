"""Marks, offers and keys of protocol x1, without sockets: against the independent peer, and against
replays and recordings."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable

import pytest
from aegis import AEGIS256
from peer import AEADS, BITS, MAGIC, Direction, Peer, X1Peer, blake2s
from shaking import LOW_ORDER, OURS, ROLES, K, against, drive, marked_nonce, terms

from ttun import handshake, x1
from ttun.cipher import CIPHERS, TO_CLIENT, TO_SERVER, CipherState
from ttun.errors import ProtocolError, UnrecognizedError
from ttun.handshake import Keys, Terms
from ttun.sodium import KeyPair, Secret, blake2b
from ttun.x1 import AnsweredNonces


def x1_against(role: str, peer: Callable[[X1Peer], None], ours: Terms | None = None) -> Keys:
    """Run one side in a role, against the independent peer in the other."""
    steps = OURS[role](K, terms() if ours is None else ours)
    return against(steps, lambda sock: peer(X1Peer(sock, ciphers=tuple(BITS))))


@pytest.mark.parametrize(
    ("key", "nonce", "ad", "data", "sealed"),
    [  # RFC 10032, appendix A: AEGIS-256, test vectors 1 to 3, tags of 256 bits
        (
            "1001" + "00" * 30, "100002" + "00" * 29, "", "00" * 16,
            "754fc3d8c973246dcc6d741412a4b236"
            "1181a1d18091082bf0266f66297d167d2e68b845f61a3b0527d31fc7b7b89f13",
        ),
        (
            "1001" + "00" * 30, "100002" + "00" * 29, "", "",
            "6a348c930adbd654896e1666aad67de989ea75ebaa2b82fb588977b1ffec864a",
        ),
        (
            "1001" + "00" * 30, "100002" + "00" * 29, "0001020304050607", bytes(range(32)).hex(),
            "f373079ed84b2709faee373584585d60accd191db310ef5d8b11833df9dec711"
            "b7d28d0c3c0ebd409fd22b44160503073a547412da0854bfb9723020dab8da1a",
        ),
    ],
)  # fmt: skip
def test_the_tests_own_aegis_is_right(
    key: str, nonce: str, ad: str, data: str, sealed: str
) -> None:
    aead = AEGIS256(bytes.fromhex(key))
    ciphertext = aead.encrypt(bytes.fromhex(nonce), bytes.fromhex(data), bytes.fromhex(ad))
    assert ciphertext.hex() == sealed


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 31, 100, 1280])
@pytest.mark.parametrize("direction", [0, 1])
def test_aegis_frames_are_those_of_the_independent_one(size: int, direction: int) -> None:
    key, packet = os.urandom(32), os.urandom(size)
    ours, theirs = (
        CipherState(CIPHERS["aegis-256"], direction, key),
        Direction("aegis-256", key, direction),
    )
    for _ in range(3):
        assert ours.seal(packet) == theirs.seal(packet)


@pytest.mark.parametrize("cipher", BITS)
@pytest.mark.parametrize("role", ROLES)
def test_it_agrees_with_an_independent_peer(role: str, cipher: str) -> None:
    peers: list[X1Peer] = []

    def peer(them: X1Peer) -> None:
        them.ciphers, them.features = (cipher,), 1
        them.shake(1 - ROLES[role])
        peers.append(them)

    keys = x1_against(role, peer)
    assert keys.wire == "x1" and keys.agreement is not None
    assert (keys.agreement.cipher.name, keys.agreement.features) == (cipher, 1)
    assert peers[0].receiving.open(keys.sending.seal(b"there")[2:]) == b"there"
    assert keys.receiving.open(peers[0].sending.seal(b"back")[2:]) == b"back"


@pytest.mark.parametrize("mtu", [0, 1280, 65535])
@pytest.mark.parametrize("role", ROLES)
def test_each_side_knows_the_mtu_of_the_other(role: str, mtu: int) -> None:
    """0 is what an older end sends in its two spare bytes."""
    peers: list[X1Peer] = []

    def peer(them: X1Peer) -> None:
        them.mtu = mtu
        them.shake(1 - ROLES[role])
        peers.append(them)

    ours = handshake.agreeable("auto", None, 1400)
    assert (keys := x1_against(role, peer, ours)).agreement is not None
    assert (keys.agreement.mtu, peers[0].their_mtu) == (mtu, 1400)
    assert peers[0].receiving.open(keys.sending.seal(b"both are hashed")[2:]) == b"both are hashed"


def both(ours: Terms, theirs: Terms) -> tuple[Keys, Keys]:
    """Two ttun sides, the first one the client."""
    servers: list[Keys] = []
    client = against(
        handshake.client(K, ours),
        lambda sock: servers.append(drive(handshake.server(K, theirs), sock)),
    )
    return client, servers[0]


@pytest.mark.parametrize(
    ("ours", "theirs", "best"),
    [
        (tuple(BITS), tuple(BITS), "aegis-256"),
        (("aes-256-gcm",), tuple(BITS), "aes-256-gcm"),
        (("chacha20-poly1305",), tuple(BITS), "chacha20-poly1305"),
        (("chacha20-poly1305", "aes-256-gcm"), ("aes-256-gcm", "aegis-256"), "aes-256-gcm"),
    ],
)
def test_two_of_ours_take_the_best_that_both_have(
    ours: tuple[str, ...], theirs: tuple[str, ...], best: str
) -> None:
    for pair in ((ours, theirs), (theirs, ours)):
        client, server = both(terms(*pair[0]), terms(*pair[1]))
        assert client.sending.cipher.name == server.sending.cipher.name == best
        assert server.receiving.open(client.sending.seal(b"x")[2:]) == b"x"


@pytest.mark.parametrize("wires", [("v1", "auto"), ("auto", "v1"), ("v1", "v1")])
def test_one_side_that_wants_v1_gets_it(wires: tuple[str, str]) -> None:
    for keys in both(terms(wire=wires[0]), terms(wire=wires[1])):
        assert keys.wire == "v1" and keys.agreement is None


def test_no_common_cipher_is_told_on_both_sides() -> None:
    why = []

    def server(sock: socket.socket) -> None:
        try:
            drive(handshake.server(K, terms("aes-256-gcm")), sock)
        except ProtocolError as error:
            why.append(str(error))

    with pytest.raises(ProtocolError, match="ours chacha20-poly1305, the peer's aes-256-gcm"):
        against(handshake.client(K, terms("chacha20-poly1305")), server)
    assert why == ["no common cipher: ours aes-256-gcm, the peer's chacha20-poly1305"]


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("nonce", ["random", "of another key", "of the other role"])
def test_what_carries_no_valid_mark_is_v1(role: str, nonce: str) -> None:
    """Such a peer gets nothing that only a holder of the key can create."""
    theirs = 1 - ROLES[role]
    sent = {
        "random": os.urandom(16),
        "of another key": marked_nonce(theirs, os.urandom(32)),
        "of the other role": marked_nonce(ROLES[role]),
    }[nonce]
    seen = []

    def peer(sock: socket.socket) -> None:
        them = Peer(sock, b"secret")
        if theirs == 0:
            sock.sendall(sent)
        seen.append(them.exactly(16))
        if theirs == 1:
            sock.sendall(sent)
        nonces = (seen[0], sent) if theirs else (sent, seen[0])
        them.key(*nonces, sends=theirs)
        if theirs == 0:
            them.send(MAGIC)
        assert them.receive() == MAGIC
        if theirs == 1:
            them.send(MAGIC)

    assert against(OURS[role](K, terms()), peer).wire == "v1"
    assert x1.is_marked(K, ROLES[role], seen[0]) == (role == "client")


def test_a_replayed_mark_gets_no_further_than_its_nonce() -> None:
    recorded = next(handshake.client(K, terms()))[0]
    steps = handshake.server(K, terms())
    next(steps)
    answer, wanted = steps.send(recorded)
    assert (len(answer), wanted) == (16, 2), "a nonce and no frame"
    steps.send((24).to_bytes(2, "big"))
    with pytest.raises(ProtocolError, match="authentication failed"):
        steps.send(os.urandom(24))


def test_a_mark_is_answered_once() -> None:
    answered = AnsweredNonces(100)
    nonce = marked_nonce(TO_SERVER)
    steps = handshake.server(K, terms(wire="x1"), answered)
    next(steps)
    assert len(steps.send(nonce)[0]) == 16
    steps = handshake.server(K, terms(wire="x1"), answered)
    next(steps)
    with pytest.raises(UnrecognizedError):
        steps.send(nonce)
    # If v1 is accepted too, the answer is a nonce without a mark, as for anyone.
    steps = handshake.server(K, terms(), answered)
    next(steps)
    answer = steps.send(nonce)[0]
    assert not x1.is_marked(K, TO_CLIENT, answer)


def test_of_the_nonces_answered_the_oldest_are_forgotten_first() -> None:
    answered = AnsweredNonces(10)
    nonces = [marked_nonce(TO_SERVER) for _ in range(25)]
    for number, nonce in enumerate(nonces):
        assert nonce not in answered
        answered.add(nonce)
        assert [n for n in nonces if n in answered] == nonces[max(0, number - 9) : number + 1]


def test_part_of_two_nonces_is_not_taken_for_one() -> None:
    answered = AnsweredNonces(10)
    answered.add(bytes(range(16)))
    answered.add(bytes(range(100, 116)))
    assert bytes(range(4, 8)) + bytes(range(100, 104)) + bytes(8) not in answered
    assert bytes(range(8)) + b"whatever" in answered
    answered.add(bytes([107]) * 16)  # also found a byte earlier, in the end of the one before
    assert bytes([107]) * 16 in answered


@pytest.mark.parametrize("role", ROLES)
def test_wire_x1_refuses_a_peer_without_a_mark(role: str) -> None:
    def peer(sock: socket.socket) -> None:
        sock.sendall(os.urandom(16))
        sock.recv(1000)
        assert sock.recv(1000) == b""

    with pytest.raises(ProtocolError, match="protocol v1, or different pre-shared key"):
        against(OURS[role](K, terms(wire="x1")), peer)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda offer: offer[:43], "its offer has length 59"),
        (lambda offer: offer + b"\0", "its offer has length 61"),
        (lambda offer: b"TTUN/x2\0" + offer[8:], "missing offer"),
        (lambda offer: offer[:8] + b"\0" + offer[9:], "the peer's none known"),
        (lambda offer: offer[:8] + b"\xf8" + offer[9:], "the peer's none known"),
        *[(lambda o, key=key: o[:12] + key, "low-order X25519 key") for key in LOW_ORDER],
    ],
)
def test_an_offer_that_is_none_is_refused(
    role: str, change: Callable[[bytes], bytes], why: str
) -> None:
    def peer(them: X1Peer) -> None:
        with contextlib.suppress(StopIteration, ValueError):  # it cannot agree either
            them.shake(1 - ROLES[role], offer=change(them.offer()))

    with pytest.raises(ProtocolError, match=why):
        x1_against(role, peer)


@pytest.mark.parametrize("role", ROLES)
def test_a_packet_in_place_of_the_offer_is_refused(role: str) -> None:
    def peer(them: X1Peer) -> None:
        them.nonces(1 - ROLES[role])
        them.send(MAGIC)
        them.send(b"E" * 100)
        them.exactly(1000)

    with pytest.raises(ProtocolError, match="its offer has length 116"):
        x1_against(role, peer)


def test_what_an_offer_may_hold_later_is_no_trouble() -> None:
    def peer(them: X1Peer) -> None:
        offer = them.offer()
        them.shake(0, offer[:8] + bytes([offer[8] | 0x80, 0x83, 7, 9]) + offer[12:])

    keys = x1_against("server", peer)
    assert keys.agreement is not None and keys.agreement.features == 0x83


def test_a_pending_handshake_wants_few_bytes() -> None:
    for prefix in range(65536):
        steps = handshake.server(K, terms())
        next(steps)
        steps.send(marked_nonce(0))
        try:
            _, wanted = steps.send(prefix.to_bytes(2, "big"))
        except ProtocolError:
            continue
        assert wanted == prefix == 24


def test_a_recording_and_the_key_open_nothing_after_the_offers() -> None:
    """Forward secrecy: recorded traffic and the pre-shared key are not enough."""
    recorded: dict[str, bytes] = {"client": b"", "server": b""}
    sides = {"client": handshake.client(K, terms()), "server": handshake.server(K, terms())}
    keys: dict[str, Keys] = {}
    waiting = {side: next(steps) for side, steps in sides.items()}
    buffers = {"client": b"", "server": b""}
    while len(keys) < 2:
        for side, other in (("client", "server"), ("server", "client")):
            if side in keys:
                continue
            send, wanted = waiting[side]
            recorded[side] += send
            buffers[other] += send
            waiting[side] = (b"", wanted)
            if len(buffers[side]) >= wanted:
                data, buffers[side] = buffers[side][:wanted], buffers[side][wanted:]
                try:
                    waiting[side] = sides[side].send(data)
                except StopIteration as done:
                    keys[side] = done.value
    secret = b"\x45 the text of the packet"
    frames = {side: keys[side].sending.seal(secret) for side in keys}

    # The attacker, with the key: SK is known, and what it opens are the magic and the offer.
    nonces = recorded["client"][:16], recorded["server"][:16]
    sk = blake2s(b"ttun/sk/v1" + K + nonces[0] + nonces[1])
    offers = {}
    for number, side in enumerate(("client", "server")):
        direction = Direction("chacha20-poly1305", sk, number)
        stream = recorded[side][16:]
        assert direction.open(stream[2:26]) == MAGIC
        offers[side] = direction.open(stream[28:])
        assert offers[side].startswith(b"TTUN/x1\0")
    for number, side in enumerate(("client", "server")):
        # Behind the offers nothing opens: not under SK, nor under what can be made of all that
        # was said.
        said = offers["client"] + offers["server"]
        guesses = [sk] + [
            bytes(blake2b(b"", blake2b(mixed, sk, b"ttun/x1 session"), person))
            for mixed in (said, bytes(32) + said, offers["client"][12:] + said)
            for person in (b"ttun/x1 c2s", b"ttun/x1 s2c")
        ]
        for guess in guesses:
            for cipher in AEADS:
                for first in range(3):
                    direction = Direction(cipher, guess, number)
                    direction.frames = first
                    with pytest.raises(Exception):  # noqa: B017 - each AEAD has its own
                        direction.open(frames[side][2:])
    # The two who made the keys do open it.
    assert keys["server"].receiving.open(frames["client"][2:]) == secret


def test_secrets_are_wiped_and_not_shown() -> None:
    secret = Secret(b"x" * 32)
    assert "x" not in repr(secret) + str(secret)
    secret.wipe()
    assert secret == bytes(32)
    pair = KeyPair()
    pair.shared(KeyPair().public)
    assert pair._secret == bytes(32), "an X25519 secret is used once"
