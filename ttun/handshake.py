"""Mutual authentication with the pre-shared key: bytes in, bytes out, no socket.

Protocol v1, ``||`` is concatenation::

    client                                        server
      Nc, 16 random bytes               -->
                                        <--       Ns, 16 random bytes
      frame 0: the magic                -->       opens and compares
      opens and compares                <--       frame 0: the magic

    K = blake2s("ttun/psk/v1" || psk)      SK = blake2s("ttun/sk/v1" || K || Nc || Ns)

Protocol x1 is the same, except that Nc and Ns carry marks, and each magic is followed by an offer
as frame 1, in the same write. All later frames use keys derived from both offers (x1.py).

A server may have several pre-shared keys. A mark says which one the client has; without a mark, the
server tries each of them on frame 0.

Each side is a generator. It yields the bytes to send and the number of bytes it needs next,
receives exactly that many, and returns the keys. It raises ProtocolError if authentication fails.
The caller owns the socket and enforces the timeout of 10 seconds.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Generator, Sequence
from typing import NamedTuple

from ttun import x1
from ttun._codec import lib
from ttun.cipher import EVERYWHERE, PREFIX, TO_CLIENT, TO_SERVER, Cipher, CipherState, by_name, fast
from ttun.errors import ProtocolError, UnrecognizedError, UsageError
from ttun.sodium import KeyPair

TIMEOUT = 10.0  # seconds
NONCE_SIZE = 16  # bytes of Nc and of Ns
MAGIC = b"TTUN/v1\0"
NOT_X1 = "protocol v1, or different pre-shared key"
NOT_OPENED = "authentication failed (different pre-shared key or cipher?)"
# What no random Ns begins with: from 7 bytes on, that is once in 10^16 connections.
GREETINGS = {
    b"HTTP/1.": "HTTP (a captive portal?)",
    b"SSH-2.0-": "SSH (another port?)",
}


class Terms(NamedTuple):
    """What this end accepts."""

    wire: str = "auto"  # "v1", "x1", or "auto": x1 if the peer supports it, else v1
    cipher: Cipher = EVERYWHERE  # in protocol v1
    offers: Sequence[Cipher] = ()  # in protocol x1
    features: int = 0  # offload bits of this end's device, as in an offer
    mtu: int = 0  # of this end's device, as in an offer
    needs_x1: str = "--wire x1 requires x1"  # the reason, if wire is "x1"


class Keys(NamedTuple):
    """Result of a handshake: both directions, with their counters after its frames."""

    sending: CipherState
    receiving: CipherState
    agreement: x1.Agreement | None = None  # None in protocol v1
    key: int = 0  # index of the pre-shared key that the client has

    @property
    def wire(self) -> str:
        """The protocol of these keys: "v1" or "x1"."""
        return "x1" if self.agreement else "v1"

    def describe(self) -> str:
        """Return the protocol, the cipher and their properties, for the log."""
        secrecy = ", forward secrecy" if self.agreement else ""
        return f"protocol {self.wire}, {self.sending.cipher.name}{secrecy}"

    def wipe(self) -> None:
        """Overwrite the keys of both directions."""
        self.sending.wipe()
        self.receiving.wipe()

    def discard(self) -> None:
        """Overwrite all keys; for a session that is not started."""
        self.wipe()
        if self.agreement is not None:
            self.agreement.p.wipe()


# (bytes to send, number of bytes needed) -> those bytes; result: the keys
Steps = Generator[tuple[bytes, int], bytes, Keys]
_Step = Generator[tuple[bytes, int], bytes, None]
_Frame = Generator[tuple[bytes, int], bytes, bytes]


def psk_key(psk: bytes) -> bytes:
    """Return K, the 32-byte hash of a pre-shared key of any length."""
    return hashlib.blake2s(b"ttun/psk/v1" + psk).digest()


def session_key(k: bytes, client_nonce: bytes, server_nonce: bytes) -> bytes:
    """Return SK, the 32-byte key of one session."""
    return hashlib.blake2s(b"ttun/sk/v1" + k + client_nonce + server_nonce).digest()


def client(k: bytes, terms: Terms) -> Steps:
    """Run the client's side of the handshake."""
    client_nonce = _nonce(k, TO_SERVER, terms.wire != "v1")
    server_nonce = yield client_nonce, NONCE_SIZE
    for greeting, what in GREETINGS.items():
        if server_nonce.startswith(greeting):
            raise ProtocolError(f"not a ttun peer: it speaks {what}")
    is_x1 = terms.wire != "v1" and x1.is_marked(k, TO_CLIENT, server_nonce)
    if not is_x1 and terms.wire == "x1":
        raise ProtocolError(_why_not_x1(terms))
    sk = session_key(k, client_nonce, server_nonce)
    cipher = EVERYWHERE if is_x1 else terms.cipher
    keys = Keys(CipherState(cipher, TO_SERVER, sk), CipherState(cipher, TO_CLIENT, sk))
    magic = keys.sending.seal(MAGIC)
    if not is_x1:
        yield from _receive_magic(keys, magic)
        return keys
    pair = KeyPair()
    ours = x1.make_offer(terms.offers, terms.features, terms.mtu, pair).encode()
    yield from _receive_magic(keys, magic + keys.sending.seal(ours))
    theirs = yield from _receive(keys.receiving, len(ours), "its offer")
    return _agreed(keys, x1.agree(sk, True, pair, ours, theirs))


def server(
    k: bytes,
    terms: Terms,
    answered: x1.AnsweredNonces | None = None,
    others: Sequence[bytes] = (),
) -> Steps:
    """Run the server's side of the handshake. It sends no frame before the client's is verified.

    answered: nonces answered before; a replayed one counts as unmarked. others: more keys that a
    client may have. If only x1 is accepted, raises UnrecognizedError for a client without a fresh
    mark, before sending anything.
    """
    client_nonce = yield b"", NONCE_SIZE
    ks = [k, *others]
    marked = [i for i, each in enumerate(ks) if knows_key(each, terms, client_nonce, answered)][:1]
    is_x1 = bool(marked)
    if not is_x1 and terms.wire == "x1":
        raise UnrecognizedError(_why_not_x1(terms))
    if is_x1 and answered is not None:
        answered.add(client_nonce)
    server_nonce = _nonce(ks[marked[0]] if is_x1 else k, TO_CLIENT, is_x1)
    cipher = EVERYWHERE if is_x1 else terms.cipher
    possible = []
    for number in marked or range(len(ks)):
        sk = session_key(ks[number], client_nonce, server_nonce)
        sending, receiving = (CipherState(cipher, way, sk) for way in (TO_CLIENT, TO_SERVER))
        possible.append(Keys(sending, receiving, key=number))
    frame = yield from _read(cipher, server_nonce, len(MAGIC), "its first frame")
    keys = _open_magic(possible, frame)
    if not is_x1:
        yield keys.sending.seal(MAGIC), 0
        return keys
    pair = KeyPair()
    ours = x1.make_offer(terms.offers, terms.features, terms.mtu, pair).encode()
    theirs = yield from _receive(keys.receiving, len(ours), "its offer")
    yield keys.sending.seal(MAGIC) + keys.sending.seal(ours), 0  # even without a common cipher
    # With a mark there is one possible key: sk is of that one.
    return _agreed(keys, x1.agree(sk, False, pair, ours, theirs))


def _nonce(k: bytes, direction: int, marked: bool) -> bytes:
    nonce = os.urandom(NONCE_SIZE)
    return x1.mark(k, direction, nonce) if marked else nonce


def knows_key(
    k: bytes, terms: Terms, client_nonce: bytes, answered: x1.AnsweredNonces | None
) -> bool:
    """Return whether a client's nonce proves the key and x1 support: its mark is valid and not a
    replay.
    """
    if terms.wire == "v1" or not x1.is_marked(k, TO_SERVER, client_nonce):
        return False
    return answered is None or client_nonce not in answered


def _why_not_x1(terms: Terms) -> str:
    return f"{NOT_X1} ({terms.needs_x1})"


def _agreed(keys: Keys, agreement: x1.Agreement) -> Keys:
    """Switch to the keys with forward secrecy."""
    keys.wipe()
    return Keys(*agreement.states(), agreement, keys.key)


def _receive_magic(keys: Keys, send_first: bytes) -> _Step:
    """Send, then read frame 0 and verify the magic in it."""
    frame = yield from _read(keys.receiving.cipher, send_first, len(MAGIC), "its first frame")
    _open_magic([keys], frame)


def _open_magic(possible: Sequence[Keys], frame: bytes) -> Keys:
    """Verify the magic in frame 0; return the keys that open it, and wipe all others."""
    found = None
    for keys in possible:
        plaintext = None if found else keys.receiving.open(frame)
        if plaintext is None:
            keys.wipe()
        elif hmac.compare_digest(plaintext, MAGIC):
            found = keys
        else:
            raise ProtocolError("wrong magic: incompatible version")
    if found is None:
        raise ProtocolError(NOT_OPENED)
    return found


def _receive(state: CipherState, size: int, what: str) -> _Frame:
    """Read the next frame, whose plaintext must be size bytes, and open it."""
    plaintext = state.open((yield from _read(state.cipher, b"", size, what)))
    if plaintext is None:
        raise ProtocolError(NOT_OPENED)
    return plaintext


def _read(cipher: Cipher, send_first: bytes, size: int, what: str) -> _Frame:
    """Send, then read the next frame, whose plaintext must be size bytes; return it still sealed.

    A frame of another length is rejected unread, so a pending handshake buffers a few dozen bytes
    at most.
    """
    prefix = yield send_first, PREFIX
    length = int.from_bytes(prefix, "big")
    if length != size + cipher.tag_size:
        raise ProtocolError(f"not a ttun peer: {what} has length {length}")
    return (yield b"", length)


def agreeable(wire: str, name: str | None, mtu: int) -> Terms:
    """Return the terms for these options. Raises UsageError if they contradict each other."""
    cipher = None if name is None else by_name(name)
    offers = [
        offer
        for offer in ([cipher] if cipher else fast())
        if mtu + offer.tag_size <= lib.TTUN_LENGTH_MAX
    ]
    if not offers:
        raise UsageError(f"MTU {mtu} is too large for {name}")
    if cipher is None or cipher.in_v1:
        return Terms(wire, cipher or EVERYWHERE, offers, mtu=mtu)
    if wire == "v1":
        raise UsageError(f"protocol v1 does not support {cipher.name} (remove --wire v1)")
    return Terms("x1", EVERYWHERE, offers, mtu=mtu, needs_x1=f"{cipher.name} requires x1")
