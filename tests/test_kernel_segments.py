"""Compare the segments of segment.c with the kernel's, packet by packet.

A packet socket sends a packet with a vnet header to a TUN device without offloads, so the kernel
segments it, and the segments are read from the device: packet(7), PACKET_VNET_HDR.
"""

from __future__ import annotations

import os
import random
import socket
import struct
from collections.abc import Iterator
from dataclasses import replace

import pytest
import pytun
from packets import ACK, ECE, FIN, PSH, SYN, TIMESTAMPS, Packet, Vnet, coalesce, segment
from tunnel import in_namespace
from vnet import restore, stays_whole

from ttun.lab import netns

pytestmark = pytest.mark.hosts

SOL_PACKET, PACKET_VNET_HDR = 263, 15  # linux/socket.h, linux/if_packet.h
ETH_P = {4: 0x0800, 6: 0x86DD}  # linux/if_ether.h
HOP_BY_HOP, ROUTING, DESTINATION = 0, 43, 60
COUNT = int(os.environ.get("TTUN_TEST_PACKETS", "1500"))


class Kernel:
    """A device without offloads, and a packet socket to it."""

    def __init__(self) -> None:
        self.device = pytun.TunTapDevice(flags=pytun.IFF_TUN | pytun.IFF_NO_PI)
        os.set_blocking(self.device.fileno(), False)
        name = self.device.name
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self.socket.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self.address = name

    def segment(self, vnet: Vnet, packet: bytes) -> list[bytes]:
        """Return the kernel's segments of a packet; none if it drops it. Raises OSError."""
        protocol = ETH_P[packet[0] >> 4]
        message = struct.pack("=BBHHHH", *vnet) + packet
        self.socket.sendto(message, (self.address, protocol))
        segments = []
        while True:
            try:
                found = os.read(self.device.fileno(), 1 << 17)
            except BlockingIOError:
                return segments
            if found[0] >> 4 != 6 or found[24] != 0xFF:  # multicast is the device's own
                segments.append(found)

    def close(self) -> None:
        self.socket.close()
        self.device.close()


@pytest.fixture(scope="module")
def kernel() -> Iterator[Kernel]:
    with netns.Namespaces("kernel") as made:
        (namespace,) = made.names.values()
        device = in_namespace(namespace, Kernel)
        name = device.device.name
        netns.ip("-n", namespace, "link", "set", name, "addrgenmode", "none", "mtu", "65535",
                 "txqueuelen", "10000", "up")  # fmt: skip
        yield device
        device.close()


def extension(dice: random.Random) -> tuple[int, bytes]:
    """An IPv6 extension header."""
    kind = dice.choice([HOP_BY_HOP, ROUTING, DESTINATION])
    if kind == ROUTING:  # RFC 8754: two addresses or more, the last one first
        left = dice.randrange(1, 4)
        segments = dice.randbytes(16 * (left + 1))
        return kind, struct.pack(">BBBBH", 4, left, left, 0, 0) + segments
    size = dice.choice([8, 16, 240, 256, 8 * dice.randrange(1, 257)])
    options, room = b"", size - 2
    while room > 0:  # an option for experiments (RFC 4727), skipped if unknown
        length = min(room - 2, 253)
        if room - 2 - length == 1:
            length -= 1
        options += b"\0" if room == 1 else bytes([0x1E, length]) + dice.randbytes(length)
        room = size - 2 - len(options)
    return kind, options


def ip_options(dice: random.Random) -> bytes:
    """IPv4 options: router alert, source route (RFC 791), time stamp, or none."""
    addresses = dice.randbytes(4 * dice.randrange(1, 9))
    route = bytes([dice.choice([0x83, 0x89]), 3 + len(addresses), 4]) + addresses + b"\0"
    return dice.choice([
        b"",
        b"\x94\x04\0\0",
        route,
        b"\x44\x0c\x05\0" + bytes(8),
        b"\x01" * 40,
    ])  # fmt: skip


def random_packet(dice: random.Random) -> tuple[Packet, int]:
    """A GSO packet as from the kernel, and the payload of each of its segments."""
    v6, udp = dice.random() < 0.5, dice.random() < 0.5
    packet = Packet(
        v6=v6, udp=udp,
        ports=dice.randbytes(4),
        identification=dice.choice([1, 65535, dice.randrange(65536)]),
        sequence=dice.choice([0, 2**32 - 5, dice.randrange(2**32)]),
        acknowledgement=dice.randrange(2**32),
        flags=dice.choice([ACK, ACK | PSH, ACK | FIN | PSH, ACK | ECE, dice.randrange(256) & ~SYN]),
        window=dice.randrange(65536),
        urgent=dice.choice([0, 0, 7]),
        options=dice.choice([b"", TIMESTAMPS, b"\x01" * 40]),
        service=dice.randrange(256),
        fragment=dice.choice([0, 0x4000]),
        lifetime=dice.randrange(1, 256),
    )  # fmt: skip
    if dice.random() < 0.5:
        if v6:
            packet.extensions = tuple(extension(dice) for _ in range(dice.randrange(1, 4)))
        else:
            packet.ip_options = ip_options(dice)
        if packet.extensions or packet.ip_options:
            # A routing header, a source route or a home address changes these.
            packet.final = dice.choice([b"", dice.randbytes(32 if v6 else 8)])
    headers = len(packet.transport()) - len(packet.payload) + len(packet.header(0))
    gso_size = dice.choice([1, 7, 8, 9, 536, 1220, 1240, 1448, 8948, dice.randrange(1, 65536)])
    room = 65535 - headers
    most = min(room, gso_size * (128 if udp else 300), dice.choice([3000, 20000, 65535]))
    if most <= gso_size:
        gso_size = dice.randrange(1, min(room, 4000))
        most = min(room, gso_size * 100)
    packet.payload = dice.randbytes(dice.randrange(gso_size + 1, most + 1))
    return packet, gso_size


def test_segments_are_those_of_the_kernel_on_both_wires(kernel: Kernel) -> None:
    """TTUN_TEST_PACKETS: number of packets; TTUN_TEST_SEED: random seed."""
    dice = random.Random(int(os.environ.get("TTUN_TEST_SEED", "1")))
    whole = 0
    for number in range(COUNT):
        packet, gso_size = random_packet(dice)
        vnet, data = packet.vnet(gso_size), packet.partial()
        expected = kernel.segment(vnet, data)
        case = f"number {number}, gso {gso_size}, {replace(packet, payload=b'')}"
        assert len(expected) == -(-len(packet.payload) // gso_size), case
        # Protocol v1, and on x1 what does not travel whole.
        assert segment(vnet, data) == expected, case
        if stays_whole(vnet, data):
            whole += 1
            restored = restore(data, gso_size)
            assert restored == (vnet, data), case
        # The other end writes either the offloaded packet or a coalesced one.
        again = [part for written in coalesce(expected) for part in kernel.segment(*written)]
        assert again == expected, case
    assert COUNT / 10 < whole < COUNT / 2
