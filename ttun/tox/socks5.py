"""The server side of SOCKS5, without I/O.

A generator as in ``ttun.handshake``: it yields what to send and how many bytes it needs next, is
sent exactly those, and returns the target. It supports CONNECT without authentication; names are
passed on unresolved. A SOCKS4 client gets a SOCKS4 rejection.

Sources: RFC 1928; Ying-Da Lee, SOCKS: A protocol for TCP proxy across firewalls (SOCKS4).
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
    """The request cannot be fulfilled. reply: what to send before closing."""

    def __init__(self, message: str, reply: bytes) -> None:
        """Store the reply."""
        super().__init__(message)
        self.reply = reply


def reply(reason: int | None) -> bytes:
    """Return the reply to a request. reason: of DENYTUNNEL, None if the tunnel is open."""
    return _reply(REPLIES.get(reason, FAILED))


def _reply(code: int) -> bytes:
    """Return a reply. The address bound at the other end is unknown, so it is all zeros."""
    return bytes([VERSION, code, 0, IPV4]) + bytes(6)


def server() -> Steps:
    """Negotiate with a client and return its target. Raises ProtocolError, Refusal among them."""
    version, count = yield b"", 2
    if version == SOCKS4:
        why = "SOCKS4 is not supported (use SOCKS5)"
        raise Refusal(why, bytes([0, SOCKS4_REJECTED]) + bytes(6))
    if version != VERSION:
        raise ProtocolError(f"unknown version {version:#04x}")
    methods = yield b"", count
    if NO_AUTHENTICATION not in methods:
        raise Refusal("the client requires authentication", bytes([VERSION, NO_METHOD]))
    version, command, _, kind = yield bytes([VERSION, NO_AUTHENTICATION]), 4
    if version != VERSION:
        raise ProtocolError(f"request with version {version}")
    if command != CONNECT:
        raise Refusal(f"command {command} is not supported", _reply(COMMAND_UNKNOWN))
    if kind == IPV4:
        host = socket.inet_ntop(socket.AF_INET, (yield b"", 4))
    elif kind == IPV6:
        host = str(ipaddress.IPv6Address((yield b"", 16)))
    elif kind == NAME:
        (length,) = yield b"", 1
        name = yield b"", length
        host = name.decode("ascii", errors="replace")
        if not host.isprintable() or not host.isascii() or not host:
            raise Refusal("invalid name", _reply(HOST_UNREACHABLE))
    else:
        raise Refusal(f"unknown address type {kind}", _reply(ADDRESS_UNKNOWN))
    port = int.from_bytes((yield b"", 2), "big")
    if port == 0:
        raise Refusal("invalid port 0", _reply(FAILED))
    return host, port
