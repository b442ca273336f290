"""``ttun bench codec`` and ``ttun bench tunnel``: throughput, latency and cost on this machine.

``bench codec``: seal and open on one core, for each cipher and packet size.

``bench tunnel``: both ends of a tunnel on two hosts of this machine, ttun and its competitors:

 1. Each round measures the bare link and then every benchmark target, started anew. So other load
    on the machine affects all targets alike.
 2. TCP each way with one stream and with eight, small datagrams at a fixed rate and as many as
    possible, full-size datagrams, pings idle and under load, CPU time and memory of both ends.
 3. The table shows medians over the rounds, and ratios to the bare link of the same round.
"""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

from ttun.cipher import CIPHERS, CipherState, fast
from ttun.errors import TtunError, UsageError
from ttun.lab import machine, netns, report, table
from ttun.lab.demo import end, measured, serve
from ttun.lab.netns import Hosts
from ttun.lab.progress import Progress
from ttun.lab.targets import BARE_LINK, Target, competitor, ttun
from ttun.version import __version__

PORT = "5001"  # of the traffic server, in a namespace of its own
SIZES = [64, 576, 1280, 9000, 65503]  # bytes of a packet
CODEC_SECONDS, CODEC_BUFFER = 0.5, 128 * 1024  # bytes of frames that are sealed, then opened
STEADY_RATE = 100_000  # datagrams per second that a tunnel should carry without loss
START_TIMEOUT = 20.0  # seconds
START, PINGS, OVERHEAD = 2.0, 1.3, 0.3  # seconds that a target, its pings, each transfer take
TICKS = os.sysconf("SC_CLK_TCK")

Figures = dict[str, float]
# title of the group -> name in the JSON -> head of the column, digits
GROUPS = {
    "TCP, Gbit/s": {
        "up": ("1 up", 2),
        "down": ("1 down", 2),
        "up_8": ("8 up", 2),
        "down_8": ("8 down", 2),
    },
    "TCP / no tunnel": {"up_ratio": ("1 up", 3), "down_ratio": ("1 down", 3)},
    "ping, ms": {"ping": ("idle", 3), "ping_loaded": ("loaded", 3)},
    "datagrams per second": {"datagrams": ("64 bytes", 0), "datagrams_full": ("1,200 bytes", 0)},
    "at 100,000/s": {"datagram_loss": ("% lost", 3)},
    "CPU seconds per": {"cpu_per_gib": ("GiB", 2), "datagram_cpu": ("10^6 datagrams", 2)},
    "memory": {"memory": ("MB", 1)},
}
COLUMNS = {name: column for group in GROUPS.values() for name, column in group.items()}
OF_ENDS = ("cpu_per_gib", "datagram_cpu", "memory")  # the bare link has none
LEGEND = """\
1, 8: streams at once. up: client to server. loaded: during one stream.
at 100,000/s: 64-byte datagrams at this fixed rate, as for the CPU per 10^6.
CPU: both ends together. memory: peak of the larger end."""


# ---- codec --------------------------------------------------------------------------------------


def codec() -> int:
    """Print how many gigabytes per second one core seals and opens; return the exit code."""
    from ttun._codec import ffi, lib

    sealed, opened = {}, {}
    each = 2 * CODEC_SECONDS
    with Progress(each * len(SIZES) * len(CIPHERS)) as progress:
        for number, cipher in enumerate(CIPHERS.values()):
            progress.begin(cipher.name, number * each * len(SIZES))
            rows = []
            for size in SIZES:
                progress.step(f"{size} bytes", each)
                sealing, opening = (CipherState(cipher, 0, bytes(32)) for _ in range(2))
                buffer, rates = ffi.new("uint8_t[]", CODEC_BUFFER), ffi.new("double[2]")
                sizes = CODEC_BUFFER, size
                if lib.ttun_bench(sealing.c, opening.c, buffer, *sizes, CODEC_SECONDS, rates) != 0:
                    raise TtunError(f"{cipher.name}: cannot open what it sealed (a codec bug)")
                rows.append([f"{rate / 1e9:.2f}" for rate in rates])
            sealed[cipher.name], opened[cipher.name] = zip(*rows)
    print(f"{machine.name()}\nGB/s on one core, by bytes per packet\n")
    heads = [str(size) for size in SIZES]
    print(table.render([table.Group("seal", heads, sealed), table.Group("open", heads, opened)]))
    return 0


# ---- tunnel -------------------------------------------------------------------------------------


def tunnel(
    rounds: int,
    seconds: float,
    competitors: list[str],
    json_file: str | None,
    plot_file: str | None,
) -> int:
    """Measure, print the tables, write the files that were asked for; return the exit code."""
    own = [
        BARE_LINK,
        *(ttun("-m", cipher.name) for cipher in fast()),
        *(ttun("--wire", "v1", "-m", cipher.name) for cipher in fast() if cipher.in_v1),
    ]
    targets = [*own, *(competitor(text) for text in competitors)]
    if plot_file is not None:
        from ttun.lab import plot  # raises now, not after the measurement, if matplotlib is missing
    report.check(json_file, plot_file)
    if not netns.may_make_hosts():
        raise TtunError("this needs root, to make two hosts on this machine (use sudo)")
    if len({target.name for target in targets}) < len(targets):
        raise UsageError("two benchmark targets have the same name (put NAME= in front of one)")
    results: dict[str, list[Figures]] = {target.name: [] for target in targets}
    each = START + PINGS + 8 * (seconds + OVERHEAD) + 1.5  # seconds
    with Progress(each * rounds * len(targets)) as progress:
        for number in range(rounds):
            for place, target in enumerate(targets):
                before = (number * len(targets) + place) * each
                progress.begin(f"round {number + 1} of {rounds}: {target.name}", before)
                try:
                    with Hosts() as pair:  # new ones: a target may leave something behind
                        figures = _measure(pair, target, seconds, progress)
                except TtunError as error:
                    if target in own:
                        raise
                    progress.note(f"left out of this round: {error}")
                    continue
                bare = figures if target is BARE_LINK else results[BARE_LINK.name][-1]
                figures["up_ratio"] = figures["up"] / bare["up"]
                figures["down_ratio"] = figures["down"] / bare["down"]
                results[target.name].append(figures)
    medians = {name: _medians(runs) for name, runs in results.items() if runs}
    how = table.rounds(rounds, seconds)
    print(f"{machine.name()}\n{how}\n")
    print(f"{_tables(medians)}\n\n{LEGEND}")
    found = {
        "ttun": __version__,
        "machine": machine.describe(),
        "rounds": rounds,
        "seconds": seconds,
        "medians": medians,
        "runs": results,
    }
    try:
        if json_file is not None:
            report.write_json(json_file, found)
    finally:
        if plot_file is not None:
            plot.draw(medians, f"{machine.name()}; {how}", Path(plot_file))
    return 0


def _measure(pair: Hosts, target: Target, seconds: float, progress: Progress) -> Figures:
    """Start a target, measure everything once, and stop it. Raises TtunError."""
    with contextlib.ExitStack() as running:
        progress.step("starting", START)
        ends = target.start(pair) if target.start else []
        for process in ends:
            running.callback(end, process)
        _await(pair, target)
        serve(pair, running, "ttun.lab.traffic", target.address, PORT)

        def run(what: str, action: str, *arguments: object, where: str = PORT) -> Any:
            progress.step(what, PINGS if action == "ping" else seconds + OVERHEAD)
            result = measured(pair, action, target.address, where, *map(str, arguments))
            if result is None:
                raise TtunError(f"{target.name}: {what}: the transfer failed")
            return result

        figures: Figures = {"ping": _median_ms(run("ping", "ping", 56, 0.01, where="100"))}
        used = _cpu(ends)
        figures["up"] = run("one stream up", "flood", 1, seconds) / 1e9
        figures["cpu_per_gib"] = (_cpu(ends) - used) / (figures["up"] * seconds / 8 / 1.073741824)
        figures["down"] = run("one stream down", "drain", 1, seconds) / 1e9
        figures["up_8"] = run("eight streams up", "flood", 8, seconds) / 1e9
        figures["down_8"] = run("eight streams down", "drain", 8, seconds) / 1e9
        used = _cpu(ends)
        steady = run("datagrams at a fixed rate", "datagrams", 64, STEADY_RATE, seconds)
        figures["datagram_cpu"] = (_cpu(ends) - used) / steady["sent"] * 1e6
        figures["datagram_loss"] = 100 * (1 - steady["arrived"] / steady["sent"])
        for name, size in (("datagrams", 64), ("datagrams_full", 1200)):
            flooded = run(f"{size}-byte datagrams", "datagrams", size, 0, seconds)
            figures[name] = flooded["arrived"] / flooded["seconds"]
        pings = max(10, int(seconds * 50))
        longest = 10 + 2 * pings  # seconds: more than all pings take if none is answered
        load = pair.start(
            netns.CLIENT,
            netns.python("ttun.lab.traffic", "flood", target.address, PORT, "1", str(longest)),
            environment=netns.environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        running.callback(end, load)
        time.sleep(0.5)
        figures["ping_loaded"] = _median_ms(
            run("ping under load", "ping", 56, 0.01, where=str(pings))
        )
        if load.poll() is not None:
            raise TtunError(f"{target.name}: ping under load: the load failed")
        end(load)
        figures["memory"] = max((_peak_memory(process) for process in ends), default=0.0)
        return figures


def _await(pair: Hosts, target: Target) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while measured(pair, "ping", target.address, "1") in (None, [None]):
        if time.monotonic() > deadline:
            raise TtunError(f"{target.name}: no answer to a ping within {START_TIMEOUT:.0f} s")
        time.sleep(0.1)


def _median_ms(times: list[float | None]) -> float:
    """Return the median of pings. One without an answer took longer than all others."""
    return statistics.median(math.inf if each is None else each * 1000 for each in times)


def _cpu(ends: list[subprocess.Popen[str]]) -> float:
    """Return the CPU seconds that both ends have used so far."""
    total = 0
    for process in ends:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICKS


def _peak_memory(process: subprocess.Popen[str]) -> float:
    """Return the peak resident memory, in MB of 1024 KiB."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    _, found, rest = status.partition("VmHWM:")
    if not found:
        raise TtunError("one end stopped during the measurement")
    return int(rest.split(None, 1)[0]) / 1024


def _medians(runs: list[Figures]) -> Figures:
    return {name: statistics.median(run[name] for run in runs) for name in COLUMNS}


def _tables(medians: dict[str, Figures]) -> str:
    groups = []
    for title, columns in GROUPS.items():
        rows = {
            name: [_cell(column, figures[column]) for column in columns]
            for name, figures in medians.items()
        }
        groups.append(table.Group(title, [head for head, _ in columns.values()], rows))
    return table.render(groups)


def _cell(column: str, value: float) -> str:
    is_missing = not math.isfinite(value) or (value == 0 and column in OF_ENDS)
    return table.NONE if is_missing else f"{value:,.{COLUMNS[column][1]}f}"
