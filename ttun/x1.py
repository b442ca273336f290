"""Wire x1: what two of ours agree on inside the v1 handshake. Bytes and keys, no I/O.

1. Marks: each side's nonce says, to holders of the key alone, that it speaks x1.
2. Offers: each side names its ciphers, what its device takes, and a fresh X25519 key.
3. Agreement: the best cipher of both, and keys that nobody can compute afterwards, not even with
   the pre-shared key.
4. Rekeying: the same again, from the keys before and two fresh X25519 keys.

docs/protocol.md has the bytes.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ttun.cipher import CIPHERS, Cipher, CipherState
from ttun.errors import ProtocolError
from ttun.sodium import KeyPair, Secret, blake2b

NONCE_SIZE, MARK_SIZE = 16, 6
TO_SERVER, TO_CLIENT = 0, 1  # the direction byte of a frame's nonce; the role byte of a mark
MAGIC = b"TTUN/x1\0"
OFFER = struct.Struct(">8sBB2x32s")
BITS = {"chacha20-poly1305": 1, "aes-256-gcm": 2, "aegis-256": 4}
BEST_FIRST = ["aegis-256", "aes-256-gcm", "chacha20-poly1305"]


def marked_nonce(k: bytes, direction: int) -> bytes:
    """Return a nonce that looks random to everyone without K."""
    r = os.urandom(NONCE_SIZE - MARK_SIZE)
    return r + _mark(k, direction, r)


def is_marked(k: bytes, direction: int, nonce: bytes) -> bool:
    """Return whether the sender of a nonce has K and speaks x1; one in 2**48 random ones passes."""
    r, mark = nonce[:-MARK_SIZE], nonce[-MARK_SIZE:]
    return hmac.compare_digest(mark, _mark(k, direction, r))


def _mark(k: bytes, direction: int, r: bytes) -> bytes:
    return hashlib.blake2s(b"ttun/x1/mark" + bytes([direction]) + r, key=k).digest()[:MARK_SIZE]


class AnsweredNonces:
    """Which nonces of clients a server has answered, so that a recorded one gets no answer again.

    Bounded: the oldest are forgotten first. It holds the first 8 bytes of each, packed; they are
    random, and only a holder of the key makes a nonce that gets here.
    """

    SIZE = 8  # bytes of each

    def __init__(self, most: int) -> None:
        """Remember none yet, and never more than most."""
        self._most = most
        self._packed = bytearray()
        self._oldest = 0  # where the next one goes once there are `most`

    def add(self, nonce: bytes) -> None:
        """Remember one."""
        if len(self._packed) < self._most * self.SIZE:
            self._packed += nonce[: self.SIZE]
            return
        start = self._oldest * self.SIZE
        self._packed[start : start + self.SIZE] = nonce[: self.SIZE]
        self._oldest = (self._oldest + 1) % self._most

    def __contains__(self, nonce: bytes) -> bool:
        """Return whether it is remembered."""
        start = self._packed.find(nonce[: self.SIZE])
        while start >= 0 and start % self.SIZE:  # across two of them
            start = self._packed.find(nonce[: self.SIZE], start + 1)
        return start >= 0


class Offer(NamedTuple):
    """What one side can do in a session."""

    ciphers: int  # BITS
    features: int  # 1: takes TCP super-packets, 2: UDP
    public: bytes  # X25519, fresh

    def encode(self) -> bytes:
        """Return its 44 bytes."""
        return OFFER.pack(MAGIC, *self)

    @classmethod
    def decode(cls, data: bytes) -> Offer:
        """Read 44 bytes. Raises ProtocolError. Unknown bits and the two spare bytes may be set."""
        magic, *fields = OFFER.unpack(data)
        if not hmac.compare_digest(magic, MAGIC):
            raise ProtocolError("no offer where one belongs: another version of ttun")
        return cls(*fields)

    def names(self) -> str:
        """Return its ciphers for the log."""
        return ", ".join(name for name, bit in BITS.items() if self.ciphers & bit) or "none known"


def make_offer(ciphers: Sequence[Cipher], features: int, pair: KeyPair) -> Offer:
    """Offer some ciphers and what the device takes."""
    return Offer(sum(BITS[cipher.name] for cipher in ciphers), features, pair.public)


@dataclass
class Agreement:
    """What both sides have agreed on, and P, the secret that their keys are made of."""

    cipher: Cipher
    is_client: bool
    features: int  # of the peer
    p: Secret

    def states(self) -> tuple[CipherState, CipherState]:
        """Return the sending and the receiving state; their next frames are number 0."""
        to_server = blake2b(b"", self.p, b"ttun/x1 c2s")
        to_client = blake2b(b"", self.p, b"ttun/x1 s2c")
        states = (
            CipherState(self.cipher, TO_SERVER, to_server),
            CipherState(self.cipher, TO_CLIENT, to_client),
        )
        to_server.wipe()
        to_client.wipe()
        return states if self.is_client else (states[1], states[0])

    def rekey(self, pair: KeyPair, public: bytes) -> None:
        """Go on to the next P, with a fresh pair of ours and the peer's public key."""
        said = pair.public + public if self.is_client else public + pair.public
        self.p = _exchange(pair, public, said, self.p, b"ttun/x1 rekey")


def agree(sk: bytes, is_client: bool, pair: KeyPair, ours: bytes, theirs: bytes) -> Agreement:
    """Make the agreement of two encoded offers, the same on both sides. Raises ProtocolError."""
    mine, other = Offer.decode(ours), Offer.decode(theirs)
    common = mine.ciphers & other.ciphers
    best = next((name for name in BEST_FIRST if common & BITS[name]), None)
    if best is None:
        raise ProtocolError(f"no common cipher: ours {mine.names()}, the peer's {other.names()}")
    client, server = (ours, theirs) if is_client else (theirs, ours)
    p = _exchange(pair, other.public, client + server, sk, b"ttun/x1 session")
    return Agreement(CIPHERS[best], is_client, other.features, p)


def _exchange(
    pair: KeyPair, public: bytes, said: bytes, key: bytes | bytearray, person: bytes
) -> Secret:
    """Mix the X25519 secret of both sides, and what both have said, into a key."""
    try:
        shared = pair.shared(public)
    except ValueError:
        raise ProtocolError("the peer sent an X25519 key that gives no secret") from None
    mixed = Secret(len(shared) + len(said))
    mixed[: len(shared)] = shared
    mixed[len(shared) :] = said
    return blake2b(mixed, key, person)
