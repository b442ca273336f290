"""A peer independent of ttun: both protocols, implemented from docs/protocol.md.

It uses only hashlib, ``cryptography`` and aegis.py, and no code under test.
"""

from __future__ import annotations

import hashlib
import os
import socket
import struct

from aegis import AEGIS256
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

MAGIC = b"TTUN/v1\x00"
AEADS = {"chacha20-poly1305": ChaCha20Poly1305, "aes-256-gcm": AESGCM, "aegis-256": AEGIS256}
BITS = {"chacha20-poly1305": 1, "aes-256-gcm": 2, "aegis-256": 4}
PING, PONG, REKEY, SWITCH = b"\x02", b"\x03", b"\x04", b"\x05"


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
        """Run the handshake; behind: a packet to send after the magic, in the same write."""
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
        """Return the next echo reply; skip other packets, such as IPv6 multicast."""
        for _ in range(packets):
            packet = self.receive()
            if is_reply(packet, to):
                return packet
        raise AssertionError(f"no echo reply among {packets} packets")


class X1Peer(Peer):
    """One side of an x1 connection. The next keys stay in `next` until they are used."""

    def __init__(
        self,
        sock: socket.socket,
        psk: bytes = b"secret",
        ciphers: tuple[str, ...] = ("chacha20-poly1305",),
        features: int = 0,
    ) -> None:
        super().__init__(sock, psk)
        self.ciphers, self.features = ciphers, features
        self.passed_over: list[bytes] = []
        self.fresh()

    def fresh(self) -> bytes:
        """Generate an X25519 key; return the public key."""
        self.secret = X25519PrivateKey.generate()
        return self.secret.public_key().public_bytes_raw()

    def marked(self, role: int) -> bytes:
        r = os.urandom(10)
        return r + hashlib.blake2s(b"ttun/x1/mark" + bytes([role]) + r, key=self.k).digest()[:6]

    def offer(self, magic: bytes = b"TTUN/x1\0", public: bytes | None = None) -> bytes:
        bits = sum(BITS[name] for name in self.ciphers)
        public = self.fresh() if public is None else public
        return magic + bytes([bits, self.features, 0, 0]) + public

    def mix(self, public: bytes, said: bytes, key: bytes, person: bytes) -> None:
        """Derive the keys of both directions; use_next() activates them."""
        shared = self.secret.exchange(X25519PublicKey.from_public_bytes(public))
        self.p = hashlib.blake2b(shared + said, digest_size=32, key=key, person=person).digest()
        keys = [
            hashlib.blake2b(digest_size=32, key=self.p, person=person).digest()
            for person in (b"ttun/x1 c2s", b"ttun/x1 s2c")
        ]
        self.next_sending = Direction(self.cipher, keys[self.role], self.role)
        self.next_receiving = Direction(self.cipher, keys[1 - self.role], 1 - self.role)

    def agree(self, mine: bytes, theirs: bytes) -> None:
        common = mine[8] & theirs[8]
        self.cipher = next(name for name in reversed(list(BITS)) if common & BITS[name])
        said = theirs + mine if self.role else mine + theirs
        self.mix(theirs[12:], said, self.sk, b"ttun/x1 session")
        self.sending, self.receiving = self.next_sending, self.next_receiving

    def nonces(self, role: int) -> None:
        """role: 0 as the client, 1 as the server."""
        self.role = role
        mine = self.marked(role)
        if role == 0:
            self.sock.sendall(mine)
        theirs = self.exactly(16)
        if role == 1:
            self.sock.sendall(mine)
        nonces = (theirs, mine) if role else (mine, theirs)
        self.key(*nonces, sends=role)
        self.sk = blake2s(b"ttun/sk/v1" + self.k + nonces[0] + nonces[1])

    def shake(self, role: int, offer: bytes | None = None) -> None:
        """Run the x1 handshake; role as above. offer: replaces the valid one."""
        self.nonces(role)
        mine = self.offer() if offer is None else offer
        hello = self.sending.seal(MAGIC) + self.sending.seal(mine)
        if role == 0:
            self.sock.sendall(hello)
        assert self.receive() == MAGIC
        theirs = self.receive()
        if role == 1:
            self.sock.sendall(hello)
        self.agree(mine, theirs)

    def begin_rekey(self) -> None:
        """As the client, up to the point where the next keys are known."""
        mine = self.fresh()
        self.send(REKEY + mine)
        theirs = self.receive_control(REKEY)
        self.mix(theirs, mine + theirs, self.p, b"ttun/x1 rekey")

    def answer_rekey(self, public: bytes) -> None:
        """As the server, the same."""
        mine = self.fresh()
        self.mix(public, public + mine, self.p, b"ttun/x1 rekey")
        self.send(REKEY + mine)

    def switch(self) -> None:
        """Send SWITCH, the last frame under the old key."""
        self.send(SWITCH)
        self.sending = self.next_sending

    def switched(self) -> None:
        """Receive SWITCH; later frames use the next key."""
        assert self.receive_control(SWITCH) == b""
        self.receiving = self.next_receiving

    def receive_control(self, kind: bytes) -> bytes:
        """The body of the next control frame of a kind; skip other frames."""
        while True:
            plaintext = self.passed_over.pop(0) if self.passed_over else self.receive()
            if plaintext[:1] == kind:
                return plaintext[1:]

    def receive_packet(self) -> bytes:
        """The next packet, whole ones with the three bytes in front.

        A rekey may begin before it: receive_control() gets those frames nevertheless.
        """
        while True:
            plaintext = self.receive()
            if plaintext[0] >> 4 in (4, 6) or plaintext[0] == 1:
                return plaintext
            if plaintext[:1] in (REKEY, SWITCH):
                self.passed_over.append(plaintext)


def checksum(data: bytes) -> int:
    """RFC 1071, a simple implementation."""
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
    """Return whether it is the complete echo reply to that request."""
    return (
        packet[:1] == b"\x45"
        and packet[12:16] == request[16:20]
        and packet[16:20] == request[12:16]
        and packet[20] == 0
        and packet[24:] == request[24:]
        and checksum(packet[20:]) == 0
    )
