"""TCP and UDP packets as created and segmented by a sender's kernel.

Checksums come from peer.py, which is independent of the C code.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace

import pytest
from peer import checksum
from ttun._codec import ffi, lib

NEEDS_CHECKSUM = 1
NONE, TCP4, TCP6, UDP = 0, 1, 4, 5
FIN, SYN, RST, PSH, ACK, URG, ECE, CWR = (1 << bit for bit in range(8))
Vnet = tuple[int, int, int, int, int, int]  # flags, type, header size, gso size, start, offset
PLAIN: Vnet = (0, NONE, 0, 0, 0, 0)


@dataclass
class Packet:
    """A TCP or UDP packet, as a sender's kernel would create it."""

    v6: bool = False
    udp: bool = False
    ports: bytes = b"\x12\x34\x00\x50"
    identification: int = 1
    sequence: int = 1000
    acknowledgement: int = 77
    flags: int = ACK
    window: int = 500
    urgent: int = 0
    options: bytes = b""
    reserved: int = 0
    payload: bytes = b"x" * 1000
    service: int = 0
    lifetime: int = 64
    fragment: int = 0x4000  # do not fragment
    source: int = 1
    ip_options: bytes = b""
    extensions: tuple[tuple[int, bytes], ...] = ()  # of IPv6: type, what is behind next and length
    final: bytes = b""  # addresses of the pseudo-header where they are not those of the header

    def transport(self) -> bytes:
        if self.udp:
            size = 8 + len(self.payload)
            return self.ports + struct.pack(">HH", size, 0) + self.payload
        offset = (20 + len(self.options)) // 4 << 4 | self.reserved
        return (
            self.ports
            + struct.pack(">IIBB", self.sequence, self.acknowledgement, offset, self.flags)
            + struct.pack(">HHH", self.window, 0, self.urgent)
            + self.options
            + self.payload
        )

    def addresses(self) -> bytes:
        if self.v6:
            return b"".join(
                socket.inet_pton(socket.AF_INET6, f"fc11::{last}") for last in (self.source, 9)
            )
        return bytes([10, 1, 1, self.source, 10, 1, 1, 9])

    def pseudo_header(self, size: int) -> bytes:
        return (self.final or self.addresses()) + struct.pack(
            ">IHBB", size, 0, 0, 17 if self.udp else 6
        )

    def header(self, size: int) -> bytes:
        protocol = 17 if self.udp else 6
        if self.v6:
            kinds = [kind for kind, _ in self.extensions] + [protocol]
            extensions = b"".join(
                struct.pack(">BB", following, (len(body) - 6) // 8) + body
                for following, (_, body) in zip(kinds[1:], self.extensions)
            )
            size += len(extensions)
            first = struct.pack(">IHBB", 6 << 28 | self.service << 20, size, kinds[0], 64)
            return first + self.addresses() + extensions
        header = struct.pack(
            ">BBHHHBBH",
            0x45 + len(self.ip_options) // 4,
            self.service,
            20 + len(self.ip_options) + size,
            self.identification & 0xFFFF,
            self.fragment,
            self.lifetime,
            protocol,
            0,
        )
        header += self.addresses() + self.ip_options
        return header[:10] + struct.pack(">H", checksum(header)) + header[12:]

    def whole(self) -> bytes:
        """With all its checksums."""
        data = self.transport()
        field = 6 if self.udp else 16
        value = checksum(self.pseudo_header(len(data)) + data)
        if self.udp and value == 0:
            value = 0xFFFF
        data = data[:field] + struct.pack(">H", value) + data[field + 2 :]
        return self.header(len(data)) + data

    def partial(self) -> bytes:
        """With a partial checksum: the pseudo-header sum."""
        data = self.transport()
        field = 6 if self.udp else 16
        value = 0xFFFF - checksum(self.pseudo_header(len(data)))
        data = data[:field] + struct.pack(">H", value) + data[field + 2 :]
        return self.header(len(data)) + data

    def vnet(self, gso_size: int) -> Vnet:
        start = len(self.header(0))
        kind = UDP if self.udp else TCP6 if self.v6 else TCP4
        headers = start + (8 if self.udp else 20 + len(self.options))
        offset = 6 if self.udp else 16
        return NEEDS_CHECKSUM, kind if gso_size else NONE, headers, gso_size, start, offset

    def cut(self, gso_size: int) -> list[bytes]:
        """The segments that the kernel would create."""
        parts = []
        for index, start in enumerate(range(0, len(self.payload), gso_size)):
            last = start + gso_size >= len(self.payload)
            flags = self.flags if last else self.flags & ~(FIN | PSH)
            part = replace(
                self,
                payload=self.payload[start : start + gso_size],
                identification=self.identification + index,
                sequence=(self.sequence + start) % (1 << 32),
                flags=flags & ~CWR if index else flags,
            )
            parts.append(part.whole())
        return parts


def segment(vnet: Vnet, packet: bytes) -> list[bytes] | None:
    """The segments of the uplink for a packet from the kernel; None if rejected."""
    room = ffi.new("uint8_t[]", 16 + lib.TTUN_PACKET_MAX)
    ffi.memmove(room + 16, packet, len(packet))
    header = ffi.new("struct ttun_vnet *", vnet)
    state = ffi.new("struct ttun_segmenter *")
    if not lib.ttun_segment(state, header, room + 16, len(packet)):
        return None
    size, segments = ffi.new("size_t *"), []
    while (found := lib.ttun_next_segment(state, size)) != ffi.NULL:
        segments.append(bytes(ffi.buffer(found, size[0])))
    return segments


def coalesce(
    packets: Iterable[bytes], tcp: bool = True, udp: bool = True
) -> list[tuple[Vnet, bytes]]:
    """What the downlink writes to the device for a batch of packets."""
    state = ffi.new("struct ttun_coalescer *")
    lib.ttun_coalescer_init(state, tcp, udp)
    buffers, written = [], []

    def flush() -> None:
        count = lib.ttun_flush(state)
        if count:
            parts = [
                bytes(ffi.buffer(state.parts[i].iov_base, state.parts[i].iov_len))
                for i in range(count)
            ]
            written.append((struct.unpack("=BBHHHH", parts[0]), b"".join(parts[1:])))

    for packet in packets:
        buffers.append(ffi.new("uint8_t[]", packet))
        if not lib.ttun_coalesce(state, buffers[-1], len(packet)):
            flush()
            assert lib.ttun_coalesce(state, buffers[-1], len(packet))
    flush()
    return written


FAMILIES = pytest.mark.parametrize("v6", [False, True], ids=["ipv4", "ipv6"])
PROTOCOLS = pytest.mark.parametrize("udp", [False, True], ids=["tcp", "udp"])
TIMESTAMPS = b"\x01\x01\x08\x0a" + bytes(8)
