"""``ttun show``: what the tunnels of this machine are doing.

1. Ask every status socket; choose those of a device, if one is named. What was skipped goes to
   stderr.
2. Print it for people, as JSON, or for Prometheus; or again every second, with rates and a graph of
   the last minute.

A tunnel is known by its device, its role and its network namespace, and where these are alike by
its process.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ttun.commands import query, runtime
from ttun.commands.answer import Tunnel
from ttun.errors import TtunError, printable
from ttun.record import DROPPED, size

BARS = " ▁▂▃▄▅▆▇█"
GRAPH_WIDTH = 60  # samples, one a second
CLEAR = "\033[H\033[J"
MOST_LINES = 10  # about what was skipped
LAST_RESORT = 10  # seconds
OWN_NETNS = Path("/proc/self/ns/net")
NAMED_NETNS = Path("/run/netns")  # ip-netns(8)
COUNTERS = {  # of Prometheus: name, help, the field of Counters
    "ttun_sent_bytes_total": ("Bytes of packets sent to the peer", "uplink_bytes"),
    "ttun_sent_packets_total": ("Packets sent to the peer", "uplink_packets"),
    "ttun_received_bytes_total": ("Bytes of packets received", "downlink_bytes"),
    "ttun_received_packets_total": ("Packets received", "downlink_packets"),
    **{f"ttun_{name}_packets_total": (f"Dropped: {w}", name) for name, w in DROPPED.items()},
}


def run(device: str | None, how: str) -> int:
    """Show all tunnels, or those of one device. how: "text", "json", "prometheus" or "watch"."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if how == "watch":
        with contextlib.suppress(KeyboardInterrupt):
            _watch(device)
        return 0
    tunnels = ask(device)
    if how == "json":
        print(json.dumps(tunnels, indent=1))
    elif how == "prometheus":
        print("\n".join(prometheus(tunnels)))
    else:
        print("\n\n".join("\n".join(lines) for lines in describe_all(tunnels)))
    return 0


def ask(device: str | None, told: list[str] | None = None) -> list[Tunnel]:
    """Return what every tunnel answers, and say on stderr what was skipped, but not what was told.

    Raises TtunError if there is none, or none for us.
    """
    told = [] if told is None else told
    directories = runtime.directories()
    with _last_resort(f"cannot ask in {' or '.join(map(str, directories))}: no answer"):
        try:
            tunnels, skipped, denied = query.ask(directories)
        except OSError as error:
            why = f"{error.strerror or error} (is /proc mounted?)"
            raise TtunError(f"cannot ask the tunnels: {why}") from None
    _tell([line for line in skipped if line not in told])
    told[:] = skipped
    found = [t for t in tunnels if device in (None, t["device"])]
    if not found and denied:
        raise TtunError("the tunnel here is another user's: run it with sudo")
    if not found:
        raise TtunError(f"no tunnel runs here{f' on {printable(device)}' if device else ''}")
    return sorted(found, key=lambda t: (t["device"] or "", t["role"], t["netns"] or 0, _pid(t)))


@contextlib.contextmanager
def _last_resort(message: str) -> Iterator[None]:
    """End this program when what follows takes too long.

    It is bounded itself, but for a system call that waits for a file system of an unprivileged user
    (FUSE) in place of a directory: nothing but the end of the process ends that.
    """

    def end() -> None:
        _tell([printable(message)])
        os._exit(1)

    timer = threading.Timer(LAST_RESORT, end)
    timer.daemon = True
    with contextlib.suppress(RuntimeError):  # no more threads
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _tell(lines: list[str]) -> None:
    more = len(lines) - MOST_LINES
    for line in lines[:MOST_LINES] + ([f"and {more} more"] if more > 0 else []):
        print(f"ttun: {line}", file=sys.stderr)


def describe_all(tunnels: list[Tunnel]) -> list[list[str]]:
    """Return tunnels in words; those that look alike with what tells them apart."""
    alike = Counter((t["device"], t["role"]) for t in tunnels)
    names = _netns_names()
    described = []
    for tunnel in tunnels:
        who = ""
        if alike[tunnel["device"], tunnel["role"]] > 1:
            who = f", netns {_netns(tunnel, names) or 'unknown'}, pid {_pid(tunnel)}"
        if tunnel["uid"] not in (0, os.geteuid()):  # anybody could say what follows
            who += f", user {tunnel['uid']}"
        described.append(describe(tunnel, who))
    return described


def describe(tunnel: Tunnel, who: str = "") -> list[str]:
    """Return a tunnel in words, line by line. who: more of whose it is, behind its role."""
    lines = [f"{printable(tunnel['device'] or 'no device')}: {tunnel['role']}{who}"]
    if tunnel["missing"]:
        lines.append(f"  device: {', '.join(map(printable, tunnel['missing']))}")
    if tunnel["peer"] is None:
        lines.append("  no peer")
    else:
        connected = f"  connected: {_duration(tunnel['connected_for'])}"
        if tunnel["silent_for"] is not None:  # else it is just ending
            connected += f", last heard of {_duration(tunnel['silent_for'])} ago"
        lines += [
            f"  peer: {printable(tunnel['peer'])} over {printable(tunnel['transport'])}",
            f"  wire: {tunnel['wire']}, {printable(tunnel['cipher'])}"
            + (", forward secrecy" if tunnel["wire"] == "x1" else ""),
            connected,
        ]
        if tunnel["round_trip"] is not None:
            lines.append(f"  round trip: {tunnel['round_trip'] * 1000:.2f} ms")
        if tunnel["congestion_control"] is not None:
            lost = tunnel["retransmitted"]
            share = "" if lost is None else f", {100 * lost:.1f} % retransmitted"
            lines.append(f"  congestion control: {printable(tunnel['congestion_control'])}{share}")
    total = tunnel["totals"]
    lines += [
        f"  sent: {size(total['uplink_bytes'])}, {total['uplink_packets']} packets",
        f"  received: {size(total['downlink_bytes'])}, {total['downlink_packets']} packets",
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
    labels = _labels(tunnels)

    def metric(name: str, kind: str, text: str, values: list[Any]) -> None:
        lines.extend([f"# HELP {name} {text}.", f"# TYPE {name} {kind}"])
        for label, value in zip(labels, values):
            if label and value is not None:
                lines.append(f"{name}{{{label}}} {value:.16g}")

    for name, (text, field) in COUNTERS.items():
        metric(name, "counter", text, [t["totals"][field] for t in tunnels])
    for name, kind, text, field in (
        ("ttun_sessions_total", "counter", "Sessions so far", "sessions"),
        ("ttun_round_trip_seconds", "gauge", "The last measured round trip", "round_trip"),
        (
            "ttun_retransmitted_ratio",
            "gauge",
            "Retransmitted share of what was sent",
            "retransmitted",
        ),
        ("ttun_silence_seconds", "gauge", "Time since the peer was last heard of", "silent_for"),
    ):
        metric(name, kind, text, [t[field] for t in tunnels])
    connected = [int(t["peer"] is not None) for t in tunnels]
    metric("ttun_connected", "gauge", "Whether there is a peer", connected)
    return lines


def _labels(tunnels: list[Tunnel]) -> list[str]:
    """Return the labels of each tunnel, all different; "" for one that has none of its own.

    They are the same after a restart: device and role, and the network namespace where that is not
    ours. Only where another tunnel has these already, which is odd, the process follows. root's
    tunnels, which nobody else can pretend to be, come first.
    """
    names = _netns_names()
    ours = _inode(OWN_NETNS)
    taken: dict[str, Tunnel] = {}
    for tunnel in sorted(tunnels, key=lambda t: (t["uid"] != 0, _pid(t))):
        pairs = {"device": tunnel["device"] or "", "role": tunnel["role"]}
        if tunnel["netns"] not in (None, ours):
            pairs["netns"] = _netns(tunnel, names)
        if _text_of(pairs) in taken:
            pairs["pid"] = str(_pid(tunnel))
        taken.setdefault(_text_of(pairs), tunnel)
    own = {id(tunnel): text for text, tunnel in taken.items()}
    left_out = [t for t in tunnels if id(t) not in own]
    _tell([f"left out process {_pid(t)}: it says what another tunnel says" for t in left_out])
    return [own.get(id(tunnel), "") for tunnel in tunnels]


def _text_of(pairs: dict[str, str]) -> str:
    """Return labels with their values in quotes, escaped for the format and for a terminal."""
    return ",".join(f'{name}="{_escaped(value)}"' for name, value in pairs.items())


def _escaped(value: str) -> str:
    escapes = str.maketrans({"\\": r"\\", '"': r"\""})
    return r"\n".join(printable(line).translate(escapes) for line in value.split("\n"))


def _pid(tunnel: Tunnel) -> int:
    return tunnel["pid"] or 0


def _netns(tunnel: Tunnel, names: dict[int, str]) -> str:
    """Return a network namespace's name, or its number, or nothing where it is not known."""
    number = tunnel["netns"]
    return "" if number is None else names.get(number, str(number))


def _netns_names() -> dict[int, str]:
    """Return what ``ip netns`` calls network namespaces, by inode number."""
    found: dict[int, str] = {}
    with contextlib.suppress(OSError):
        device = OWN_NETNS.stat().st_dev
        for path in sorted(NAMED_NETNS.iterdir(), reverse=True):
            with contextlib.suppress(OSError):
                if path.stat().st_dev == device:  # else nothing is mounted there
                    found[path.stat().st_ino] = printable(path.name)
    return found


def _inode(path: Path) -> int | None:
    with contextlib.suppress(OSError):
        return path.stat().st_ino
    return None


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
    rates: dict[tuple[object, ...], _Rates] = {}
    told: list[str] = []
    seen = False
    while True:
        try:
            tunnels = ask(device, told)
        except TtunError:
            if not seen:
                raise
            tunnels = []
        seen, now = True, time.monotonic()
        lines = [] if tunnels else ["no tunnel runs any more"]
        for tunnel, described in zip(tunnels, describe_all(tunnels)):
            identity = tuple(tunnel[name] for name in ("device", "role", "netns", "pid"))
            mine = rates.setdefault(identity, _Rates())
            mine.add(now, tunnel["totals"])
            lines += [*described, *mine.lines(), ""]
        print((CLEAR if sys.stdout.isatty() else "") + "\n".join(lines), flush=True)
        rates = {i: r for i, r in rates.items() if r.before and now - r.before[0] < GRAPH_WIDTH}
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
    for name, each in units:
        if left >= each:
            words.append(f"{left // each} {name}")
            left %= each
    return " ".join(words[:2])
