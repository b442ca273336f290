"""``ttun show``: the status of the tunnels on this machine.

1. Query every status socket; keep the answers of one device, if one is named. What was skipped is
   reported on stderr.
2. Print text, JSON, or metrics for Prometheus. With --watch, print text again every second, with
   rates and a graph of the last minute; where the terminal is too low, two lines for each tunnel.

Device, role and network namespace identify a tunnel; where these are equal, its process does.
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

from ttun.commands import prometheus, query, runtime
from ttun.commands.answer import Tunnel, own_netns
from ttun.commands.terminal import colored, height, is_terminal, width, wrapped
from ttun.errors import TtunError, printable
from ttun.process import standard_streams
from ttun.record import DROPPED, size
from ttun.users import user_name

BARS = " ▁▂▃▄▅▆▇█"
GRAPH_WIDTH = 60  # samples, one a second
CLEAR = "\033[H\033[J"
COLORS = {
    "  connected": "green",
    "  not connected": "magenta",
    "  device": "red",
    "  dropped": "magenta",
    "  failed attempts": "magenta",
}
MOST_LINES = 10  # about what was skipped
LAST_RESORT = 10  # seconds
NAMED_NETNS = Path("/run/netns")  # ip-netns(8)


class NoTunnel(TtunError):
    """There is nothing to show."""


def run(device: str | None, how: str) -> int:
    """Show all tunnels, or those of one device. how: "text", "json", "prometheus" or "watch"."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if how == "watch":
        with contextlib.suppress(KeyboardInterrupt):
            _watch(device)
        return 0
    try:
        tunnels = ask(device)
    except NoTunnel:
        if how == "json":
            print("[]")
        raise
    if how == "json":
        print(json.dumps(tunnels, indent=1))
    elif how == "prometheus":
        labels = prometheus.labels(tunnels, _elsewhere(tunnels))
        left_out = [t for t, label in zip(tunnels, labels) if not label]
        _tell([f"skipped process {_pid(t)}: same labels as another tunnel" for t in left_out])
        print("\n".join(prometheus.lines(tunnels, labels)))
    else:
        print("\n\n".join("\n".join(_shown(lines)) for lines in describe_all(tunnels)))
    return 0


def ask(device: str | None, told: list[str] | None = None) -> list[Tunnel]:
    """Return what every tunnel answers; report on stderr what was skipped and is not in told.

    Raises NoTunnel if there is none, or none that this user may query; TtunError.
    """
    told = [] if told is None else told
    directories = runtime.directories()
    with _last_resort(
        f"cannot query the tunnels in {' and '.join(map(str, directories))}: no answer"
    ):
        try:
            tunnels, skipped, denied = query.ask(directories)
        except OSError as error:
            why = f"{error.strerror or error} (is /proc mounted?)"
            raise TtunError(f"cannot query the tunnels: {why}") from None
    _tell([line for line in skipped if line not in told])
    told[:] = skipped
    found = [t for t in tunnels if device in (None, t["device"])]
    if not found and denied:
        raise NoTunnel("the tunnel belongs to another user (use sudo, or --monitor-group)")
    if not found:
        raise NoTunnel(f"no tunnel is running{f' on {printable(device)}' if device else ''}")
    return sorted(found, key=lambda t: (t["device"] or "", t["role"], t["netns"] or 0, _pid(t)))


@contextlib.contextmanager
def _last_resort(message: str) -> Iterator[None]:
    """End this program when the block takes too long.

    The block has a deadline of its own. But an unprivileged user can mount a file system (FUSE) in
    place of a directory, and only the process's end interrupts a system call that waits for it.
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
        standard_streams.tell(f"ttun: {line}")


def describe_all(tunnels: list[Tunnel]) -> list[list[str]]:
    """Return the lines of each tunnel; those with equal names say what tells them apart."""
    alike = Counter((t["device"], t["role"]) for t in tunnels)
    names = _netns_names()
    described = []
    for tunnel in tunnels:
        who = ""
        if alike[tunnel["device"], tunnel["role"]] > 1:
            who = f", netns {_netns(tunnel, names) or 'unknown'}, pid {_pid(tunnel)}"
        if tunnel["uid"] not in (0, os.geteuid()):  # the answer is that user's word only
            who += f", user {printable(user_name(tunnel['uid']))}"
        described.append(describe(tunnel, who, names))
    return described


def describe(tunnel: Tunnel, who: str = "", names: dict[int, str] | None = None) -> list[str]:
    """Return the lines of a tunnel.

    who: follows its role and says whose it is. names: of network namespaces.
    """
    lines = [f"{printable(tunnel['device'] or 'no device')}: {tunnel['role']}{who}"]
    if tunnel["missing"]:
        lines.append(f"  device: {', '.join(map(printable, tunnel['missing']))}")
    if tunnel["peer"] is None:
        lines.append("  not connected")
    else:
        connected = f"  connected: {_duration(tunnel['connected_for'])}"
        if tunnel["silent_for"] is not None:  # else the session is just ending
            connected += f", last received {_duration(tunnel['silent_for'])} ago"
        lines += [
            f"  peer: {printable(tunnel['peer'])} over {printable(tunnel['transport'])}",
            f"  protocol: {tunnel['wire']}, {printable(tunnel['cipher'])}"
            + (", forward secrecy" if tunnel["wire"] == "x1" else ""),
            connected,
        ]
        if tunnel["round_trip"] is not None:
            lines.append(f"  round trip: {tunnel['round_trip'] * 1000:.2f} ms")
        if tunnel["congestion_control"] is not None:
            lost = tunnel["retransmitted"]
            share = "" if lost is None else f", {100 * lost:.1f} % retransmitted"
            lines.append(f"  congestion control: {printable(tunnel['congestion_control'])}{share}")
    lines += _ends(tunnel)
    total = tunnel["totals"]
    lines += [
        f"  uplink: {size(total['uplink_bytes'])}, {total['uplink_packets']} packets",
        f"  downlink: {size(total['downlink_bytes'])}, {total['downlink_packets']} packets",
    ]
    dropped = [f"{total[name]} {why}" for name, why in DROPPED.items() if total[name]]
    if dropped:
        lines.append("  dropped: " + ", ".join(dropped))
    if tunnel["sessions"] > 1:
        lines.append(f"  reconnects: {tunnel['sessions'] - 1}")
    process = (
        f"  process: {_pid(tunnel)}, network namespace {_netns(tunnel, names or {}) or 'unknown'}"
    )
    if tunnel["uptime"] is not None:
        process += f", running for {_duration(tunnel['uptime'])}"
    return [*lines, process]


def _ends(tunnel: Tunnel) -> Iterator[str]:
    """Yield the lines about what an end connects, and why it is not connected."""
    if (ago := tunnel["last_failure_ago"]) is not None:
        number, why = tunnel["failed_attempts"], printable(tunnel["last_failure"] or "")
        what = f"failed attempts: {number}, the last" if number else "last session: ended"
        yield f"  {what} {_duration(ago)} ago: {why}"
    if tunnel["endpoint"] not in (None, tunnel["peer"]):
        what = "server" if tunnel["role"] == "client" else "listening on"
        yield f"  {what}: {printable(tunnel['endpoint'])}"
    parts = []
    for name, word in (("local", ""), ("peer", "peer ")):
        found = [printable(tunnel[name + v]) for v in "46" if tunnel[name + v] is not None]
        if found:
            parts.append(word + " ".join(found))
    if tunnel["mtu"] is not None:
        parts.append(f"MTU {tunnel['mtu']}")
    if parts:
        yield f"  addresses: {', '.join(parts)}"


def _shown(lines: list[str], *, fit: bool = False) -> list[str]:
    """Return the lines of a tunnel as stdout shows them, colored on a terminal.

    A terminal wraps them. fit: none is longer than a row, wherever they are shown.
    """
    if not is_terminal() and not fit:
        return lines
    shown: list[str] = []
    for line in lines:
        first, *rest = wrapped(line, 4, cut=fit)
        name = first.partition(":")[0]
        color = COLORS.get(name) if shown else "bold"
        shown += [colored(name, color) + first[len(name) :] if color else first, *rest]
    return shown


def _pid(tunnel: Tunnel) -> int:
    return tunnel["pid"] or 0


def _netns(tunnel: Tunnel, names: dict[int, str]) -> str:
    """Return a network namespace's name, or its number, or "" if it is unknown."""
    number = tunnel["netns"]
    return "" if number is None else names.get(number, str(number))


def _elsewhere(tunnels: list[Tunnel]) -> list[str]:
    """Return the network namespace of each tunnel; "" for this one, or an unknown one."""
    names, ours = _netns_names(), own_netns()
    return ["" if tunnel["netns"] == ours else _netns(tunnel, names) for tunnel in tunnels]


def _netns_names() -> dict[int, str]:
    """Return the names that ``ip netns`` gives network namespaces, by inode number."""
    found: dict[int, str] = {}
    with contextlib.suppress(OSError):
        device = os.stat("/proc/self/ns/net").st_dev
        for path in sorted(NAMED_NETNS.iterdir(), reverse=True):
            with contextlib.suppress(OSError):
                if path.stat().st_dev == device:  # else nothing is mounted there
                    found[path.stat().st_ino] = printable(path.name)
    return found


class _Rates:
    """Bits per second of the last minute, uplink and downlink."""

    def __init__(self) -> None:
        self.before: tuple[float, int, int] | None = None
        self.uplink: deque[float] = deque(maxlen=GRAPH_WIDTH)
        self.downlink: deque[float] = deque(maxlen=GRAPH_WIDTH)

    def add(self, now: float, total: dict[str, int]) -> None:
        sample = now, total["uplink_bytes"], total["downlink_bytes"]
        if self.before is not None and now > self.before[0]:
            seconds = now - self.before[0]
            self.uplink.append(max(0, sample[1] - self.before[1]) * 8 / seconds)
            self.downlink.append(max(0, sample[2] - self.before[2]) * 8 / seconds)
        self.before = sample

    def lines(self, columns: int) -> list[str]:
        """Return a line of so many columns for each direction."""
        most = max([1.0, *self.uplink, *self.downlink])
        return [
            f"  {name:<9}{_rate(rates[-1] if rates else 0):>13}  {graph(rates, most, columns - 26)}"
            for name, rates in (("uplink", self.uplink), ("downlink", self.downlink))
        ]


def graph(values: Iterable[float], most: float, columns: int = GRAPH_WIDTH) -> str:
    """Return a bar for each of the last values, the highest one for most."""
    columns = max(1, min(columns, GRAPH_WIDTH))
    bars = "".join(BARS[min(8, round(8 * value / most))] for value in values)
    return bars[-columns:].rjust(columns)


def _screen(tunnels: list[Tunnel], rates: list[_Rates]) -> list[str]:
    """Return the lines of all tunnels, or of a terminal that is too low two lines of each."""
    described, columns, room = describe_all(tunnels), width(), height() - 1
    lines = [
        line
        for text, rate in zip(described, rates)
        for line in (*_shown(text, fit=True), *rate.lines(columns), "")
    ]
    if len(lines) <= room or not is_terminal():
        return lines
    lines = []
    for tunnel, text, rate in zip(tunnels, described, rates):
        peer = tunnel["peer"]
        head = wrapped(f"{text[0]}, {printable(peer) if peer else 'not connected'}", 0, cut=True)[0]
        color = "red" if tunnel["missing"] else "green" if peer else "magenta"
        lines += [colored(head, color), "".join(rate.lines(columns // 2))]
    if len(lines) > room:
        shown = max(0, (room - 1) // 2)
        more = f"and {len(tunnels) - shown} more (ttun show --watch DEVICE shows one)"
        lines = [*lines[: 2 * shown], more[:columns]]
    return lines


def _watch(device: str | None) -> None:
    rates: dict[tuple[object, ...], _Rates] = {}
    told: list[str] = []
    seen = False
    while True:
        try:
            tunnels = ask(device, told)
        except NoTunnel:
            if not seen:
                raise
            tunnels = []
        seen, now = True, time.monotonic()
        each = []
        for tunnel in tunnels:
            identity = tuple(tunnel[name] for name in ("device", "role", "netns", "pid"))
            each.append(rates.setdefault(identity, _Rates()))
            each[-1].add(now, tunnel["totals"])
        lines = _screen(tunnels, each) if tunnels else ["no tunnel is running"]
        print((CLEAR if is_terminal() else "") + "\n".join(lines), flush=True)
        rates = {i: r for i, r in rates.items() if r.before and now - r.before[0] < GRAPH_WIDTH}
        time.sleep(1)


def _rate(bits: float) -> str:
    for unit in ("bit/s", "kbit/s", "Mbit/s"):
        if bits < 1000:
            return f"{bits:.1f} {unit}"
        bits /= 1000
    return f"{bits:.2f} Gbit/s"


def _duration(seconds: float) -> str:
    """Return seconds in the two largest units."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    units = [("d", 86400), ("h", 3600), ("min", 60), ("s", 1)]
    left, words = int(seconds), []
    for name, each in units:
        if left >= each:
            words.append(f"{left // each} {name}")
            left %= each
    return " ".join(words[:2])
