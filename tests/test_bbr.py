"""When the connection pauses for bbr (csrc/bbr.h), on a link and a kernel that are simulated."""

from __future__ import annotations

import ctypes
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from tunnel import ROOT

# As getsockopt(2) in Linux: no more than there is room for.
KERNEL = """
#include <string.h>
#include <sys/socket.h>
unsigned char info[64];
unsigned info_size;
int getsockopt(int socket, int level, int option, void *value, socklen_t *size) {
    *size = *size < info_size ? *size : info_size;
    memcpy(value, info, *size);
    return 0;
}
int setsockopt(int socket, int level, int option, const void *value, socklen_t size) { return 0; }
"""
BBR, BBR3, DCTCP = 20, 52, 16  # bytes of what the kernel tells of it
RTT, QUEUED, MBIT = 40_000, 15_000, 125_000  # microseconds; bytes per second
SECOND = 1_000_000


class Tcp(ctypes.Structure):
    """struct tcp"""

    _fields_ = [("pacing_rate", ctypes.c_uint64), ("unacked", ctypes.c_uint32),
                ("rtt", ctypes.c_uint32), ("min_rtt", ctypes.c_uint32)]  # fmt: skip


class Bbr(ctypes.Structure):
    """struct bbr"""

    _fields_ = [("startup", ctypes.c_uint64 * 3), ("min_rtt", ctypes.c_uint32),
                ("measured_at", ctypes.c_uint64), ("paused", ctypes.c_bool)]  # fmt: skip


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    directory = tmp_path_factory.mktemp("bbr")
    source, library = Path(directory, "kernel.c"), Path(directory, "bbr.so")
    source.write_text(KERNEL)
    names = ["-Dgetsockopt=told", "-Dsetsockopt=set"]
    subprocess.run(
        ["cc", "-shared", "-fPIC", *names, source, ROOT / "csrc/bbr.c", "-o", library], check=True
    )
    return ctypes.CDLL(str(library))


def pauses(
    code: ctypes.CDLL,
    size: int = BBR,
    *,
    later: int | None = None,
    smoothed: int = RTT + QUEUED,
    rate: int = 20 * MBIT,
) -> list[float]:
    """The pauses in 35 s of a busy link, in seconds. The kernel measures anew after each.

    size, later: of what it tells, and from the first pause on.
    """
    told = ctypes.c_uint.in_dll(code, "info_size")
    told.value = size
    info = (ctypes.c_ubyte * 64).in_dll(code, "info")
    bbr, found = Bbr(), []
    paused_at, now, min_rtt = None, SECOND, RTT
    while now < 36 * SECOND:
        struct.pack_into("=5I", info, 0, rate, 0, min_rtt, 256, 512)
        is_drained = paused_at is not None and now > paused_at + RTT + QUEUED
        tcp = Tcp(rate, 0 if is_drained else 100, smoothed, RTT)
        code.bbr_look(ctypes.byref(bbr), 3, ctypes.c_uint64(now), ctypes.byref(tcp))
        if bbr.paused and paused_at is None:
            paused_at, told.value = now, later or size
        elif paused_at is not None and not bbr.paused:
            found.append((now - paused_at) / SECOND)
            paused_at, min_rtt = None, min_rtt + 1
        now += 2000 if bbr.paused else 10_000
    return found


def test_a_pause_every_ten_seconds_takes_a_round_trip(code: ctypes.CDLL) -> None:
    found = pauses(code)
    assert len(found) == 3
    assert all(RTT / SECOND < seconds < 0.1 for seconds in found)


def test_a_round_trip_that_is_no_longer_so_long_is_no_pause(code: ctypes.CDLL) -> None:
    assert pauses(code, smoothed=3 * SECOND) == []


def test_a_slow_link_has_no_pause(code: ctypes.CDLL) -> None:
    assert pauses(code, rate=4 * MBIT) == []


@pytest.mark.parametrize("size", [BBR3, DCTCP])
def test_other_congestion_controls_have_no_pause(code: ctypes.CDLL, size: int) -> None:
    """Of BBR3's the first 20 bytes are the same. It measures every five seconds, with more."""
    assert pauses(code, size) == []


def test_a_pause_ends_with_bbr(code: ctypes.CDLL) -> None:
    """Another holder of the socket has chosen another congestion control."""
    assert len(pauses(code, later=DCTCP)) == 1
