"""A SOCKS5 server's side of the conversation: bytes in, bytes out, no socket.

A generator as in ``ttun.handshake``: it yields what to send and how many bytes it wants, is sent
exactly those, and returns the target. CONNECT without authentication is all there is to it; names
go to the other end unresolved. Who speaks SOCKS4 is refused in SOCKS4.

Sources: RFC 1928; the SOCKS4 protocol, Ying-Da Lee, for the version and the code of that refusal.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Generator

from ttun.errors import ProtocolError
from ttun.tox import packet

VERSION, SOCKS4 = 5, 4
NO_AUTHENTICATION, NO_METHOD = 0, 0xFF
CONNECT = 1
IPV4, NAME, IPV6 = 1, 3, 4
SUCCEEDED, FAILED, NOT_ALLOWED, HOST_UNREACHABLE, REFUSED = 0, 1, 2, 4, 5
COMMAND_UNKNOWN, ADDRESS_UNKNOWN = 7, 8
SOCKS4_REJECTED = 91

REPLIES = {
    None: SUCCEEDED,
    packet.REFUSED: REFUSED,
    packet.UNREACHABLE: HOST_UNREACHABLE,
    packet.NAME: HOST_UNREACHABLE,
    packet.RULE: NOT_ALLOWED,
    packet.FULL: FAILED,
}

Steps = Generator["tuple[bytes, int]", bytes, "tuple[str, int]"]


class Refusal(ProtocolError):
    """What was asked for is not to be had. reply: what to send before closing."""

    def __init__(self, message: str, reply: bytes) -> None:
        """Say what and answer with what."""
        super().__init__(message)
        self.reply = reply


def reply(reason: int | None) -> bytes:
    """Return the answer to a request: reason is one of DENYTUNNEL, None if the tunnel is open."""
    return _reply(REPLIES.get(reason, FAILED))


def _reply(code: int) -> bytes:
    """Return an answer. The address that was bound at the other end is not known: all zeros."""
    return bytes([VERSION, code, 0, IPV4]) + bytes(6)


def server() -> Steps:
    """Talk to a client until it has said where to. Raises ProtocolError, Refusal among them."""
    version, count = yield b"", 2
    if version == SOCKS4:
        raise Refusal("it speaks SOCKS4, this is SOCKS5", bytes([0, SOCKS4_REJECTED]) + bytes(6))
    if version != VERSION:
        raise ProtocolError(f"not a SOCKS5 client: it began with {version:#04x}")
    methods = yield b"", count
    if NO_AUTHENTICATION not in methods:
        raise Refusal("it wants to authenticate", bytes([VERSION, NO_METHOD]))
    version, command, _, kind = yield bytes([VERSION, NO_AUTHENTICATION]), 4
    if version != VERSION:
        raise ProtocolError(f"a SOCKS5 request of version {version}")
    if command != CONNECT:
        raise Refusal(f"the command {command} is not CONNECT", _reply(COMMAND_UNKNOWN))
    if kind == IPV4:
        host = socket.inet_ntop(socket.AF_INET, (yield b"", 4))
    elif kind == IPV6:
        host = str(ipaddress.IPv6Address((yield b"", 16)))
    elif kind == NAME:
        (length,) = yield b"", 1
        name = yield b"", length
        host = name.decode("ascii", errors="replace")
        if not host.isprintable() or not host.isascii() or not host:
            raise Refusal("the name in its request is none", _reply(HOST_UNREACHABLE))
    else:
        raise Refusal(f"the address type {kind} is unknown", _reply(ADDRESS_UNKNOWN))
    port = int.from_bytes((yield b"", 2), "big")
    if port == 0:
        raise Refusal("port 0 cannot be connected to", _reply(FAILED))
    return host, port
