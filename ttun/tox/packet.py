"""Tuntox packets: bytes in, fields out.

At most 1373 bytes, all fields big-endian::

    u16 magic 0xA26B | u16 type | u16 tunnel | u16 length | length bytes

protocol.py says what each type means, docs/tox.md has the details.
"""

from __future__ import annotations

import struct

from ttun.errors import ProtocolError

HEADER = struct.Struct(">HHHH")
U32 = struct.Struct(">I")
MAGIC, MAGIC_VERSION_1 = 0xA26B, 0xA26A
MAX_DATA = 1365  # bytes in one packet

PING, PONG = 0x0108, 0x0100
HELLO = 0x0120
TCP, TCP_FIN, REQUESTTUNNEL, ACKTUNNEL = 0x0600, 0x0601, 0x0602, 0x0610
DENYTUNNEL, WINDOW, EOF = 0x0604, 0x0606, 0x0608

REFUSED, UNREACHABLE, NAME, RULE, FULL = 1, 2, 3, 4, 5  # reasons of DENYTUNNEL
OFFLINE, SILENT, LEFT = -1, -2, -3  # never on the wire: a client's own
REASONS = {
    OFFLINE: "the server is not online",
    SILENT: "the server does not answer",
    LEFT: "who asked for it hung up",
    REFUSED: "the target refused the connection",
    UNREACHABLE: "the target cannot be reached",
    NAME: "the target's name cannot be resolved",
    RULE: "the server's rules do not allow this target",
    FULL: "the server has too many connections",
}


def describe(reason: int) -> str:
    """Return why a connection was not made, in words."""
    return REASONS.get(reason, f"reason {reason}")


def pack(kind: int, tunnel: int = 0, data: bytes | memoryview = b"") -> bytes:
    """Return a packet."""
    return HEADER.pack(MAGIC, kind, tunnel, len(data)) + data


def unpack(packet: bytes) -> tuple[int, int, bytes]:
    """Return a packet's type, tunnel and data. Raises ProtocolError."""
    if len(packet) < HEADER.size:
        raise ProtocolError(f"a packet of {len(packet)} bytes, less than its header")
    magic, kind, tunnel, length = HEADER.unpack_from(packet)
    if magic == MAGIC_VERSION_1:
        raise ProtocolError("it speaks version 1 of the Tuntox protocol: too old")
    if magic != MAGIC:
        raise ProtocolError(f"a packet with the magic {magic:#06x}")
    if len(packet) - HEADER.size < length:
        raise ProtocolError(f"a packet of {len(packet)} bytes that claims {length} of data")
    return kind, tunnel, packet[HEADER.size : HEADER.size + length]
