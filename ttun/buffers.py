"""How much memory a tunnel may take for what is under way: as much as is fast, or little.

Small costs speed on a long link: a socket buffer bounds what goes through it in a round trip.
docs/performance.md has the figures.
"""

from __future__ import annotations

import contextlib
import socket
from typing import NamedTuple

from ttun.errors import UsageError


class Buffers(NamedTuple):
    """What to take. A slot (csrc/lane.h) holds 260 KiB of frames, so the largest one always."""

    slots: int  # for each direction, 1 to 4
    sockets: int | None  # bytes, of SO_SNDBUF and of SO_RCVBUF; None: what the kernel finds right
    queue: int  # packets of up to 64 KiB that the device keeps while the uplink is busy
    nonces: int  # of clients that a server remembers to have answered, 8 bytes each

    def apply(self, sock: socket.socket) -> None:
        """Bound the buffers of a connection. The kernel takes twice the number: socket(7)."""
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            if self.sockets is not None:
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, option, self.sockets)


# The queue was measured (docs/performance.md): 500, the kernel's own, loses some of 100,000 small
# datagrams per second when a core is away for 5 ms; more than this only adds waiting.
NORMAL = Buffers(slots=4, sockets=None, queue=1000, nonces=65536)
SMALL = Buffers(slots=1, sockets=128 * 1024, queue=100, nonces=4096)
BUFFERS = {"normal": NORMAL, "small": SMALL}


def find(name: str) -> Buffers:
    """Return those of a name. Raises UsageError."""
    if name not in BUFFERS:
        raise UsageError(f"unknown buffers {name!r}: choose {' or '.join(BUFFERS)}")
    return BUFFERS[name]
