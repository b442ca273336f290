"""How much memory a tunnel may take for what is under way: as much as is fast, or little.

The socket's own buffers are the kernel's to size: a bound set here would bound what goes through
the connection in a round trip. docs/performance.md has the figures.
"""

from __future__ import annotations

from typing import NamedTuple

from ttun.errors import UsageError


class Buffers(NamedTuple):
    """What to take. A slot (csrc/ring.h) holds 260 KiB of frames, so the largest one always."""

    slots: int  # for each direction, 1 to 4
    queue: int  # packets of up to 64 KiB that the device keeps while the uplink is busy
    waiting: int  # bytes of packets that wait in the uplink's queue, in steps of 512
    nonces: int  # of clients that a server remembers to have answered, 8 bytes each


# The queue was measured (docs/performance.md): 500, the kernel's own, loses some of 100,000 small
# datagrams per second when a core is away for 5 ms; more than this only adds waiting.
NORMAL = Buffers(slots=4, queue=1000, waiting=4 << 20, nonces=65536)
SMALL = Buffers(slots=1, queue=100, waiting=512 << 10, nonces=4096)
BUFFERS = {"normal": NORMAL, "small": SMALL}


def find(name: str) -> Buffers:
    """Return those of a name. Raises UsageError."""
    if name not in BUFFERS:
        raise UsageError(f"unknown buffers {name!r}: choose {' or '.join(BUFFERS)}")
    return BUFFERS[name]
