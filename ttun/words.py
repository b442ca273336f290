"""What a session carried and lost, in words for the log and ``ttun show``."""

from __future__ import annotations

from ttun.congestion import Way
from ttun.session import Counters


def carried(counters: Counters) -> str:
    """Return what went through in words."""
    text = (
        f"sent {counters.uplink_packets} packets, {size(counters.uplink_bytes)}; "
        f"received {counters.downlink_packets} packets, {size(counters.downlink_bytes)}"
    )
    if counters.refused:
        text += f"; {counters.refused} of the peer's packets were refused by the kernel"
    if counters.unsendable:
        text += f"; {counters.unsendable} could not be sent"
    if counters.congested:
        text += f"; {counters.congested} were dropped as the link was full"
    if counters.forged:
        text += f"; {counters.forged} of the peer's packets did not add up"
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
