"""The uplink's queue: sparse flows overtake, flows share fairly and keep their order."""

from __future__ import annotations

import random
from typing import Any

import pytest
from ttun._codec import ffi, lib

ROOM, CELL = 64 * 1024, 512
PACKET_MAX = 40 + 65535 + 3
MS = 1000  # microseconds


def packet(flow: int, number: int, size: int = 1280, *, v6: bool = False) -> bytes:
    """A UDP packet that contains its flow and number."""
    ports = (5000 + flow).to_bytes(2, "big") + (53).to_bytes(2, "big")
    if v6:
        head = bytes([0x60, 0, 0, 0, 0, 0, 17, 64]) + bytes(31) + b"\1"
    else:
        head = bytes([0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0, 10, 1, 1, 1, 10, 1, 1, 2])
    body = head + ports + number.to_bytes(4, "big")
    return body + random.Random(number).randbytes(size - len(body))


class Queue:
    def __init__(self, room: int = ROOM, target: int = 5 * MS, interval: int = 100 * MS) -> None:
        self.memory = ffi.new("uint8_t[]", room)
        self.c = ffi.new("struct ttun_fq *")
        lib.ttun_fq_init(self.c, self.memory, room, 1)
        self.pace: Any = ffi.new(
            "struct ttun_codel_pace *", {"target": target, "interval": interval}
        )
        self.out = ffi.new("uint8_t[]", PACKET_MAX)
        self.now = 1

    def put(self, *packets: bytes, ip: int = 0) -> None:
        for data in packets:
            lib.ttun_fq_put(self.c, data, len(data), ip, self.now)

    def take(self) -> bytes:
        size = lib.ttun_fq_take(self.c, self.out, self.now, self.pace)
        return bytes(ffi.buffer(self.out, size))

    def rest(self) -> list[bytes]:
        return list(iter(self.take, b""))


@pytest.mark.parametrize("size", [36, 495, 496, 497, 1280, 9000, PACKET_MAX])
@pytest.mark.parametrize("v6", [False, True])
def test_what_comes_out_is_what_went_in(size: int, v6: bool) -> None:
    queue = Queue(256 * 1024)
    sent = [packet(1, number, max(size, 52 if v6 else 36), v6=v6) for number in range(3)]
    queue.put(*sent)
    assert queue.rest() == sent
    assert queue.c.packets == 0 and queue.c.free_cells == 256 * 1024 // CELL


def test_a_rare_packet_overtakes_a_bulk_flow() -> None:
    queue = Queue()
    bulk = [packet(1, number) for number in range(20)]
    queue.put(*bulk[:10])
    assert [queue.take() for _ in range(3)] == bulk[:3]
    ping = packet(2, 0, 84)
    queue.put(ping, *bulk[10:])
    assert queue.take() == ping
    assert queue.rest() == bulk[3:]


def test_a_packet_with_something_in_front_belongs_to_the_flow_of_its_ip_header() -> None:
    queue = Queue()
    whole = [b"\1\2\3" + packet(1, number) for number in range(4)]
    queue.put(*whole[:3], ip=3)
    queue.put(packet(1, 9))  # the same flow: it comes later
    assert queue.rest() == [*whole[:3], packet(1, 9)]


def test_flows_share_by_bytes_and_none_is_reordered() -> None:
    queue = Queue(1 << 20)
    large = [packet(1, number, 6000) for number in range(20)]
    small = [packet(2, number, 600) for number in range(200)]
    queue.put(*large, *small)
    taken = queue.rest()
    assert [data for data in taken if len(data) == 6000] == large
    assert [data for data in taken if len(data) == 600] == small
    half = taken[: taken.index(large[10])]
    assert 0.7 < sum(len(d) for d in half if len(d) == 600) / 60000 < 1.4


def test_a_flow_that_sends_again_at_once_is_not_new_each_time() -> None:
    """Otherwise a sender of single packets would starve all others."""
    queue = Queue()
    bulk = [packet(1, number) for number in range(10)]
    queue.put(*bulk, packet(2, 0))
    taken = []
    for number in range(1, 15):
        taken.append(queue.take())
        queue.put(packet(2, number))
    assert sum(data in bulk for data in taken) >= 5


def test_where_there_is_no_room_the_largest_flow_loses_its_oldest() -> None:
    queue = Queue()
    few = [packet(2, number, 200) for number in range(5)]
    bulk = [packet(1, number) for number in range(100)]
    queue.put(*few, *bulk)
    left = queue.rest()
    assert all(data in left for data in few)
    kept = [data for data in left if len(data) == 1280]
    assert kept == bulk[-len(kept) :] and queue.c.dropped == 100 - len(kept) > 0


def test_a_queue_that_stands_loses_packets_of_the_flow_that_stands() -> None:
    queue = Queue(1 << 20)
    number = 0
    for _ in range(400):  # 10 packets come in 10 ms and 9 leave
        for _ in range(10):
            queue.put(packet(1, number))
            number += 1
        for _ in range(9):
            queue.take()
        queue.put(packet(2, number, 300))
        queue.now += 10 * MS
    assert queue.c.dropped > 10
    small = [data for data in queue.rest() if len(data) == 300]
    assert len(small) <= 1  # they left at once


def test_a_burst_that_is_gone_within_the_interval_loses_nothing() -> None:
    queue = Queue(1 << 20)
    for _ in range(20):
        queue.put(*(packet(1, number) for number in range(100)))
        for _ in range(100):
            assert queue.take()
            queue.now += MS // 2
    assert queue.c.dropped == 0


def test_what_waited_is_overwritten_at_the_end() -> None:
    queue = Queue()
    queue.put(*(packet(1, number) for number in range(10)))
    queue.take()
    lib.ttun_fq_wipe(queue.c)
    assert bytes(ffi.buffer(queue.memory)) == bytes(ROOM)


def test_odd_packets_belong_to_some_flow() -> None:
    queue = Queue()
    fragment = bytearray(packet(1, 0, 60))
    fragment[6:8] = b"\x20\x01"
    odd = [b"\x45", b"\x60" * 39, b"\x00" * 30, bytes(fragment), b"\x4f" + packet(1, 1, 40)[1:]]
    queue.put(*odd)
    assert sorted(queue.rest()) == sorted(odd)
