"""What an endpoint is doing and has done: its session, the sums of those before it, in words too.

The endpoint's own thread writes it; any thread, and a signal handler, may read it. So what belongs
together is replaced as a whole, and nobody needs a lock.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

from ttun.congestion import Way
from ttun.peer import Peer
from ttun.session import Counters, Session
from ttun.settings import Addresses

DROPPED = {  # counters of packets that did not go through: how many ...
    "refused": "of the peer's packets were refused by the kernel",
    "unsendable": "could not be sent",
    "congested": "were dropped as the link was full",
    "forged": "of the peer's packets did not add up",
}


@dataclass(frozen=True)
class Status:
    """What an endpoint is doing now."""

    role: str  # "server" or "client"
    device: str | None  # "ttun0"; None before start
    peer: str | None  # "192.0.2.1:20203"; None while there is no session
    transport: str | None  # "tcp", "mptcp", ...
    wire: str | None  # "v1" or "x1"
    cipher: str | None  # of the session
    round_trip: float | None  # seconds, when it was measured last; on wire x1
    rekeys: int | None  # how often this session got fresh keys; on wire x1
    congestion_control: str | None  # "bbr", of the tunnel's connection
    retransmitted: float | None  # 0 to 1, of the segments that this end sent on it
    connected_for: float | None  # seconds
    silent_for: float | None  # seconds since a frame of the peer was opened
    sessions: int  # how many there have been, this one included
    counters: Counters  # of this session, or the last one
    totals: Counters  # of all sessions
    missing: list[str]  # what the device lacks: "route 203.0.113.0/24 missing"


@dataclass(frozen=True)
class Record:
    """The session that runs, or the last one."""

    session: Session | None = None
    connected: bool = False
    peer: str = ""
    transport: str = ""
    wire: str = ""
    cipher: str = ""
    since: float = 0.0
    sessions: int = 0  # this one included
    earlier: Counters = field(default_factory=Counters)  # of all sessions before it

    def begun(self, session: Session, peer: Peer) -> Record:
        """Return what follows when a session with a peer has begun."""
        return Record(
            session=session,
            connected=True,
            peer=peer.name,
            transport=peer.transport,
            wire=peer.keys.wire,
            cipher=peer.keys.sending.cipher.name,
            since=time.monotonic(),
            sessions=self.sessions + 1,
            earlier=self.earlier.plus(self.session.counters() if self.session else Counters()),
        )

    def ended(self) -> Record:
        """Return what follows when it has ended."""
        return replace(self, connected=False)

    def status(self, role: str, device: str | None, missing: list[str]) -> Status:
        """Return what there is to tell of an endpoint now."""
        session = self.session if self.connected else None
        control = session.control if session else None
        way = session.way() if session else None
        counters = self.session.counters() if self.session else Counters()
        return Status(
            role=role,
            device=device,
            peer=self.peer if session else None,
            transport=self.transport if session else None,
            wire=self.wire if session else None,
            cipher=self.cipher if session else None,
            round_trip=control.rtt if control else None,
            rekeys=control.rekeys if control else None,
            congestion_control=way.control if way else None,
            retransmitted=way.retransmitted if way else None,
            connected_for=time.monotonic() - self.since if session else None,
            silent_for=session.silence() if session else None,
            sessions=self.sessions,
            counters=counters,
            totals=self.earlier.plus(counters),
            missing=missing,
        )

    def facts(self, role: str, device: str | None, ours: Addresses) -> dict[str, str | None]:
        """Return what does not change while a session lasts, in words."""
        return {
            "role": role,
            "device": device,
            "peer": self.peer,
            "transport": self.transport,
            "wire": self.wire,
            "cipher": self.cipher,
            "local4": str(ours.ipv4),
            "local6": str(ours.ipv6),
        }


def carried(counters: Counters) -> str:
    """Return what went through in words."""
    text = (
        f"sent {counters.uplink_packets} packets, {size(counters.uplink_bytes)}; "
        f"received {counters.downlink_packets} packets, {size(counters.downlink_bytes)}"
    )
    for name, what in DROPPED.items():
        if number := getattr(counters, name):
            text += f"; {number} {what}"
    return text


def lost(way: Way | None) -> str:
    """Return what became of the segments of a connection, to follow carried()."""
    if way is None or way.retransmitted is None:
        return ""
    return f"; {100 * way.retransmitted:.1f} % retransmitted, {way.control}"


def size(number: float) -> str:
    """Return a number of bytes in the unit that suits it."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.1f} {unit}" if unit != "B" else f"{number:.0f} B"
        number /= 1024
    return f"{number:.1f} TiB"
