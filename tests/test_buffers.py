"""--buffers small: less memory, and still every valid frame."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from ttun._codec import ffi, lib
from tunnel import CLIENT, SERVER, TUNNEL4, Bench
from x1_rig import rigged

import ttun
from ttun.errors import UsageError
from ttun.lab import netns
from ttun.settings import NORMAL, SMALL

MIB = 1 << 20
LARGEST = 65519  # bytes of a packet in a frame with a tag of 16


def test_unknown_buffers_are_refused() -> None:
    with pytest.raises(UsageError, match="unknown buffers 'tiny': choose normal or small"):
        ttun.Server(b"key", buffers="tiny")


@pytest.mark.parametrize(
    ("slots", "queue"),
    [
        (0, 1 << 20),
        (5, 1 << 20),
        (4_000_000_000, 1 << 20),
        (4, 0),
        (4, 1000),
        (4, 1 << 17),
        (4, 1 << 25),
    ],
)
def test_the_codec_takes_no_other_room(slots: int, queue: int) -> None:
    state = ffi.new("struct ttun_cipher_state *")
    assert lib.ttun_session_new(0, 0, 0, 0, state, state, 1, slots, queue) == ffi.NULL


def test_the_largest_frame_of_x1_goes_both_ways_through_small_buffers() -> None:
    packets = [b"\x45" + bytes([n]) * (LARGEST - 1) for n in range(20)]
    with rigged(buffers=SMALL) as rig:
        for packet in packets:
            rig.peer.send(packet)
            assert rig.device.outside.recv(70000) == packet
            rig.device.outside.send(packet)
            assert rig.peer.receive_packet() == packet


@pytest.mark.hosts
@pytest.mark.parametrize(
    "small", [{SERVER}, {CLIENT}, {SERVER, CLIENT}], ids=["server", "client", "both"]
)
def test_small_at_one_end_or_both_carries_all(bench: Bench, small: set[str]) -> None:
    options = {end: ["--buffers", "small"] if end in small else [] for end in (SERVER, CLIENT)}
    bench.server(*options[SERVER])
    bench.client(*options[CLIENT]).says("authenticated")
    bench.serve_traffic(SERVER, TUNNEL4[SERVER])
    with ThreadPoolExecutor() as pool:
        transfers = [
            pool.submit(bench.traffic, CLIENT, action, TUNNEL4[SERVER], "5001", str(64 * MIB))
            for action in ("send", "receive")
        ]
        assert all(transfer.result()["whole"] for transfer in transfers)
    for end in (SERVER, CLIENT):
        buffers = SMALL if end in small else NORMAL
        if "4294967295" in Path("/proc/self/uid_map").read_text():  # root of no user namespace
            shown = netns.ip("-n", bench.pair.names[end], "-json", "link", "show", "ttun0")
            assert json.loads(shown)[0]["txqlen"] == buffers.queue
