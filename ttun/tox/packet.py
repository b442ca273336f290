"""Pack and unpack Tuntox packets.

A packet has at most 1373 bytes, all fields big-endian::

    u16 magic 0xA26B | u16 type | u16 tunnel | u16 length | length bytes

See protocol.py for the meaning of each type and docs/tox-protocol.md for the details.
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
OFFLINE, SILENT, LEFT = -1, -2, -3  # the client's own, never on the wire
REASONS = {
    OFFLINE: "the server is offline",
    SILENT: "no answer from the server",
    LEFT: "the application closed the connection",
    REFUSED: "the target refused the connection",
    UNREACHABLE: "the target is unreachable",
    NAME: "the target's name cannot be resolved",
    RULE: "the server's rules do not allow this target",
    FULL: "the server has too many connections",
}


def describe(reason: int) -> str:
    """Return the text for a reason."""
    return REASONS.get(reason, f"reason {reason}")


def pack(kind: int, tunnel: int = 0, data: bytes | memoryview = b"") -> bytes:
    """Return a packet."""
    return HEADER.pack(MAGIC, kind, tunnel, len(data)) + data


def unpack(packet: bytes) -> tuple[int, int, bytes]:
    """Return a packet's type, tunnel and data. Raises ProtocolError."""
    if len(packet) < HEADER.size:
        raise ProtocolError(f"{len(packet)} bytes are too short for a header")
    magic, kind, tunnel, length = HEADER.unpack_from(packet)
    if magic == MAGIC_VERSION_1:
        raise ProtocolError("version 1 of the Tuntox protocol is not supported")
    if magic != MAGIC:
        raise ProtocolError(f"unknown magic {magic:#06x}")
    if len(packet) - HEADER.size < length:
        raise ProtocolError(f"{len(packet)} bytes are too short for {length} bytes of data")
    return kind, tunnel, packet[HEADER.size : HEADER.size + length]
