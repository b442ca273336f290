"""A peer from its connection to the proof of the key, and how a server meets it.

1. Host: the listener, and how a handshake begins.
2. Pending: a connection that has proved nothing yet, and how much there is to lose with it.
3. Peer: one that has proved the key; a session takes it over.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from dataclasses import dataclass, field
from typing import Callable, Protocol

from ttun.handshake import NONCE_SIZE, Keys, Steps

SILENT_AFTER = 0.1  # seconds without a byte


class Listener(Protocol):
    """What is used of a listening socket."""

    def fileno(self) -> int:
        """Return what is readable when somebody waits to be accepted."""

    def accept(self) -> tuple[socket.socket, tuple[str, int]]:
        """Return a connection and where it comes from."""


@dataclass
class Host:
    """How a server meets its peers."""

    listener: Listener
    begin: Callable[[], Steps]  # a handshake for the next peer
    knows_key: Callable[[bytes], bool]  # does a client's nonce show that it has the key?
    silent: bool  # strangers get no answer at all


@dataclass
class Peer:
    """A peer that has proved the key."""

    sock: socket.socket
    name: str
    keys: Keys

    def close(self) -> None:
        """Give it up: there will be no session with it."""
        self.keys.discard()
        self.sock.close()


@dataclass(eq=False)
class Pending:
    """A connection whose peer has not proved the key yet."""

    sock: socket.socket
    name: str
    network: str
    since: float
    deadline: float
    steps: Steps | None = None  # None: held, or never to be answered
    wanted: int = NONCE_SIZE
    received: bytearray = field(default_factory=bytearray)
    spoke: bool = False  # it sent something
    greeted: bool = False  # it was sent something
    knows_key: bool = False  # as far as its nonce tells
    unrecognized: bool = False

    def worth(self, now: float) -> int:
        """Return how much there is to lose with it: the least goes first."""
        if self.knows_key:
            return 3
        if self.unrecognized:
            return 0
        return 1 if not self.spoke and now - self.since >= SILENT_AFTER else 2


def network(address: str) -> str:
    """Return what one host can easily have many addresses of: an IPv6 /64; else the address."""
    with contextlib.suppress(ValueError):
        ip = ipaddress.ip_address(address.partition("%")[0])
        if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is None:
            return str(ipaddress.ip_network((ip, 64), strict=False))
    return address
