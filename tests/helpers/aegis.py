"""AEGIS-256 from RFC 10032, in the slow and obvious way: independent of libsodium."""

from __future__ import annotations

import struct

C0 = bytes.fromhex("000101020305080d1522375990e97962")
C1 = bytes.fromhex("db3d18556dc22ff12011314273b528dd")


def _double(a: int) -> int:
    return (a << 1) ^ (0x11B if a & 0x80 else 0)


def _sbox() -> list[int]:
    """FIPS 197, 5.1.1: the inverse in GF(2^8), then an affine map."""
    powers, a = [], 1
    for _ in range(255):
        powers.append(a)
        a ^= _double(a)  # times 3, which generates them all
    inverse = {powers[i]: powers[-i % 255] for i in range(255)}
    box = []
    for value in range(256):
        b = inverse.get(value, 0)
        box.append(0x63)
        for shift in range(5):
            box[-1] ^= (b << shift | b >> (8 - shift)) & 0xFF
    return box


SBOX = _sbox()


def _column(row: int, byte: int) -> int:
    """What one byte contributes to its column, as 32 bits."""
    s = SBOX[byte]
    parts = [_double(s), s, s, _double(s) ^ s]
    return int.from_bytes(bytes(parts[(i - row) % 4] for i in range(4)), "big")


TABLES = [[_column(row, byte) for byte in range(256)] for row in range(4)]


def aes_round(block: bytes, key: int) -> int:
    """SubBytes, ShiftRows, MixColumns, AddRoundKey."""
    out = 0
    for column in range(4):
        word = 0
        for row in range(4):
            word ^= TABLES[row][block[4 * ((column + row) % 4) + row]]
        out = out << 32 | word
    return out ^ key


def _int(block: bytes) -> int:
    return int.from_bytes(block, "big")


class AEGIS256:
    """The interface of ``cryptography``'s AEADs. A nonce is filled up to 32 bytes with zeros."""

    def __init__(self, key: bytes) -> None:
        self.k0, self.k1 = _int(key[:16]), _int(key[16:])

    def _begin(self, nonce: bytes) -> None:
        nonce = nonce.ljust(32, b"\0")
        n0, n1, c0, c1 = _int(nonce[:16]), _int(nonce[16:]), _int(C0), _int(C1)
        k0, k1 = self.k0, self.k1
        self.s = [k0 ^ n0, k1 ^ n1, c1, c0, k0 ^ c0, k1 ^ c1]
        for _ in range(4):
            for m in (k0, k1, k0 ^ n0, k1 ^ n1):
                self._update(m)

    def _update(self, m: int) -> None:
        s = self.s
        blocks = [x.to_bytes(16, "big") for x in s]
        self.s = [aes_round(blocks[i - 1], s[i] ^ (m if i == 0 else 0)) for i in range(6)]

    def _stream(self) -> int:
        s = self.s
        return s[1] ^ s[4] ^ s[5] ^ (s[2] & s[3])

    def _tag(self, ad_size: int, size: int) -> bytes:
        t = self.s[3] ^ _int(struct.pack("<QQ", ad_size * 8, size * 8))
        for _ in range(7):
            self._update(t)
        s = self.s
        return b"".join((s[i] ^ s[i + 1] ^ s[i + 2]).to_bytes(16, "big") for i in (0, 3))

    def _crypt(self, nonce: bytes, data: bytes, ad: bytes | None, encrypt: bool) -> tuple:
        self._begin(nonce)
        ad = ad or b""
        for start in range(0, len(ad), 16):
            self._update(_int(ad[start : start + 16].ljust(16, b"\0")))
        out = b""
        for start in range(0, len(data), 16):
            part = data[start : start + 16]
            mixed = (_int(part.ljust(16, b"\0")) ^ self._stream()).to_bytes(16, "big")[: len(part)]
            self._update(_int((part if encrypt else mixed).ljust(16, b"\0")))
            out += mixed
        return out, self._tag(len(ad), len(data))

    def encrypt(self, nonce: bytes, data: bytes, ad: bytes | None) -> bytes:
        return b"".join(self._crypt(nonce, data, ad, True))

    def decrypt(self, nonce: bytes, data: bytes, ad: bytes | None) -> bytes:
        plaintext, tag = self._crypt(nonce, data[:-32], ad, False)
        if tag != data[-32:]:
            raise ValueError("wrong tag")
        return bytes(plaintext)
