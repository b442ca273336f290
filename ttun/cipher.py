"""The AEAD ciphers, and one direction of a session keyed with one of them.

The ciphers are libsodium's. Their addresses go straight to the codec, so no packet meets Python.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from ttun import sodium
from ttun._codec import ffi, lib
from ttun.errors import TtunError, UsageError

PREFIX: int = lib.TTUN_PREFIX


class Cipher(NamedTuple):
    """An AEAD with a 32-byte key: its name on the command line, in libsodium, its tag in bytes."""

    name: str
    function: str
    tag_size: int


CIPHERS = {
    cipher.name: cipher
    for cipher in (
        # RFC 8439
        Cipher("chacha20-poly1305", "crypto_aead_chacha20poly1305_ietf", 16),
        # NIST SP 800-38D
        Cipher("aes-256-gcm", "crypto_aead_aes256gcm", 16),
        # RFC 10032; on wire x1 alone
        Cipher("aegis-256", "crypto_aead_aegis256", 32),
    )
}


def find(name: str) -> Cipher:
    """Return the cipher of that name.

    Raises UsageError for a name that is none, TtunError where the processor lacks it.
    """
    if name not in CIPHERS:
        raise UsageError(f"unknown cipher {name!r}: choose {' or '.join(CIPHERS)}")
    if name == "aes-256-gcm" and not sodium.HAS_AES:
        raise TtunError(
            f"{name} needs AES instructions, which this processor lacks: "
            "use -m chacha20-poly1305 on both ends"
        )
    return CIPHERS[name]


def fast() -> list[Cipher]:
    """Return the ciphers that run well on this processor, the best first."""
    names = ["aegis-256", "aes-256-gcm"] if sodium.HAS_AES else []
    return [CIPHERS[name] for name in [*names, "chacha20-poly1305"]]


class CipherState:
    """One direction of a session: a key and the counter of its frames.

    ``c`` is the ``struct ttun_cipher_state`` for the codec. ``direction`` is 0 for frames from
    client to server, 1 for the others; ``key`` has 32 bytes.
    """

    def __init__(self, cipher: Cipher, direction: int, key: bytes | bytearray) -> None:
        """Key it; the next frame is number 0."""
        self.cipher = cipher
        state = lib.ttun_cipher_new(
            *_functions(cipher), cipher.tag_size, direction, ffi.from_buffer(key)
        )
        if state == ffi.NULL:
            raise MemoryError
        self.c: Any = ffi.gc(state, lib.ttun_cipher_free)

    def seal(self, packet: bytes) -> bytes:
        """Return the next frame: prefix, ciphertext and tag. ValueError if it fits no frame."""
        frame = ffi.new("uint8_t[]", PREFIX + len(packet) + self.cipher.tag_size)
        size = lib.ttun_seal(self.c, frame, ffi.from_buffer(packet), len(packet))
        if size == 0:
            raise ValueError(f"a packet of {len(packet)} bytes fits no frame")
        return bytes(ffi.buffer(frame, size))

    def open(self, ciphertext: bytes) -> bytes | None:
        """Return the packet in a frame without its prefix, or None if it fails authentication."""
        buffer = ffi.new("uint8_t[]", ciphertext)
        size = lib.ttun_open(self.c, buffer, len(ciphertext))
        return None if size < 0 else bytes(ffi.buffer(buffer, size))

    def wipe(self) -> None:
        """Overwrite the key now, not when the collector comes by."""
        lib.ttun_cipher_wipe(self.c)


def _functions(cipher: Cipher) -> tuple[Any, Any, Any]:
    """Return encrypt, decrypt and expand of a cipher as the codec takes them.

    Some ciphers do work that depends on the key alone; libsodium can do that once and not for each
    packet. PyNaCl does not name those functions in Python, but its extension may export them.
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
    """Return the address of a function of libsodium that PyNaCl names."""
    return int(sodium.ffi.cast("uintptr_t", sodium.ffi.addressof(sodium.lib, function)))
