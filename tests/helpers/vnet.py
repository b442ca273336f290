"""Access to the codec's functions for vnet headers (linux/virtio_net.h)."""

from __future__ import annotations

import struct

from packets import Vnet
from ttun._codec import ffi, lib


def restore(
    packet: bytes, gso_size: int, tcp: bool = True, udp: bool = True
) -> tuple[Vnet, bytes] | None:
    """The header that the receiver restores, and its packet."""
    buffer = ffi.new("uint8_t[]", packet)
    vnet = ffi.new("struct ttun_vnet *")
    if not lib.ttun_restore_vnet(vnet, buffer, len(packet), gso_size, tcp, udp):
        return None
    header = struct.unpack("=BBHHHH", bytes(ffi.buffer(vnet)))
    return header, bytes(ffi.buffer(buffer, len(packet)))


def stays_whole(vnet: Vnet, packet: bytes, tcp: bool = True, udp: bool = True) -> bool:
    buffer = ffi.new("uint8_t[]", packet)
    header = ffi.new("struct ttun_vnet *", vnet)
    answer = bool(lib.ttun_stays_whole(header, buffer, len(packet), tcp, udp))
    assert bytes(ffi.buffer(buffer, len(packet))) == packet, "a question does not write"
    return answer
