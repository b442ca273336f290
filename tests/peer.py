"""A second peer, independent of ttun: wire v1 written from docs/protocol.md.

On hashlib and ``cryptography`` alone; it shares no line with what it tests.
"""

from __future__ import annotations

import hashlib
import os
import socket
import struct

from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

MAGIC = b"TTUN/v1\x00"
AEADS = {"chacha20-poly1305": ChaCha20Poly1305, "aes-256-gcm": AESGCM}


def blake2s(data: bytes) -> bytes:
    return hashlib.blake2s(data).digest()


class Direction:
    """One direction of a session."""

    def __init__(self, cipher: str, key: bytes, number: int) -> None:
        self.aead = AEADS[cipher](key)
        self.number = number
        self.frames = 0

    def nonce(self) -> bytes:
        nonce = struct.pack(">B3xQ", self.number, self.frames)
        self.frames += 1
        return nonce

    def seal(self, packet: bytes) -> bytes:
        ciphertext = self.aead.encrypt(self.nonce(), packet, None)
        return struct.pack(">H", len(ciphertext)) + ciphertext

    def open(self, ciphertext: bytes) -> bytes:
        return self.aead.decrypt(self.nonce(), ciphertext, None)


class Peer:
    """One side of a connection."""

    def __init__(self, sock: socket.socket, psk: bytes, cipher: str = "chacha20-poly1305") -> None:
        self.sock = sock
        self.sock.settimeout(15)
        self.k = blake2s(b"ttun/psk/v1" + psk)
        self.cipher = cipher

    def key(self, client_nonce: bytes, server_nonce: bytes, *, sends: int) -> None:
        sk = blake2s(b"ttun/sk/v1" + self.k + client_nonce + server_nonce)
        self.sending = Direction(self.cipher, sk, sends)
        self.receiving = Direction(self.cipher, sk, 1 - sends)

    def exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self.sock.recv(size - len(data))
            if not part:
                raise EOFError(f"{len(data)} of {size} bytes")
            data += part
        return data

    def send(self, packet: bytes) -> None:
        self.sock.sendall(self.sending.seal(packet))

    def receive(self) -> bytes:
        (length,) = struct.unpack(">H", self.exactly(2))
        return self.receiving.open(self.exactly(length))

    def nonces_as_client(self) -> None:
        mine = os.urandom(16)
        self.sock.sendall(mine)
        self.key(mine, self.exactly(16), sends=0)

    def handshake_as_client(self, magic: bytes = MAGIC, behind: bytes | None = None) -> None:
        """Shake hands; behind: a packet to send right behind the magic, in the same write."""
        self.nonces_as_client()
        data = self.sending.seal(magic)
        self.sock.sendall(data if behind is None else data + self.sending.seal(behind))
        assert self.receive() == MAGIC

    def handshake_as_server(self, magic: bytes = MAGIC) -> None:
        theirs = self.exactly(16)
        mine = os.urandom(16)
        self.sock.sendall(mine)
        self.key(theirs, mine, sends=1)
        assert self.receive() == MAGIC
        self.send(magic)

    def receive_reply(self, to: bytes, packets: int = 50) -> bytes:
        """Return the next packet that answers an echo request; others (IPv6's chatter) may come."""
        for _ in range(packets):
            packet = self.receive()
            if is_reply(packet, to):
                return packet
        raise AssertionError(f"no echo reply among {packets} packets")


def checksum(data: bytes) -> int:
    """RFC 1071, in the slow and obvious way."""
    if len(data) % 2:
        data += b"\0"
    total = sum(data[i] << 8 | data[i + 1] for i in range(0, len(data), 2))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return 0xFFFF - total


def echo_request(source: str, destination: str, body: bytes, identifier: int = 7) -> bytes:
    """An IPv4 packet with an ICMP echo request."""
    icmp = struct.pack(">BBHHH", 8, 0, 0, identifier, 1) + body
    icmp = icmp[:2] + struct.pack(">H", checksum(icmp)) + icmp[4:]
    addresses = socket.inet_aton(source) + socket.inet_aton(destination)
    header = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(icmp), 1, 0, 64, 1, 0) + addresses
    header = header[:10] + struct.pack(">H", checksum(header)) + header[12:]
    return header + icmp


def is_reply(packet: bytes, request: bytes) -> bool:
    """Is it the echo reply to that request, whole?"""
    return (
        packet[:1] == b"\x45"
        and packet[12:16] == request[16:20]
        and packet[16:20] == request[12:16]
        and packet[20] == 0
        and packet[24:] == request[24:]
        and checksum(packet[20:]) == 0
    )
