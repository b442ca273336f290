"""Segment and coalesce: a round trip gives the same packets.

Packets and checksums come from packets.py, which is independent of the C code.
"""

from __future__ import annotations

import os
import random
import socket
import struct
from dataclasses import replace

import pytest
from packets import (
    ACK,
    CWR,
    ECE,
    FAMILIES,
    FIN,
    PLAIN,
    PROTOCOLS,
    PSH,
    RST,
    SYN,
    TIMESTAMPS,
    URG,
    Packet,
    coalesce,
    segment,
)
from peer import checksum
from ttun._codec import ffi, lib


def there_and_back(packets: list[bytes]) -> list[bytes]:
    """Coalesce, then segment."""
    result: list[bytes] = []
    for vnet, packet in coalesce(packets):
        segments = segment(vnet, packet)
        assert segments is not None
        result += segments
    return result


@pytest.mark.parametrize("offset", range(4))
def test_sums_agree_with_another_implementation(offset: int) -> None:
    data = os.urandom(3000)
    buffer = ffi.from_buffer(data)
    for size in [*range(200), 1280, 2000, 2999 - offset]:
        ours = lib.ttun_fold(lib.ttun_sum(0, buffer + offset, size))
        theirs = 0xFFFF - checksum(data[offset : offset + size])
        assert socket.htons(ours) % 0xFFFF == theirs % 0xFFFF


@FAMILIES
@PROTOCOLS
def test_a_large_packet_of_the_kernel_is_cut(v6: bool, udp: bool) -> None:
    for size, gso in [(60000, 1220), (1221, 1220), (2440, 1220), (9, 8), (1000, 1), (300, 7)]:
        packet = Packet(
            v6, udp, payload=os.urandom(size), identification=65530, sequence=2**32 - 100,
            flags=ACK | PSH | FIN | ECE | CWR, options=TIMESTAMPS, service=2,
        )  # fmt: skip
        assert segment(packet.vnet(gso), packet.partial()) == packet.cut(gso)


HOP = (0, b"\x1e\x04" + bytes(4))
OPTIONS = (60, b"\x1e\xec" + bytes(236))
LONGEST = (60, (b"\x1e\xfd" + bytes(253)) * 8 + b"\x1e\x04" + bytes(4))
ROUTE = (43, b"\x04\x01\x01\0\0\0" + bytes(range(32)))
EXTENDED = {
    "an option": [HOP],
    "240 bytes of options": [OPTIONS],
    "all that an extension header may have, and more": [HOP, LONGEST, LONGEST, OPTIONS],
    "a routing header": [ROUTE, HOP],
}


@PROTOCOLS
@pytest.mark.parametrize("name", EXTENDED)
def test_extension_headers_are_in_every_segment(name: str, udp: bool) -> None:
    packet = Packet(v6=True, udp=udp, payload=os.urandom(5000), extensions=tuple(EXTENDED[name]))
    for final in (b"", os.urandom(32)):
        packet.final = final
        for gso_size in (100, 1000):
            assert segment(packet.vnet(gso_size), packet.partial()) == packet.cut(gso_size)


@PROTOCOLS
def test_ip_options_are_in_every_segment(udp: bool) -> None:
    route = b"\x83\x07\x04" + bytes([10, 1, 1, 7]) + b"\0"
    for options, final in [(b"\x94\x04\0\0", b""), (route, bytes([10, 1, 1, 1, 10, 1, 1, 7]))]:
        packet = Packet(udp=udp, payload=os.urandom(5000), ip_options=options, final=final)
        assert segment(packet.vnet(1000), packet.partial()) == packet.cut(1000)


@FAMILIES
@PROTOCOLS
def test_a_checksum_is_completed(v6: bool, udp: bool) -> None:
    for size in (1, 2, 3, 100, 1220):
        packet = Packet(v6, udp, payload=os.urandom(size))
        assert segment(packet.vnet(0), packet.partial()) == [packet.whole()]


def summing_to_zero(packet: Packet) -> Packet:
    """The same packet with a payload that makes its checksum zero."""
    rest = packet.payload[2:]
    packet = replace(packet, payload=bytes(2) + rest)
    transport = packet.transport()
    missing = checksum(packet.pseudo_header(len(transport)) + transport)
    return replace(packet, payload=missing.to_bytes(2, "big") + rest)


@FAMILIES
@PROTOCOLS
def test_a_checksum_of_zero_is_sent_as_ffff_with_udp_alone(v6: bool, udp: bool) -> None:
    """In UDP, zero means no checksum (RFC 768)."""
    one = summing_to_zero(Packet(v6, udp, payload=bytes(1000)))
    start, offset = one.vnet(0)[4:]
    expected = b"\xff\xff" if udp else b"\0\0"
    (sent,) = segment(one.vnet(0), one.partial()) or [b""]
    assert sent[start + offset :][:2] == expected
    more = replace(one, payload=one.payload * 3)
    segments = segment(more.vnet(1000), more.partial()) or []
    if not udp:
        segments = segments[:1]  # the others have other sequence numbers
    assert [part[start + offset :][:2] for part in segments] == [expected] * len(segments) != []


def test_a_packet_that_needs_nothing_is_left_alone() -> None:
    for packet in (b"\x45", b"anything", os.urandom(65535)):
        assert segment(PLAIN, packet) == [packet]


def test_a_header_that_contradicts_its_packet_is_refused() -> None:
    packet = Packet(payload=bytes(3000))
    good, data = packet.vnet(1000), packet.partial()
    assert segment(good, data) is not None
    changes = {0: [0], 1: [2, 3, 4, 5 + 128, 255], 3: [0], 4: [0, 19, 21, 3000, 65535]}
    for field, values in changes.items():
        for value in values:
            bad = (*good[:field], value, *good[field + 1 :])
            assert segment(bad, data) is None, (field, value)
    assert segment(good, data[:40]) is None, "no payload"
    assert segment(good, data[:30]) is None, "half a header"
    assert segment((1, 0, 0, 0, 65535, 65535), data) is None
    assert segment((1, 0, 0, 0, len(data) - 1, 0), data) is None
    assert segment(good, b"") is None
    short = bytearray(data)
    short[32] = 0x40
    assert segment(good, bytes(short)) is None, "a TCP header of 16 bytes"
    assert segment(PLAIN, b"") is None
    packet = Packet(payload=b"\x55" * 3000)  # a TCP header is wherever it is looked for
    good, data = packet.vnet(1000), packet.partial()
    assert segment(good, data) is not None
    assert segment((*good[:4], 24, good[5]), data) is None, "not where the IP header ends"
    assert segment(good, b"\x75" + data[1:]) is None, "of neither version"


def test_no_header_leads_out_of_its_packet() -> None:
    """Segments stay within the packet, whatever the header says."""
    rng = random.Random(1)
    for _ in range(20000):
        packet = Packet(rng.random() < 0.5, rng.random() < 0.5, payload=bytes(rng.randrange(300)))
        data = bytearray(packet.partial())
        for _ in range(rng.randrange(3)):
            data[rng.randrange(min(60, len(data)))] = rng.randrange(256)
        data = data[: rng.randrange(len(data) + 1)]
        vnet = list(packet.vnet(rng.choice([0, 1, 8, 100, 65535])))
        for _ in range(rng.randrange(3)):
            vnet[rng.randrange(6)] = rng.choice([0, 1, 4, 5, 20, 40, 60, 255])
        segments = segment(tuple(vnet), bytes(data)) or []
        assert all(len(each) <= len(data) for each in segments)
        assert len(segments) <= max(1, len(data))


@FAMILIES
@PROTOCOLS
def test_packets_that_follow_each_other_become_one(v6: bool, udp: bool) -> None:
    packet = Packet(v6, udp, payload=os.urandom(1200 * 39 + 5), flags=ACK | PSH | ECE)
    packets = packet.cut(1200)
    ((vnet, merged),) = coalesce(packets)
    assert vnet == packet.vnet(1200)
    assert merged == packet.partial()
    assert there_and_back(packets) == packets


@FAMILIES
def test_options_are_kept(v6: bool) -> None:
    packets = Packet(v6, options=TIMESTAMPS, payload=bytes(9000)).cut(1000)
    assert len(coalesce(packets)) == 1
    assert there_and_back(packets) == packets


def test_no_more_is_merged_than_the_kernel_takes() -> None:
    for size in (1, 100, 1240, 9000):
        packets = Packet(payload=bytes(size * 200)).cut(size)
        written = coalesce(packets)
        assert len(written) < len(packets)
        for vnet, merged in written:
            assert len(merged) <= 65535
            segments = segment(vnet, merged)
            assert segments is not None
            assert len(segments) <= lib.TTUN_SEGMENTS_MAX
        assert there_and_back(packets) == packets


@PROTOCOLS
def test_as_many_segments_are_merged_as_every_kernel_takes(udp: bool) -> None:
    """64 was UDP_MAX_SEGMENTS of linux/udp.h for a long time."""
    packets = Packet(udp=udp, payload=bytes(100 * 200)).cut(100)
    assert [len(segment(*each) or []) for each in coalesce(packets)] == [64, 64, 64, 8]


@FAMILIES
@pytest.mark.parametrize(("total", "written"), [(65535, 1), (65536, 2)])
def test_a_merged_packet_has_65535_bytes_at_most(v6: bool, total: int, written: int) -> None:
    payload = total - (60 if v6 else 40)
    size = next(size for size in range(2000, payload) if payload % size == 0)
    packets = Packet(v6, payload=bytes(payload)).cut(size)
    assert len(coalesce(packets)) == written
    assert there_and_back(packets) == packets


FIRST, SECOND = (Packet(payload=bytes(2000)).cut(1000)[i] for i in (0, 1))


def second(**change: object) -> bytes:
    """A packet that follows FIRST, with one change."""
    follower = Packet(payload=bytes(1000), sequence=2000, identification=2)
    return replace(follower, **change).whole()


def broken(packet: bytes, where: int) -> bytes:
    return packet[:where] + bytes([packet[where] ^ 1]) + packet[where + 1 :]


UNUSUAL = {
    "a SYN": second(flags=ACK | SYN),
    "a FIN": second(flags=ACK | FIN),
    "a RST": second(flags=ACK | RST),
    "urgent data": second(flags=ACK | URG, urgent=5),
    "an urgent pointer": second(urgent=5),
    "a CWR": second(flags=ACK | CWR),
    "no ACK": second(flags=0),
    "another ECE": second(flags=ACK | ECE),
    "a reserved bit": second(reserved=1),
    "a gap": second(sequence=2001),
    "a repetition": second(sequence=1000),
    "another acknowledgement": second(acknowledgement=78),
    "another window": second(window=501),
    "options": second(options=b"\x01" * 4),
    "another port": second(ports=b"\x12\x35\x00\x50"),
    "another source": second(source=2),
    "another service": second(service=8),
    "an ECN mark": second(service=3),
    "another lifetime": second(lifetime=63),
    "an identification that does not follow": second(identification=3),
    "a fragment": second(fragment=0x2000),
    "a later fragment": second(fragment=0x0010),
    "may be fragmented": second(fragment=0),
    "IP options": second(ip_options=b"\x01" * 4),
    "a larger payload": second(payload=bytes(1001)),
    "no payload": second(payload=b""),
    "a wrong IP checksum": broken(SECOND, 10),
    "a wrong TCP checksum": broken(SECOND, 36),
    "a wrong byte of payload": broken(SECOND, 500),
    "a byte too many": SECOND + b"x",
    "a byte too few": SECOND[:-1],
    "not IP": b"\x00" * 1000,
    "one byte": b"\x45",
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_the_unusual_passes_unchanged_and_in_order(name: str) -> None:
    assert len(coalesce([FIRST, SECOND])) == 1, "the usual is merged"
    packets = [FIRST, UNUSUAL[name], FIRST]
    assert coalesce(packets) == [(PLAIN, packet) for packet in packets]


def test_udp_without_a_checksum_passes_unchanged() -> None:
    packets = Packet(udp=True, payload=bytes(2000)).cut(1000)
    bare = [packet[:26] + b"\0\0" + packet[28:] for packet in packets]
    assert len(coalesce(packets)) == 1
    assert coalesce(bare) == [(PLAIN, packet) for packet in bare]


@FAMILIES
def test_udp_without_a_checksum_passes_unchanged_also_where_zero_is_right(v6: bool) -> None:
    """Segmenting would add one."""
    packets = summing_to_zero(Packet(v6, udp=True, payload=bytes(1000))).cut(1000) * 2
    at = (40 if v6 else 20) + 6
    bare = [packet[:at] + b"\0\0" + packet[at + 2 :] for packet in packets]
    ids = [packet if v6 else renumbered(packet, n) for n, packet in enumerate(packets)]
    assert len(coalesce(ids)) == 1, "with a checksum they are merged"
    bare = [packet if v6 else renumbered(packet, n) for n, packet in enumerate(bare)]
    assert coalesce(bare) == [(PLAIN, packet) for packet in bare]


def renumbered(packet: bytes, identification: int) -> bytes:
    """The packet with another IPv4 identification."""
    header = packet[:4] + struct.pack(">H", identification) + packet[6:10] + b"\0\0" + packet[12:20]
    return header[:10] + struct.pack(">H", checksum(header)) + header[12:] + packet[20:]


def test_the_second_zero_of_a_checksum_passes_unchanged() -> None:
    """ffff instead of 0000 is valid, but segmenting would not restore it."""
    second = summing_to_zero(Packet(payload=bytes(1000), sequence=2000, identification=2)).whole()
    assert second[36:38] == b"\0\0"
    assert len(coalesce([FIRST, second])) == 1
    odd = second[:36] + b"\xff\xff" + second[38:]
    assert coalesce([FIRST, odd]) == [(PLAIN, FIRST), (PLAIN, odd)]
    number = checksum(Packet(identification=0, payload=bytes(1000)).header(1020)[:10] + b"\0\0"
                      + Packet().addresses())  # fmt: skip
    packets = Packet(identification=number - 1, payload=bytes(2000)).cut(1000)
    assert packets[1][10:12] == b"\0\0"
    assert len(coalesce(packets)) == 1
    odd = packets[1][:10] + b"\xff\xff" + packets[1][12:]
    assert coalesce([packets[0], odd]) == [(PLAIN, packets[0]), (PLAIN, odd)]


def test_ipv6_extension_headers_pass_unchanged() -> None:
    packets = Packet(v6=True, payload=bytes(2000)).cut(1000)
    extended = []
    for packet in packets:  # a hop-by-hop header of 8 bytes with padding
        header = packet[:4] + struct.pack(">H", len(packet) - 32) + b"\0" + packet[7:40]
        extended.append(header + b"\x06\x00\x01\x04\0\0\0\0" + packet[40:])
    assert coalesce(extended) == [(PLAIN, packet) for packet in extended]


def test_what_the_device_does_not_take_is_not_merged() -> None:
    tcp, udp = (Packet(udp=u, payload=bytes(3000)).cut(1000) for u in (False, True))
    assert len(coalesce(tcp + udp, tcp=True, udp=True)) == 2
    assert len(coalesce(tcp + udp, tcp=True, udp=False)) == 4
    assert len(coalesce(tcp + udp, tcp=False, udp=True)) == 4
    assert coalesce(tcp + udp, tcp=False, udp=False) == [(PLAIN, p) for p in tcp + udp]


def test_a_push_ends_a_merged_packet_and_a_short_one_does_too() -> None:
    one, two = Packet(payload=bytes(2000), flags=ACK | PSH).cut(1000), second(sequence=3000)
    assert [len(p) for _, p in coalesce([*one, two])] == [2040, 1040]
    short = [*Packet(payload=bytes(1500)).cut(1000), second(sequence=2500, identification=3)]
    assert [len(p) for _, p in coalesce(short)] == [1540, 1040]


@pytest.mark.parametrize("seed", range(40))
def test_any_stream_comes_back_the_same(seed: int) -> None:
    """Interleaved flows with anomalies: coalesce, then segment gives the same bytes."""
    rng = random.Random(seed)
    flows = [
        Packet(
            v6=rng.random() < 0.5,
            udp=rng.random() < 0.4,
            ports=rng.randbytes(4),
            source=rng.randrange(1, 4),
            identification=rng.choice([1, 65530]),
            sequence=rng.choice([0, 2**32 - 3000]),
            options=rng.choice([b"", TIMESTAMPS]),
        )
        for _ in range(rng.randrange(1, 5))
    ]
    packets: list[bytes] = []
    while len(packets) < 400:
        index = rng.randrange(len(flows))
        size = rng.choice([1, 2, 7, 100, 1220, 1400])
        burst = rng.randbytes(rng.randrange(size * 30) + 1)
        flow = replace(flows[index], payload=burst, flags=rng.choice([ACK, ACK | PSH, ACK | ECE]))
        cut = flow.cut(size)
        packets += cut
        flows[index].sequence = (flow.sequence + len(burst)) % 2**32
        flows[index].identification = (flow.identification + len(cut)) % 2**16
        if rng.random() < 0.5:
            packets.append(rng.choice(list(UNUSUAL.values())))
        if rng.random() < 0.3:
            victim = rng.randrange(len(packets))
            packets[victim] = broken(packets[victim], rng.randrange(len(packets[victim])))
        if rng.random() < 0.2:
            i, j = rng.randrange(len(packets)), rng.randrange(len(packets))
            packets[i], packets[j] = packets[j], packets[i]
    assert there_and_back(packets) == packets
    assert len(coalesce(packets)) < len(packets)
