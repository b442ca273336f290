"""The libsodium that PyNaCl carries inside its extension, and secrets in memory that is wiped.

Its functions are plain C: the ciphers' addresses go to the codec (cipher.py), the others are called
here on memory of our own. ``nacl._sodium`` is private to PyNaCl; this file is the only one that
reaches into it.
"""

from __future__ import annotations

from ttun._codec import lib as codec
from ttun.errors import TtunError

try:
    from nacl import _sodium  # type: ignore[attr-defined]

    ffi, lib, FILE = _sodium.ffi, _sodium.lib, str(_sodium.__file__)
    # sodium_init looks at the processor; before it, AES is reported missing everywhere.
    HAS_AES = lib.sodium_init() >= 0 and bool(lib.crypto_aead_aes256gcm_is_available())
    lib.crypto_aead_aegis256_encrypt  # noqa: B018 - is it there at all?
except (ImportError, AttributeError) as problem:
    raise TtunError(
        f"PyNaCl 1.6 or newer with its own libsodium required: {problem} (pip install -U pynacl)"
    ) from None

KEY_SIZE: int = codec.TTUN_KEY_SIZE


class Secret(bytearray):
    """Bytes that are wiped when they go away, and that nothing shows. Not to be resized."""

    def wipe(self) -> None:
        """Overwrite them now."""
        self[:] = bytes(len(self))  # of the same size: it stays where it is

    def __del__(self) -> None:
        """Overwrite them."""
        self.wipe()

    def __repr__(self) -> str:
        """Show nothing of them."""
        return "<secret>"

    __str__ = __repr__  # bytearray has one of its own


class KeyPair:
    """A fresh X25519 key pair (RFC 7748)."""

    def __init__(self) -> None:
        """Make it from the system's random numbers."""
        self._secret = Secret(KEY_SIZE)
        public = bytearray(KEY_SIZE)
        lib.randombytes(ffi.from_buffer(self._secret), KEY_SIZE)
        lib.crypto_scalarmult_base(ffi.from_buffer(public), ffi.from_buffer(self._secret))
        self.public = bytes(public)

    def shared(self, public: bytes) -> Secret:
        """Return what both sides compute, and wipe the secret half.

        Raises ValueError for a public key of low order, whose result is all zeros.
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
