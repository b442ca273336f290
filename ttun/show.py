"""``ttun show``: what the tunnels of this machine are doing.

1. Ask every status socket, or the one of a device.
2. Print it for people, as JSON, or for Prometheus; or again every second, with rates and a graph of
   the last minute.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections import deque
from collections.abc import Iterable
from typing import Any

from ttun import status
from ttun.endpoint import size_in_words
from ttun.errors import TtunError

Tunnel = dict[str, Any]
BARS = " ▁▂▃▄▅▆▇█"
GRAPH_WIDTH = 60  # samples, one a second
CLEAR = "\033[H\033[J"
DROPPED = ("refused", "unsendable", "congested", "forged")  # fields of Counters
COUNTERS = {  # of Prometheus: name, help, the field of Counters
    "ttun_sent_bytes_total": ("Bytes of packets sent to the peer", "uplink_bytes"),
    "ttun_sent_packets_total": ("Packets sent to the peer", "uplink_packets"),
    "ttun_received_bytes_total": ("Bytes of packets received", "downlink_bytes"),
    "ttun_received_packets_total": ("Packets received", "downlink_packets"),
    "ttun_refused_packets_total": ("Packets of the peer that the kernel refused", "refused"),
    "ttun_unsendable_packets_total": ("Packets that could not be sent", "unsendable"),
    "ttun_congested_packets_total": ("Packets dropped as the link was full", "congested"),
    "ttun_forged_packets_total": ("Packets of the peer that did not add up", "forged"),
}


def run(device: str | None, how: str) -> int:
    """Show all tunnels, or that of one device. how: "text", "json", "prometheus" or "watch"."""
    if how == "watch":
        with contextlib.suppress(KeyboardInterrupt):
            _watch(device)
        return 0
    tunnels = find(device)
    if how == "json":
        print(json.dumps(tunnels, indent=1))
    elif how == "prometheus":
        print("\n".join(prometheus(tunnels)))
    else:
        print("\n\n".join("\n".join(describe(tunnel)) for tunnel in tunnels))
    return 0


def find(device: str | None) -> list[Tunnel]:
    """Return what every tunnel answers. Raises TtunError if there is none, or none for us."""
    tunnels, denied = [], False
    for directory in status.directories():
        for path in sorted(directory.glob("*.sock")):
            try:
                answer = status.ask(path)
            except PermissionError:
                denied = True
                continue
            if answer is not None and device in (None, answer["device"]):
                tunnels.append(answer)
    if not tunnels and denied:
        raise TtunError("the tunnel here is another user's: run it with sudo")
    if not tunnels:
        raise TtunError(f"no tunnel runs here{f' on {device}' if device else ''}")
    return tunnels


def describe(tunnel: Tunnel) -> list[str]:
    """Return a tunnel in words, line by line."""
    lines = [f"{tunnel['device']}: {tunnel['role']}"]
    if missing := tunnel.get("missing"):
        lines.append(f"  device: {', '.join(missing)}")
    if tunnel["peer"] is None:
        lines.append("  no peer")
    else:
        lines += [
            f"  peer: {tunnel['peer']} over {tunnel['transport']}",
            f"  wire: {tunnel['wire']}, {tunnel['cipher']}"
            + (", forward secrecy" if tunnel["wire"] == "x1" else ""),
            f"  connected: {_duration(tunnel['connected_for'])}, "
            f"last heard of {_duration(tunnel['silent_for'])} ago",
        ]
        if tunnel["round_trip"] is not None:
            lines.append(f"  round trip: {tunnel['round_trip'] * 1000:.2f} ms")
    total = tunnel["totals"]
    lines += [
        f"  sent: {size_in_words(total['uplink_bytes'])}, {total['uplink_packets']} packets",
        f"  received: {size_in_words(total['downlink_bytes'])}, "
        f"{total['downlink_packets']} packets",
    ]
    dropped = {name: total[name] for name in DROPPED if total[name]}
    if dropped:
        lines.append("  dropped: " + ", ".join(f"{n} {name}" for name, n in dropped.items()))
    if tunnel["sessions"] > 1:
        lines.append(f"  reconnects: {tunnel['sessions'] - 1}")
    return lines


def prometheus(tunnels: list[Tunnel]) -> list[str]:
    """Return the lines of the text format (prometheus.io, exposition formats)."""
    lines = []

    def metric(name: str, kind: str, text: str, values: list[Any]) -> None:
        lines.extend([f"# HELP {name} {text}.", f"# TYPE {name} {kind}"])
        for t, value in zip(tunnels, values):
            if value is not None:  # no quote is in a device's name: the kernel made it
                labels = f'device="{t["device"]}",role="{t["role"]}"'
                lines.append(f"{name}{{{labels}}} {value:.16g}")

    for name, (text, field) in COUNTERS.items():
        metric(name, "counter", text, [t["totals"][field] for t in tunnels])
    for name, kind, text, field in (
        ("ttun_sessions_total", "counter", "Sessions so far", "sessions"),
        ("ttun_round_trip_seconds", "gauge", "The last measured round trip", "round_trip"),
        ("ttun_silence_seconds", "gauge", "Time since the peer was last heard of", "silent_for"),
    ):
        metric(name, kind, text, [t[field] for t in tunnels])
    connected = [int(t["peer"] is not None) for t in tunnels]
    metric("ttun_connected", "gauge", "Whether there is a peer", connected)
    return lines


class _Rates:
    """Bits per second each way, of the last minute."""

    def __init__(self) -> None:
        self.before: tuple[float, int, int] | None = None
        self.sent: deque[float] = deque(maxlen=GRAPH_WIDTH)
        self.received: deque[float] = deque(maxlen=GRAPH_WIDTH)

    def add(self, now: float, total: dict[str, int]) -> None:
        sample = now, total["uplink_bytes"], total["downlink_bytes"]
        if self.before is not None and now > self.before[0]:
            seconds = now - self.before[0]
            self.sent.append(max(0, sample[1] - self.before[1]) * 8 / seconds)
            self.received.append(max(0, sample[2] - self.before[2]) * 8 / seconds)
        self.before = sample

    def lines(self) -> list[str]:
        most = max([1.0, *self.sent, *self.received])
        return [
            f"  {name:<9}{_rate(rates[-1] if rates else 0):>13}  {graph(rates, most)}"
            for name, rates in (("sending", self.sent), ("receiving", self.received))
        ]


def graph(values: Iterable[float], most: float) -> str:
    """Return one bar for each value, the highest for most."""
    return "".join(BARS[min(8, round(8 * value / most))] for value in values).rjust(GRAPH_WIDTH)


def _watch(device: str | None) -> None:
    rates: dict[tuple[str, str], _Rates] = {}
    while True:
        try:
            tunnels = find(device)
        except TtunError:
            if not rates:
                raise
            tunnels = []
        lines = [] if tunnels else ["no tunnel runs any more"]
        for tunnel in tunnels:
            mine = rates.setdefault((tunnel["device"], tunnel["role"]), _Rates())
            mine.add(time.monotonic(), tunnel["totals"])
            lines += [*describe(tunnel), *mine.lines(), ""]
        print((CLEAR if sys.stdout.isatty() else "") + "\n".join(lines), flush=True)
        time.sleep(1)


def _rate(bits: float) -> str:
    for unit in ("bit/s", "kbit/s", "Mbit/s"):
        if bits < 1000:
            return f"{bits:.1f} {unit}"
        bits /= 1000
    return f"{bits:.2f} Gbit/s"


def _duration(seconds: float) -> str:
    """Return seconds in the two units that suit."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    units = [("d", 86400), ("h", 3600), ("min", 60), ("s", 1)]
    left, words = int(seconds), []
    for name, size in units:
        if left >= size:
            words.append(f"{left // size} {name}")
            left %= size
    return " ".join(words[:2])
