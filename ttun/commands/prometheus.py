"""The metrics of ``ttun show --prometheus``, in the text format of Prometheus (exposition formats).

A monitoring system keeps a series for each set of labels, so those of a tunnel survive its restart,
and no user can give a tunnel those of root's.
"""

from __future__ import annotations

from typing import Any

from ttun.commands.answer import Tunnel
from ttun.errors import printable
from ttun.record import DROPPED

COUNTERS = {  # name: help, the field of Counters
    "ttun_sent_bytes_total": ("Uplink bytes, from the device to the peer", "uplink_bytes"),
    "ttun_sent_packets_total": ("Uplink packets", "uplink_packets"),
    "ttun_received_bytes_total": ("Downlink bytes, from the peer to the device", "downlink_bytes"),
    "ttun_received_packets_total": ("Downlink packets", "downlink_packets"),
    **{f"ttun_{name}_packets_total": (f"Dropped: {w}", name) for name, w in DROPPED.items()},
}


def lines(tunnels: list[Tunnel], labels: list[str]) -> list[str]:
    """Return the lines of the text format. A tunnel without labels is left out."""
    found = []

    def metric(name: str, kind: str, text: str, values: list[Any]) -> None:
        found.extend([f"# HELP {name} {text}.", f"# TYPE {name} {kind}"])
        for label, value in zip(labels, values):
            if label and value is not None:
                found.append(f"{name}{{{label}}} {value:.16g}")

    for name, (text, field) in COUNTERS.items():
        metric(name, "counter", text, [t["totals"][field] for t in tunnels])
    for name, kind, text, field in (
        ("ttun_sessions_total", "counter", "Sessions, the current one included", "sessions"),
        ("ttun_round_trip_seconds", "gauge", "Last measured round-trip time", "round_trip"),
        ("ttun_retransmitted_ratio", "gauge", "Share of retransmitted segments", "retransmitted"),
        ("ttun_uptime_seconds", "gauge", "Time since the start", "uptime"),
        ("ttun_failed_attempts", "gauge", "Failed since the last session", "failed_attempts"),
        ("ttun_silence_seconds", "gauge", "Time since data was last received", "silent_for"),
    ):
        metric(name, kind, text, [t[field] for t in tunnels])
    connected = [int(t["peer"] is not None) for t in tunnels]
    metric("ttun_connected", "gauge", "Whether a peer is connected", connected)
    return found


def labels(tunnels: list[Tunnel], elsewhere: list[str]) -> list[str]:
    """Return the labels of each tunnel, all different; "" for one that has none of its own.

    Labels survive a restart: device and role, and the network namespace if it is another one. The
    process is added only if another tunnel has the same labels, which is unusual. root's tunnels
    come first: no other user can forge one. elsewhere: the network namespace of each, "" for this.
    """
    found = [""] * len(tunnels)
    taken = {""}
    each = [(t["uid"] != 0, t["pid"] or 0, number) for number, t in enumerate(tunnels)]
    for _, pid, number in sorted(each):
        pairs = {"device": tunnels[number]["device"] or "", "role": tunnels[number]["role"]}
        if elsewhere[number]:
            pairs["netns"] = elsewhere[number]
        if _text_of(pairs) in taken:
            pairs["pid"] = str(pid)
        if (text := _text_of(pairs)) not in taken:
            found[number] = text
            taken.add(text)
    return found


def _text_of(pairs: dict[str, str]) -> str:
    """Return labels with their values in quotes, escaped for the format and for a terminal."""
    return ",".join(f'{name}="{_escaped(value)}"' for name, value in pairs.items())


def _escaped(value: str) -> str:
    escapes = str.maketrans({"\\": r"\\", '"': r"\""})
    return r"\n".join(printable(line).translate(escapes) for line in value.split("\n"))
