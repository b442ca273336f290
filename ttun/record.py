"""Status of an endpoint: the current session and the totals of all sessions.

Only the endpoint's thread writes it; any thread and a signal handler may read it. A record is
immutable and replaced as a whole, so no lock is needed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, NamedTuple

from ttun.congestion import TcpStats
from ttun.device import Device
from ttun.peer import Peer
from ttun.session import Counters, Session
from ttun.settings import Interface

MOST_CHARACTERS = 500  # of a text that others cause
DROPPED = {  # counters of dropped packets, and why
    "refused": "rejected by the kernel",
    "unsendable": "too large",
    "congested": "queue full",
    "forged": "malformed offload packet",
}


@dataclass(frozen=True)
class Status:
    """The current status of an endpoint."""

    role: str  # "server" or "client"
    device: str | None  # "ttun0"; None before start
    peer: str | None  # "192.0.2.1:20203"; None without a session
    transport: str | None  # "tcp", "mptcp", ...
    wire: str | None  # "v1" or "x1"
    cipher: str | None  # of the session
    round_trip: float | None  # seconds, last measured; protocol x1 only
    rekeys: int | None  # of this session; protocol x1 only
    congestion_control: str | None  # "bbr", of the tunnel's connection
    retransmitted: float | None  # share of the segments sent by this end, 0 to 1
    connected_for: float | None  # seconds
    silent_for: float | None  # seconds since the last frame from the peer
    sessions: int  # since the start, including this one
    counters: Counters  # of this or the last session
    totals: Counters  # of all sessions
    missing: list[str]  # deviations of the device: "route 203.0.113.0/24 missing"
    uptime: float  # seconds since this end was created
    endpoint: str  # where a server listens; the server that a client dials
    failed_attempts: int  # since the last session: connections and handshakes
    last_failure: str | None  # why the last of them failed; if 0, why the last session ended
    last_failure_ago: float | None  # seconds
    mtu: int | None = None  # bytes, of the device; None before start, as are the addresses
    local4: str | None = None  # this end's in the tunnel: "10.1.1.1/30"
    peer4: str | None = None  # the peer's, as far as this end knows it
    local6: str | None = None  # None too if the tunnel carries no IPv6
    peer6: str | None = None


class Record(NamedTuple):
    """The current or the last session."""

    session: Session | None = None
    connected: bool = False
    peer: str = ""
    transport: str = ""
    wire: str = ""
    cipher: str = ""
    since: float = 0.0
    sessions: int = 0  # including this one
    earlier: Counters = Counters()  # of all sessions before it
    failed: int = 0  # attempts since then
    why: str = ""  # the last one failed, or this session ended
    failed_at: float = 0.0

    def begun(self, session: Session, peer: Peer) -> Record:
        """Return the record after the start of a session."""
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

    def ended(self, why: str) -> Record:
        """Return the record after its end."""
        return self.failure(why)._replace(connected=False, failed=0)

    def failure(self, why: str) -> Record:
        """Return the record after an attempt that failed."""
        why = why[:MOST_CHARACTERS]
        return self._replace(failed=self.failed + 1, why=why, failed_at=time.monotonic())

    def status(self, **ends: Any) -> Status:
        """Return the current status. ends: the fields of Status that an endpoint knows."""
        session = self.session if self.connected else None
        control = session.control if session else None
        stats = session.tcp_stats() if session else None
        counters = self.session.counters() if self.session else Counters()
        return Status(
            peer=self.peer if session else None,
            transport=self.transport if session else None,
            wire=self.wire if session else None,
            cipher=self.cipher if session else None,
            round_trip=control.rtt if control else None,
            rekeys=control.rekeys if control else None,
            congestion_control=stats.control if stats else None,
            retransmitted=stats.retransmitted if stats else None,
            connected_for=time.monotonic() - self.since if session else None,
            silent_for=session.silence() if session else None,
            sessions=self.sessions,
            counters=counters,
            totals=self.earlier.plus(counters),
            failed_attempts=self.failed,
            last_failure=self.why or None,
            last_failure_ago=time.monotonic() - self.failed_at if self.why else None,
            **ends,
        )

    def facts(self, role: str, ends: dict[str, Any]) -> dict[str, str | None]:
        """Return what stays the same during a session, as text. ends: see in_tunnel()."""
        return {
            "role": role,
            "device": ends["device"],
            "peer": self.peer,
            "transport": self.transport.partition(" ")[0],  # without the proxy
            "wire": self.wire,
            "cipher": self.cipher,
            "local4": ends.get("local4"),
            "local6": ends.get("local6"),
        }


def in_tunnel(device: Device | None) -> dict[str, Any]:
    """Return the fields of Status that a device has."""
    if device is None:
        return {"device": None}
    ours = device.addresses
    found = {
        "device": device.name,
        "mtu": device.mtu,
        "local4": str(ours.ipv4),
        "peer4": _other(ours.ipv4, ours.peer4),
    }
    if device.has_ipv6:
        found.update(local6=str(ours.ipv6), peer6=_other(ours.ipv6, ours.peer6))
    return found


def _other(ours: Interface, peer: object) -> str | None:
    """Return the peer's address as text: the given one, else the other one of two.

    Those of an IPv4 /30 are its two hosts, and an IPv6 /126 is used likewise.
    """
    mask = int(ours.hostmask)
    if peer is None and (mask == 1 or (mask == 3 and int(ours) & 3 in (1, 2))):
        peer = type(ours.ip)(int(ours) ^ mask)
    return None if peer is None else str(peer)


def carried(counters: Counters) -> str:
    """Return the counters as text."""
    text = (
        f"uplink {counters.uplink_packets} packets, {size(counters.uplink_bytes)}; "
        f"downlink {counters.downlink_packets} packets, {size(counters.downlink_bytes)}"
    )
    for name, what in DROPPED.items():
        if number := getattr(counters, name):
            text += f"; {number} dropped: {what}"
    return text


def lost(stats: TcpStats | None) -> str:
    """Return the retransmissions as text, to append to carried()."""
    if stats is None or stats.retransmitted is None:
        return ""
    return f"; {100 * stats.retransmitted:.1f} % retransmitted, {stats.control}"


def size(number: float) -> str:
    """Return a number of bytes in a suitable unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.1f} {unit}" if unit != "B" else f"{number:.0f} B"
        number /= 1024
    return f"{number:.1f} TiB"
