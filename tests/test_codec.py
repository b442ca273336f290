"""The frame codec against the test vectors of protocol v1."""

from __future__ import annotations

import hashlib

import pytest
from known_answers import SESSIONS, frames, plaintext
from ttun._codec import ffi, lib

from ttun import handshake
from ttun.cipher import CIPHERS, TO_CLIENT, TO_SERVER, CipherState

DIRECTIONS = {"client to server": TO_SERVER, "server to client": TO_CLIENT}
CHACHA = CIPHERS["chacha20-poly1305"]
KEY = bytes(range(32))


@pytest.mark.parametrize("session", SESSIONS)
def test_keys_match_the_known_answers(session: dict) -> None:
    k = handshake.psk_key(bytes.fromhex(session["psk"]))
    assert k.hex() == session["K"]
    nonces = bytes.fromhex(session["client_nonce"]), bytes.fromhex(session["server_nonce"])
    assert handshake.session_key(k, *nonces).hex() == session["SK"]


@pytest.mark.parametrize("session", SESSIONS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_frames_match_the_known_answers(session: dict, direction: str) -> None:
    cipher, sk = CIPHERS[session["cipher"]], bytes.fromhex(session["SK"])
    sealing = CipherState(cipher, DIRECTIONS[direction], sk)
    opening = CipherState(cipher, DIRECTIONS[direction], sk)
    for frame in frames(session, direction):
        packet = plaintext(frame)
        sealed = sealing.seal(packet)
        assert len(sealed) == frame["frame_len"]
        assert hashlib.sha256(sealed).hexdigest() == frame["frame_sha256"]
        if "frame" in frame:
            assert sealed.hex() == frame["frame"]
        assert opening.open(sealed[2:]) == packet


def test_the_vectors_cover_both_ciphers_directions_and_the_largest_packet() -> None:
    covered = {(s["cipher"], f["direction"]) for s in SESSIONS for f in s["frames"]}
    assert covered == {(c, d) for c in CIPHERS if CIPHERS[c].in_v1 for d in DIRECTIONS}
    assert max(f["plaintext_len"] for s in SESSIONS for f in s["frames"]) == 65519


@pytest.mark.parametrize("flipped", [0, 1, 5, 10, 20, 25])
def test_a_changed_bit_fails(flipped: int) -> None:
    frame = bytearray(CipherState(CHACHA, 0, KEY).seal(b"ten bytes!"))
    frame[2 + flipped] ^= 1
    assert CipherState(CHACHA, 0, KEY).open(bytes(frame[2:])) is None


def test_a_frame_opens_only_in_its_turn_and_direction() -> None:
    frame = CipherState(CHACHA, 0, KEY).seal(b"packet")
    late = CipherState(CHACHA, 0, KEY)
    late.c.counter = 1
    assert late.open(frame[2:]) is None
    assert CipherState(CHACHA, 1, KEY).open(frame[2:]) is None
    assert CipherState(CHACHA, 0, KEY).open(frame[2:]) == b"packet"


@pytest.mark.parametrize("length", [0, 1, 15])
def test_less_than_a_tag_is_refused(length: int) -> None:
    assert CipherState(CHACHA, 0, KEY).open(bytes(length)) is None


def test_the_largest_packet_fits_and_one_byte_more_does_not() -> None:
    state = CipherState(CHACHA, 0, KEY)
    assert state.seal(bytes(65519))[:2] == b"\xff\xff"
    with pytest.raises(ValueError, match="too large for a frame"):
        state.seal(bytes(65520))
    assert state.c.counter == 1, "a packet that was not sealed uses no nonce"


def test_the_last_nonce_is_never_passed() -> None:
    state = CipherState(CHACHA, 0, KEY)
    state.c.counter = 2**64 - 2
    state.seal(b"last")
    with pytest.raises(ValueError, match="too large for a frame"):
        state.seal(b"one more")


def test_a_wiped_state_holds_no_key() -> None:
    state = CipherState(CHACHA, 0, KEY)
    assert KEY in bytes(ffi.buffer(state.c))
    state.wipe()
    assert not any(bytes(ffi.buffer(state.c)))


def whole_frames(data: bytes, tag_size: int = 16) -> tuple[int, int]:
    bad = ffi.new("long *")
    return lib.ttun_whole_frames(data, len(data), tag_size, bad), bad[0]


def test_a_stream_is_cut_behind_its_last_whole_frame() -> None:
    state = CipherState(CHACHA, 0, KEY)
    frames = [state.seal(bytes(size)) for size in (0, 1, 100, 1280)]
    stream = b"".join(frames)
    ends = [sum(map(len, frames[: i + 1])) for i in range(len(frames))]
    for size in range(len(stream) + 1):
        expected = max((end for end in ends if end <= size), default=0)
        assert whole_frames(stream[:size]) == (expected, -1)


def test_a_stream_is_cut_before_a_length_below_the_tag() -> None:
    good = CipherState(CHACHA, 0, KEY).seal(b"good")
    for length in (0, 1, 15):
        assert whole_frames(good + length.to_bytes(2, "big") + good) == (len(good), length)
