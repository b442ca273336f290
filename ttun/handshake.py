"""Prove the pre-shared key to each other: bytes in, bytes out, no socket.

Wire v1, ``||`` is concatenation::

    client                                        server
      Nc, 16 random bytes               -->
                                        <--       Ns, 16 random bytes
      frame 0: the magic                -->       opens and compares
      opens and compares                <--       frame 0: the magic

    K = blake2s("ttun/psk/v1" || psk)      SK = blake2s("ttun/sk/v1" || K || Nc || Ns)

Each side is a generator. It yields what to send and how many bytes it wants next, is sent exactly
those, and returns the keys. It raises ProtocolError when the peer is not one of ours. The caller
owns the socket and the 10 seconds that all of it may take.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Generator
from dataclasses import dataclass

from ttun.cipher import PREFIX, Cipher, CipherState
from ttun.errors import ProtocolError

TIMEOUT = 10.0  # seconds
NONCE_SIZE = 16
MAGIC = b"TTUN/v1\0"
TO_SERVER, TO_CLIENT = 0, 1  # the direction byte of a frame's nonce


@dataclass
class Keys:
    """What a handshake gives: the state of each direction, after the frames it has used."""

    sending: CipherState
    receiving: CipherState
    wire: str = "v1"

    def wipe(self) -> None:
        """Overwrite both keys."""
        self.sending.wipe()
        self.receiving.wipe()


# (bytes to send, bytes wanted next) -> those bytes; at the end, the keys
Steps = Generator[tuple[bytes, int], bytes, Keys]
_Step = Generator[tuple[bytes, int], bytes, None]


def psk_key(psk: bytes) -> bytes:
    """Return K, the 32-byte key behind a pre-shared key of any length."""
    return hashlib.blake2s(b"ttun/psk/v1" + psk).digest()


def session_key(k: bytes, client_nonce: bytes, server_nonce: bytes) -> bytes:
    """Return SK, the 32-byte key of one session."""
    return hashlib.blake2s(b"ttun/sk/v1" + k + client_nonce + server_nonce).digest()


def client(k: bytes, cipher: Cipher) -> Steps:
    """Shake hands as the client."""
    client_nonce = os.urandom(NONCE_SIZE)
    server_nonce = yield client_nonce, NONCE_SIZE
    sk = session_key(k, client_nonce, server_nonce)
    keys = Keys(CipherState(cipher, TO_SERVER, sk), CipherState(cipher, TO_CLIENT, sk))
    yield from _receive_magic(keys.receiving, keys.sending.seal(MAGIC))
    return keys


def server(k: bytes, cipher: Cipher) -> Steps:
    """Shake hands as the server, which sends no frame before it has verified the client's."""
    client_nonce = yield b"", NONCE_SIZE
    server_nonce = os.urandom(NONCE_SIZE)
    sk = session_key(k, client_nonce, server_nonce)
    keys = Keys(CipherState(cipher, TO_CLIENT, sk), CipherState(cipher, TO_SERVER, sk))
    yield from _receive_magic(keys.receiving, server_nonce)
    yield keys.sending.seal(MAGIC), 0
    return keys


def _receive_magic(state: CipherState, send_first: bytes) -> _Step:
    """Send, then read frame 0 and make sure that it holds the magic.

    A frame of another length cannot hold it, so the length is refused before a byte of the frame
    is read: an unfinished handshake never keeps more than a few dozen bytes.
    """
    prefix = yield send_first, PREFIX
    length = int.from_bytes(prefix, "big")
    if length != len(MAGIC) + state.cipher.tag_size:
        raise ProtocolError(f"not a ttun peer: its first frame has a length of {length}")
    ciphertext = yield b"", length
    plaintext = state.open(ciphertext)
    if plaintext is None:
        raise ProtocolError("wrong key, or another cipher than ours")
    if not hmac.compare_digest(plaintext, MAGIC):
        raise ProtocolError("wrong magic: another version of ttun")
