"""Offloaded packets between two ends with offloads: the receiver restores the header of the
sender's kernel, and malformed offload packets of a hostile peer are rejected.
"""

from __future__ import annotations

import random
import struct

import pytest
from packets import (
    ACK,
    CWR,
    FAMILIES,
    FIN,
    NEEDS_CHECKSUM,
    NONE,
    PROTOCOLS,
    PSH,
    RST,
    SYN,
    TCP4,
    TCP6,
    TIMESTAMPS,
    UDP,
    URG,
    Packet,
    segment,
)  # fmt: skip
from peer import checksum
from vnet import Vnet, restore, stays_whole

GSO_MIN, UDP_SEGMENTS_MAX = 8, 128


@FAMILIES
@PROTOCOLS
@pytest.mark.parametrize("gso_size", [8, 1000, 1240])
def test_the_header_is_the_one_that_the_kernel_had(v6: bool, udp: bool, gso_size: int) -> None:
    packet = Packet(v6=v6, udp=udp, payload=random.Random(1).randbytes(min(60 * gso_size, 60000)))
    vnet = packet.vnet(gso_size)
    assert stays_whole(vnet, packet.partial())
    assert restore(packet.partial(), gso_size) == (vnet, packet.partial())
    assert not stays_whole(vnet, packet.partial(), tcp=udp, udp=not udp), "not of that kind"
    assert restore(packet.partial(), gso_size, tcp=udp, udp=not udp) is None


@FAMILIES
@PROTOCOLS
def test_a_checksum_of_nonsense_is_made_again(v6: bool, udp: bool) -> None:
    packet = Packet(v6=v6, udp=udp, payload=bytes(5000))
    start, offset = packet.vnet(1000)[4:]
    forged = bytearray(packet.partial())
    forged[start + offset : start + offset + 2] = b"\x12\x34"
    assert restore(bytes(forged), 1000) == (packet.vnet(1000), packet.partial())


@FAMILIES
@PROTOCOLS
def test_a_small_packet_goes_as_packets_do(v6: bool, udp: bool) -> None:
    """The receiver can coalesce small ones; for a large one it saves a checksum."""
    small, large = (
        Packet(v6=v6, udp=udp, payload=b"x" * size, options=b"" if udp else TIMESTAMPS)
        for size in (1000, 60000)
    )
    assert not stays_whole(small.vnet(0), small.partial())
    assert stays_whole(large.vnet(0), large.partial())
    assert restore(large.partial(), 0) == (large.vnet(0), large.partial())


@FAMILIES
def test_a_packet_in_a_packet_stays_as_it_is(v6: bool) -> None:
    """As in VXLAN: the outer checksum is complete or absent, the inner one is partial."""
    inner = Packet(v6=v6, udp=True, payload=bytes(40_000))
    outer = Packet(v6=v6, udp=True, payload=bytes(22) + inner.partial())
    for data in (outer.whole(), outer.partial()):
        start = len(data) - len(inner.transport())
        assert not stays_whole((NEEDS_CHECKSUM, NONE, 0, 0, start, 6), data)
        (sent,) = segment((NEEDS_CHECKSUM, NONE, 0, 0, start, 6), data)
        assert sent == data[: start - len(inner.header(0))] + inner.whole()


@FAMILIES
@PROTOCOLS
def test_a_sum_over_other_addresses_is_completed_by_the_sender(v6: bool, udp: bool) -> None:
    """The receiver would compute another sum, from the addresses in the header."""
    packet = Packet(v6=v6, udp=udp, payload=bytes(40_000), final=bytes(range(32 if v6 else 8)))
    for gso_size in (0, 1000):
        assert not stays_whole(packet.vnet(gso_size), packet.partial())
    assert segment(packet.vnet(1000), packet.partial()) == packet.cut(1000)


UNFIT = {
    "a SYN": (Packet(flags=SYN | ACK, payload=bytes(3000)), 1000),
    "an RST": (Packet(flags=RST | ACK, payload=bytes(3000)), 1000),
    "an urgent pointer": (Packet(flags=URG | ACK, payload=bytes(3000)), 1000),
    "CWR, which belongs to the first segment alone": (
        Packet(flags=CWR | ACK, payload=bytes(3000)), 1000),
    "IP options": (Packet(ip_options=bytes(4), payload=bytes(3000)), 1000),
    "a first fragment": (Packet(fragment=0x2000, payload=bytes(3000)), 1000),
    "a later fragment": (Packet(fragment=0x0001, payload=bytes(3000)), 1000),
    "one segment": (Packet(payload=bytes(1000)), 1000),
    "segments below the least": (Packet(payload=bytes(1000)), 7),
    "more segments of UDP than a kernel makes": (Packet(udp=True, payload=bytes(129 * 8)), 8),
}  # fmt: skip


@pytest.mark.parametrize("why", UNFIT)
def test_the_unusual_is_cut_by_the_sender_and_refused_by_the_receiver(why: str) -> None:
    packet, gso_size = UNFIT[why]
    assert not stays_whole(packet.vnet(gso_size), packet.partial())
    assert restore(packet.partial(), gso_size) is None


@FAMILIES
@pytest.mark.parametrize(("count", "whole"), [(64, True), (65, False), (128, False)])
def test_the_sender_cuts_more_segments_of_udp_than_every_kernel_takes(
    v6: bool, count: int, whole: bool
) -> None:
    """64 was UDP_MAX_SEGMENTS of linux/udp.h until Linux 6.10; TCP has no such limit."""
    for udp in (True, False):
        packet = Packet(v6=v6, udp=udp, payload=bytes(count * 100))
        assert stays_whole(packet.vnet(100), packet.partial()) == (whole or not udp)
        assert restore(packet.partial(), 100) == (packet.vnet(100), packet.partial())


def test_fin_and_push_are_of_the_last_segment() -> None:
    packet = Packet(flags=ACK | FIN | PSH, payload=bytes(3000))
    assert stays_whole(packet.vnet(1000), packet.partial())


def test_a_header_that_says_something_else_is_not_taken_for_whole() -> None:
    packet = Packet(payload=bytes(3000))
    flags, kind, headers, gso_size, start, offset = packet.vnet(1000)
    for vnet in (
        (0, kind, headers, gso_size, start, offset),
        (flags, TCP6, headers, gso_size, start, offset),
        (flags, UDP, headers, gso_size, start, offset),
        (flags, kind | 0x80, headers, gso_size, start, offset),
        (flags, kind, headers, 0, start, offset),
        (flags, kind, headers, gso_size, start + 2, offset),
        (flags, kind, headers, gso_size, start, offset - 2),
    ):
        assert not stays_whole(vnet, packet.partial())


def judge(packet: bytes, gso_size: int) -> Vnet | None:
    """A second implementation of the rules of docs/protocol.md."""
    if len(packet) >= 40 and packet[0] >> 4 == 6:
        start, protocol = 40, packet[6]
        if struct.unpack(">H", packet[4:6])[0] != len(packet) - 40:
            return None
    elif len(packet) >= 20 and packet[0] == 0x45:
        start, protocol = 20, packet[9]
        if struct.unpack(">H", packet[2:4])[0] != len(packet):
            return None
        if struct.unpack(">H", packet[6:8])[0] & 0xBFFF:
            return None
    else:
        return None
    transport = packet[start:]
    if protocol == 6 and len(transport) >= 20:
        headers, offset = start + (transport[12] >> 4) * 4, 16
        kind = TCP6 if start == 40 else TCP4
        if headers < start + 20 or headers > len(packet):
            return None
        if gso_size and transport[13] & (SYN | RST | URG | CWR):
            return None
    elif protocol == 17 and len(transport) >= 8:
        headers, offset, kind = start + 8, 6, UDP
        if struct.unpack(">H", transport[4:6])[0] != len(transport):
            return None
        if gso_size and -(-(len(packet) - headers) // gso_size) > UDP_SEGMENTS_MAX:
            return None
    else:
        return None
    if gso_size and not GSO_MIN <= gso_size < len(packet) - headers:
        return None
    return NEEDS_CHECKSUM, kind if gso_size else NONE, headers, gso_size, start, offset


@pytest.mark.parametrize("seed", range(20))
def test_forged_packets_are_judged_as_the_rules_say(seed: int) -> None:
    """Accepted packets have correct lengths, and segments with valid checksums."""
    dice = random.Random(seed)
    accepted = 0
    for _ in range(1500):
        base = Packet(
            v6=dice.random() < 0.5,
            udp=dice.random() < 0.5,
            flags=dice.choice([ACK, ACK | PSH, ACK | FIN, dice.randrange(256)]),
            options=b"" if dice.random() < 0.5 else TIMESTAMPS,
            fragment=dice.choice([0, 0x4000, 0x4000, dice.randrange(65536)]),
            payload=bytes(dice.choice([0, 1, 9, 100, 3000])),
        )
        packet = bytearray(base.partial())
        for _ in range(dice.choice([0, 0, 1, 2, 5])):
            if packet:
                packet[dice.randrange(min(len(packet), 60))] = dice.randrange(256)
        if dice.random() < 0.2:
            del packet[dice.randrange(len(packet) + 1) :]
        if dice.random() < 0.1:
            packet += bytes(dice.randrange(20))
        gso_size = dice.choice([0, 7, 8, 9, 50, 1000, dice.randrange(65536)])
        restored = restore(bytes(packet), gso_size)
        expected = judge(bytes(packet), gso_size)
        assert (restored and restored[0]) == expected
        if restored is None:
            continue
        accepted += 1
        segments = segment(*restored)
        assert segments, "the receiver's kernel would find nothing wrong"
        for part in segments:
            start = expected[4] if expected else 0
            addresses = part[8:40] if start == 40 else part[12:20]
            size = len(part) - start
            pseudo = addresses + struct.pack(">IHBB", size, 0, 0, 17 if expected[5] == 6 else 6)
            assert checksum(pseudo + part[start:]) == 0
        assert sum(len(part) for part in segments) >= len(packet)
    assert accepted > 100


def test_no_size_leads_out_of_a_packet() -> None:
    for size in range(80):
        for first in (0x45, 0x60):
            for protocol in (6, 17):
                packet = bytearray(size)
                if size:
                    packet[0] = first
                if size > 9:
                    packet[6 if first == 0x60 else 9] = protocol
                    at, value = (4, size - 40) if first == 0x60 else (2, size)
                    packet[at : at + 2] = struct.pack(">H", max(value, 0))
                assert (restore(bytes(packet), 0) and True) == (judge(bytes(packet), 0) and True)
