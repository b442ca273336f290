"""The states of a connection before its session.

1. Host: a server's listener, and how it starts a handshake.
2. HalfOpen: a connection whose peer is not authenticated, and its priority in an overload.
3. Peer: an authenticated peer, ready for a session.
"""

from __future__ import annotations

import errno
import os
import socket
from dataclasses import dataclass, field
from typing import Callable, NamedTuple

from ttun.conversation import CLOSED, Conversation
from ttun.handshake import Keys, Steps
from ttun.transport import Listener

CLOSES = (CLOSED, os.strerror(errno.ECONNRESET), os.strerror(errno.EPIPE))
SILENT_AFTER = 0.1  # seconds without receiving a byte


class Host(NamedTuple):
    """How a server accepts its peers."""

    listener: Listener
    begin: Callable[[], Steps]  # starts a handshake
    knows_key: Callable[[bytes], bool]  # whether a client's nonce carries a valid mark
    silent: bool  # never answer an unauthenticated client


class Peer(NamedTuple):
    """An authenticated peer."""

    sock: socket.socket
    name: str
    transport: str  # e.g. "tcp"
    keys: Keys

    def close(self) -> None:
        """Close the connection and wipe the keys, if no session was started."""
        self.keys.discard()
        self.sock.close()


@dataclass(eq=False)
class HalfOpen:
    """A connection whose peer is not authenticated yet."""

    sock: socket.socket
    name: str
    transport: str
    source: str  # see transport.Arrival
    since: float
    deadline: float
    handshake: Conversation[Keys] | None = None  # None: not started
    nonce: bytearray = field(default_factory=bytearray)  # of a client, before the handshake
    knows_key: bool = False  # its nonce carries a valid mark
    unrecognized: bool = False
    dialled: bool = False  # by this end, a client

    @property
    def spoke(self) -> bool:
        """Whether the peer has sent anything."""
        return bool(self.nonce) or (self.handshake is not None and self.handshake.heard)

    def explain(self, why: str) -> str:
        """Return why its handshake failed; for a client with the probable cause."""
        if not self.dialled or (self.spoke and why not in CLOSES):
            return why
        if self.handshake is not None and self.handshake.answered:
            return f"{why} (probably a different pre-shared key, or with v1 a different cipher)"
        if why in CLOSES:
            return f"{why}, before the server answered (does a ttun server listen there?)"
        return f"{why} (no answer: different pre-shared key, or the server has another client)"

    def worth(self, now: float) -> int:
        """Return its priority, 0 to 3: in an overload the lowest is dropped first."""
        if self.knows_key:
            return 3
        if self.unrecognized:
            return 0
        return 1 if not self.spoke and now - self.since >= SILENT_AFTER else 2
