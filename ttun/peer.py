"""A peer from its connection to the proof of the key, and how a server accepts it.

1. Host: the listener, and how a handshake begins.
2. HalfOpen: a connection whose peer has proved nothing yet, and how much is lost by dropping it.
3. Peer: one that has proved the key; a session takes it over.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from typing import Callable

from ttun.conversation import Conversation
from ttun.handshake import Keys, Steps
from ttun.transport import Listener

SILENT_AFTER = 0.1  # seconds without a byte


@dataclass
class Host:
    """How a server accepts its peers."""

    listener: Listener
    begin: Callable[[], Steps]  # a handshake for the next peer
    knows_key: Callable[[bytes], bool]  # does a client's nonce show that it has the key?
    silent: bool  # strangers get no answer at all


@dataclass
class Peer:
    """A peer that has proved the key."""

    sock: socket.socket
    name: str
    transport: str  # what carries it: "tcp", say
    keys: Keys

    def close(self) -> None:
        """Drop it: there will be no session with it."""
        self.keys.discard()
        self.sock.close()


@dataclass(eq=False)
class HalfOpen:
    """A connection whose peer has not proved the key yet."""

    sock: socket.socket
    name: str
    transport: str
    source: str  # as in transport.Arrival
    since: float
    deadline: float
    handshake: Conversation[Keys] | None = None  # None: not begun, or never to be
    nonce: bytearray = field(default_factory=bytearray)  # of a client, before that
    knows_key: bool = False  # as far as its nonce tells
    unrecognized: bool = False

    @property
    def spoke(self) -> bool:
        """Whether its peer has sent anything."""
        return bool(self.nonce) or (self.handshake is not None and self.handshake.heard)

    def worth(self, now: float) -> int:
        """Return how much is lost by dropping it: the least is dropped first."""
        if self.knows_key:
            return 3
        if self.unrecognized:
            return 0
        return 1 if not self.spoke and now - self.since >= SILENT_AFTER else 2
