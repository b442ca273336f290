"""What a session takes of the machine it gives back; where there is nothing to take, it says so."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ttun._codec import ffi, lib

from ttun.cipher import EVERYWHERE, TO_SERVER, CipherState

SLOTS, QUEUE = 4, 1 << 20
MIB = 1 << 20
TIMES = 2000  # the smallest block is some kB
CELL, LARGEST = 512, 1 << 24  # bytes of a queue
PACKETS = 2 * ((16 + lib.TTUN_PACKET_MAX + 15) // 16 * 16)  # bytes of two buffers
SMALLEST = (PACKETS + CELL - 1) // CELL * CELL
MOST = 100
COARSE = 20  # ms between two ticks of the kernel, at most


@pytest.fixture
def ends() -> Iterator[tuple[int, int]]:
    """Descriptors in place of a device and a connection."""
    device, connection = socket.socketpair()
    with device, connection:
        yield device.fileno(), connection.fileno()


def new_session(ends: tuple[int, int], queue: int = QUEUE, slots: int = SLOTS) -> Any:
    state = ffi.new("struct ttun_cipher_state *")
    return lib.ttun_session_new(*ends, 0, 0, state, state, 1, slots, queue)


def virtual() -> int:
    """The address space of this process in bytes: memory counts even if nobody wrote to it."""
    found = re.search(r"VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@contextlib.contextmanager
def limited(what: int, most: int) -> Iterator[None]:
    before = resource.getrlimit(what)
    resource.setrlimit(what, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, before)


def test_a_session_gives_back_all_that_it_took(ends: tuple[int, int]) -> None:
    lib.ttun_session_free(new_session(ends))
    before = descriptors(), virtual()
    for _ in range(TIMES):
        lib.ttun_session_free(new_session(ends))
    assert descriptors() == before[0]
    assert virtual() - before[1] < 10 * MIB, "of more than 2,000"


@pytest.mark.parametrize(
    ("slots", "queue", "taken"),
    [
        (1, SMALLEST, True),
        (SLOTS, LARGEST, True),
        (0, QUEUE, False),
        (SLOTS + 1, QUEUE, False),
        (SLOTS, SMALLEST - CELL, False),
        (SLOTS, LARGEST + CELL, False),
        (SLOTS, QUEUE + 1, False),
    ],
)
def test_the_sizes_that_a_session_takes(
    ends: tuple[int, int], slots: int, queue: int, taken: bool
) -> None:
    session = new_session(ends, queue, slots)
    assert (session != ffi.NULL) == taken
    assert taken or ffi.errno == errno.EINVAL
    lib.ttun_session_free(session)


def test_a_session_takes_new_keys_once_and_with_tags_of_the_same_size(
    ends: tuple[int, int],
) -> None:
    session = new_session(ends)  # without a cipher: a tag of no bytes
    same = ffi.new("struct ttun_cipher_state *")
    other = CipherState(EVERYWHERE, TO_SERVER, bytes(32)).c
    assert not lib.ttun_session_rekey(session, same, other)
    assert lib.ttun_session_rekey(session, same, same)
    assert not lib.ttun_session_rekey(session, same, same), "nobody has changed to them"
    lib.ttun_session_free(session)


def test_without_a_descriptor_there_is_no_session_and_no_memory_is_lost(
    ends: tuple[int, int],
) -> None:
    before = virtual()
    lowest_free = os.dup(ends[0])
    os.close(lowest_free)
    with limited(resource.RLIMIT_NOFILE, lowest_free):
        for _ in range(TIMES):
            assert new_session(ends) == ffi.NULL
            assert ffi.errno == errno.EMFILE
    assert virtual() - before < 10 * MIB, "of more than 2,000"


@pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="a sanitizer takes more than there is")
def test_without_memory_there_is_no_session_and_no_descriptor_is_lost(
    ends: tuple[int, int],
) -> None:
    before = descriptors()
    kept = [new_session(ends, LARGEST)]
    with limited(resource.RLIMIT_AS, virtual()):
        while kept[-1] != ffi.NULL and len(kept) < MOST:  # some fit into what was freed before
            kept.append(new_session(ends, LARGEST))
        assert ffi.errno == errno.ENOMEM
    assert kept[-1] == ffi.NULL
    for each in kept:
        lib.ttun_session_free(each)
    assert descriptors() == before


def test_a_session_reads_the_monotonic_clock() -> None:
    for _ in range(3):
        times = time.monotonic_ns(), lib.now_us(), lib.now_ms(), time.monotonic_ns()
        assert times[0] // 1000 <= times[1] <= times[3] // 1000
        assert times[0] // 10**6 - COARSE <= times[2] <= times[3] // 10**6
        time.sleep(0.4)
