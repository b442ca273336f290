"""The libsodium bundled with PyNaCl, and secrets in memory that is wiped.

The codec gets the addresses of the cipher functions (cipher.py); the other functions are called
here, on buffers that are wiped after use. ``nacl._sodium`` is private to PyNaCl; only this file
uses it.
"""

from __future__ import annotations

from ttun._codec import lib as codec
from ttun.errors import TtunError

try:
    from nacl import _sodium  # type: ignore[attr-defined]

    ffi, lib, FILE = _sodium.ffi, _sodium.lib, str(_sodium.__file__)
    # sodium_init detects the CPU features; before it, AES is reported as missing.
    HAS_AES = lib.sodium_init() >= 0 and bool(lib.crypto_aead_aes256gcm_is_available())
    lib.crypto_aead_aegis256_encrypt  # noqa: B018 - check that it exists
except (ImportError, AttributeError) as problem:
    raise TtunError(
        f"PyNaCl 1.6 or newer with its own libsodium required: {problem} (pip install -U pynacl)"
    ) from None

KEY_SIZE: int = codec.TTUN_KEY_SIZE


class Secret(bytearray):
    """A buffer that is wiped when freed and never printed. Do not resize it."""

    def wipe(self) -> None:
        """Overwrite it now."""
        self[:] = bytes(len(self))  # same size: no reallocation

    def __del__(self) -> None:
        """Overwrite it."""
        self.wipe()

    def __repr__(self) -> str:
        """Do not show the content."""
        return "<secret>"

    __str__ = __repr__  # bytearray defines its own


class KeyPair:
    """A fresh X25519 key pair (RFC 7748)."""

    def __init__(self) -> None:
        """Generate it."""
        self._secret = Secret(KEY_SIZE)
        public = bytearray(KEY_SIZE)
        lib.randombytes(ffi.from_buffer(self._secret), KEY_SIZE)
        lib.crypto_scalarmult_base(ffi.from_buffer(public), ffi.from_buffer(self._secret))
        self.public = bytes(public)

    def shared(self, public: bytes) -> Secret:
        """Return the shared secret, 32 bytes, and wipe the private key.

        Raises ValueError for a low-order public key, for which it would be all zeros.
        """
        shared = Secret(KEY_SIZE)
        code = lib.crypto_scalarmult(
            ffi.from_buffer(shared), ffi.from_buffer(self._secret), ffi.from_buffer(public)
        )
        self._secret.wipe()
        if code != 0:
            raise ValueError("low-order public key")
        return shared


def blake2b(data: bytes | bytearray, key: bytes | bytearray, person: bytes) -> Secret:
    """Return BLAKE2b-256 of data under a key of 32 bytes and up to 16 bytes of personalisation."""
    out = Secret(KEY_SIZE)
    code = lib.crypto_generichash_blake2b_salt_personal(
        ffi.from_buffer(out), len(out), ffi.from_buffer(data), len(data),
        ffi.from_buffer(key), len(key), bytes(16), person.ljust(16, b"\0"),
    )  # fmt: skip
    assert code == 0
    return out
