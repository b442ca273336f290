"""The AEAD ciphers, and the state of one direction of a session.

The ciphers are libsodium's. The codec calls them directly by address, so packets are never handled
in Python.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from ttun import sodium
from ttun._codec import ffi, lib
from ttun.errors import TtunError, UsageError

PREFIX: int = lib.TTUN_PREFIX
TO_SERVER, TO_CLIENT = 0, 1  # the direction byte of frame nonces, and of the marks in x1.py


class Cipher(NamedTuple):
    """An AEAD with a 32-byte key."""

    name: str  # on the command line
    function: str  # prefix of libsodium's function names
    tag_size: int  # bytes
    bit: int  # in a protocol x1 offer
    in_v1: bool
    without_aes: str  # on a processor without AES instructions: "fast", "slow" or "absent"


# In order of preference. RFC 10032, NIST SP 800-38D, RFC 8439.
CIPHERS = {
    cipher.name: cipher
    for cipher in (
        Cipher("aegis-256", "crypto_aead_aegis256", 32, 4, False, "slow"),
        Cipher("aes-256-gcm", "crypto_aead_aes256gcm", 16, 2, True, "absent"),
        Cipher("chacha20-poly1305", "crypto_aead_chacha20poly1305_ietf", 16, 1, True, "fast"),
    )
}
EVERYWHERE = CIPHERS["chacha20-poly1305"]  # always available: used until the ends have agreed


def by_name(name: str) -> Cipher:
    """Return the cipher with this name.

    Raises UsageError for an unknown name, TtunError where the processor lacks the cipher.
    """
    if name not in CIPHERS:
        raise UsageError(f"unknown cipher {name!r}: choose {' or '.join(reversed(CIPHERS))}")
    if CIPHERS[name].without_aes == "absent" and not sodium.HAS_AES:
        raise TtunError(
            f"{name} requires AES instructions, which this processor lacks "
            f"(use -m {EVERYWHERE.name} on both ends)"
        )
    return CIPHERS[name]


def fast() -> list[Cipher]:
    """Return the ciphers that are fast on this processor, in order of preference."""
    return [cipher for cipher in CIPHERS.values() if sodium.HAS_AES or cipher.without_aes == "fast"]


class CipherState:
    """One direction of a session: a key and a frame counter.

    ``c`` is the codec's ``struct ttun_cipher_state``; the codec wipes it before freeing it.
    ``direction`` is TO_SERVER or TO_CLIENT; ``key`` is 32 bytes.
    """

    def __init__(self, cipher: Cipher, direction: int, key: bytes | bytearray) -> None:
        """Set the key; the next frame is number 0."""
        self.cipher = cipher
        state = lib.ttun_cipher_new(
            *_functions(cipher), cipher.tag_size, direction, ffi.from_buffer(key)
        )
        if state == ffi.NULL:
            raise MemoryError
        self.c: Any = ffi.gc(state, lib.ttun_cipher_free)

    def seal(self, packet: bytes) -> bytes:
        """Return the next frame: prefix, ciphertext, tag. Raises ValueError if it is too large."""
        frame = ffi.new("uint8_t[]", PREFIX + len(packet) + self.cipher.tag_size)
        size = lib.ttun_seal(self.c, frame, ffi.from_buffer(packet), len(packet))
        if size == 0:
            raise ValueError(f"packet too large for a frame: {len(packet)} bytes")
        return bytes(ffi.buffer(frame, size))

    def open(self, ciphertext: bytes) -> bytes | None:
        """Decrypt a frame without its prefix; return None if authentication fails."""
        buffer = ffi.new("uint8_t[]", ciphertext)
        size = lib.ttun_open(self.c, buffer, len(ciphertext))
        return None if size < 0 else bytes(ffi.buffer(buffer, size))

    def wipe(self) -> None:
        """Overwrite the key now, even if other references to it remain."""
        lib.ttun_cipher_wipe(self.c)


def _functions(cipher: Cipher) -> tuple[Any, Any, Any]:
    """Return a cipher's encrypt, decrypt and expand functions for the codec.

    libsodium can expand the key of some ciphers once instead of once per packet. PyNaCl has no
    Python bindings for these functions, but its extension may export them.
    """
    names = [cipher.function + suffix for suffix in ("_encrypt_afternm", "_decrypt_afternm")]
    library = os.fsencode(sodium.FILE)
    found = [lib.ttun_find_function(library, name.encode()) for name in names]
    expand = lib.ttun_find_function(library, f"{cipher.function}_beforenm".encode())
    if expand != ffi.NULL and all(function != ffi.NULL for function in found):
        encrypt, decrypt = found
    else:
        expand = ffi.NULL
        encrypt, decrypt = (_address(cipher.function + end) for end in ("_encrypt", "_decrypt"))
    return (
        ffi.cast("ttun_encrypt", encrypt),
        ffi.cast("ttun_decrypt", decrypt),
        ffi.cast("ttun_expand", expand),
    )


def _address(function: str) -> int:
    """Return the address of a libsodium function that PyNaCl binds."""
    return int(sodium.ffi.cast("uintptr_t", sodium.ffi.addressof(sodium.lib, function)))
