"""What a session carried and lost, in words for the log and ``ttun show``."""

from __future__ import annotations

from ttun.congestion import Way
from ttun.session import Counters

DROPPED = {  # counters of packets that did not go through: how many ...
    "refused": "of the peer's packets were refused by the kernel",
    "unsendable": "could not be sent",
    "congested": "were dropped as the link was full",
    "forged": "of the peer's packets did not add up",
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
