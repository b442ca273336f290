"""Protocol x1: negotiation inside the v1 handshake. Bytes and keys, no I/O.

1. Marks: each side's nonce tells only holders of the key that it supports x1.
2. Offers: each side sends its ciphers, the offloads and the MTU of its device, and an ephemeral
   X25519 key.
3. Agreement: the best common cipher, and keys with forward secrecy, even if the pre-shared key is
   disclosed later.
4. Rekeying: the same, from the previous keys and two new ephemeral X25519 keys.

docs/protocol.md specifies the format.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ttun.cipher import CIPHERS, TO_CLIENT, TO_SERVER, Cipher, CipherState
from ttun.errors import ProtocolError
from ttun.sodium import KeyPair, Secret, blake2b

MARK_SIZE = 6  # bytes at the end of a nonce
MAGIC = b"TTUN/x1\0"
OFFER = struct.Struct(">8sBBH32s")


def mark(k: bytes, direction: int, nonce: bytes) -> bytes:
    """Return a nonce with its end replaced by a mark, which looks random without K."""
    r = nonce[:-MARK_SIZE]
    digest = hashlib.blake2s(b"ttun/x1/mark" + bytes([direction]) + r, key=k).digest()
    return r + digest[:MARK_SIZE]


def is_marked(k: bytes, direction: int, nonce: bytes) -> bool:
    """Return whether the sender of a nonce has K and supports x1 (false positives: 2**-48)."""
    return hmac.compare_digest(nonce, mark(k, direction, nonce))


class AnsweredNonces:
    """The client nonces that a server has answered, to reject replays.

    Bounded: the oldest are dropped first. Holds the first 8 bytes of each, packed: they are random,
    and only a holder of the key can create a nonce that gets here.
    """

    SIZE = 8  # bytes of each

    def __init__(self, most: int) -> None:
        """most: how many to keep."""
        self._most = most
        self._packed = bytearray()
        self._oldest = 0  # index of the next to overwrite, once full

    def add(self, nonce: bytes) -> None:
        """Add a nonce."""
        if len(self._packed) < self._most * self.SIZE:
            self._packed += nonce[: self.SIZE]
            return
        start = self._oldest * self.SIZE
        self._packed[start : start + self.SIZE] = nonce[: self.SIZE]
        self._oldest = (self._oldest + 1) % self._most

    def __contains__(self, nonce: bytes) -> bool:
        """Return whether a nonce was answered."""
        start = self._packed.find(nonce[: self.SIZE])
        while start % self.SIZE:  # none, or a match across two entries
            if start == -1:
                return False
            start = self._packed.find(nonce[: self.SIZE], start + 1)
        return True


class Offer(NamedTuple):
    """What one side supports in a session."""

    ciphers: int  # Cipher.bit of each
    features: int  # 1: its device accepts TCP GSO packets, 2: UDP
    mtu: int  # of its device, in bytes; 0: unknown
    public: bytes  # ephemeral X25519 key

    def encode(self) -> bytes:
        """Return the 44-byte encoding."""
        return OFFER.pack(MAGIC, *self)

    @classmethod
    def decode(cls, data: bytes) -> Offer:
        """Decode 44 bytes; ignore unknown bits. Raises ProtocolError."""
        magic, *fields = OFFER.unpack(data)
        if not hmac.compare_digest(magic, MAGIC):
            raise ProtocolError("missing offer: incompatible version")
        return cls(*fields)

    def names(self) -> str:
        """Return the names of its ciphers, for the log."""
        return ", ".join(cipher.name for cipher in _in(self.ciphers)) or "none known"


def _in(bits: int) -> list[Cipher]:
    return [cipher for cipher in CIPHERS.values() if bits & cipher.bit]


def make_offer(ciphers: Sequence[Cipher], features: int, mtu: int, pair: KeyPair) -> Offer:
    """Return the offer of some ciphers, and of a device's features and MTU."""
    return Offer(sum(cipher.bit for cipher in ciphers), features, mtu, pair.public)


@dataclass
class Agreement:
    """The negotiated session, and P, the secret from which its keys are derived."""

    cipher: Cipher
    is_client: bool
    features: int  # the peer's
    mtu: int  # the peer's; 0: unknown
    p: Secret

    def states(self) -> tuple[CipherState, CipherState]:
        """Return the sending and the receiving state, with frame counters at 0."""
        to_server, to_client = (
            CipherState(self.cipher, direction, blake2b(b"", self.p, person))
            for direction, person in ((TO_SERVER, b"ttun/x1 c2s"), (TO_CLIENT, b"ttun/x1 s2c"))
        )
        return (to_server, to_client) if self.is_client else (to_client, to_server)

    def rekey(self, pair: KeyPair, public: bytes) -> None:
        """Derive the next P from a new key pair and the peer's public key."""
        said = pair.public + public if self.is_client else public + pair.public
        self.p = _exchange(pair, public, said, self.p, b"ttun/x1 rekey")


def agree(sk: bytes, is_client: bool, pair: KeyPair, ours: bytes, theirs: bytes) -> Agreement:
    """Return the agreement on two encoded offers, the same on both ends.

    Raises ProtocolError.
    """
    mine, other = Offer.decode(ours), Offer.decode(theirs)
    common = _in(mine.ciphers & other.ciphers)
    if not common:
        raise ProtocolError(
            f"no common cipher: ours {mine.names()}, the peer's {other.names()} "
            "(use the same -m on both ends, or none)"
        )
    client, server = (ours, theirs) if is_client else (theirs, ours)
    p = _exchange(pair, other.public, client + server, sk, b"ttun/x1 session")
    return Agreement(common[0], is_client, other.features, other.mtu, p)


def _exchange(
    pair: KeyPair, public: bytes, said: bytes, key: bytes | bytearray, person: bytes
) -> Secret:
    """Derive a secret from key, the X25519 shared secret and the transcript."""
    try:
        shared = pair.shared(public)
    except ValueError:
        raise ProtocolError("the peer sent a low-order X25519 key") from None
    mixed = Secret(len(shared) + len(said))
    mixed[: len(shared)] = shared
    mixed[len(shared) :] = said
    return blake2b(mixed, key, person)
