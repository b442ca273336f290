"""``ttun bench``: how fast is it, measured by hand on this machine.

``bench codec``: seal and open, for each cipher and frame size, on one core.

``bench tunnel``: both ends of this program on two hosts of this machine, and others beside it:

 1. Each round measures the bare link and then every subject, started anew: whatever else happens
    on the machine happens to all of them.
 2. TCP each way with one stream and with eight, small datagrams at a fixed rate and as fast as
    they go, full-size datagrams, pings idle and under load, CPU time and memory of both ends.
 3. The table has medians over the rounds, and ratios to the bare link of the same round.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

from ttun.cipher import CIPHERS, CipherState, fast
from ttun.errors import TtunError, UsageError
from ttun.lab import netns
from ttun.lab.demo import end, measured, progress
from ttun.lab.netns import SERVER, Hosts
from ttun.lab.targets import RAW, Subject, against, ours
from ttun.version import __version__

PORT = "5001"  # of the traffic server, in a namespace of its own
SIZES = [64, 576, 1280, 9000, 65503]  # bytes of a packet
CODEC_SECONDS, CODEC_BUFFER = 0.5, 128 * 1024  # a buffer as the pump fills
STEADY_RATE = 100_000  # datagrams per second that a tunnel should carry without loss
START_TIMEOUT = 20.0  # seconds
TICKS = os.sysconf("SC_CLK_TCK")

Figures = dict[str, float]
# name in the JSON -> title of the column, digits; the order of the table
COLUMNS = {
    "up": ("up, Gbit/s", 2),
    "up_ratio": ("/ bare", 3),
    "down": ("down, Gbit/s", 2),
    "down_ratio": ("/ bare", 3),
    "up_8": ("up, 8 streams", 2),
    "down_8": ("down, 8", 2),
    "cpu_per_gib": ("CPU s / GiB", 2),
    "datagram_cpu": ("CPU s / M datagrams", 2),
    "datagram_loss": ("lost of them, %", 3),
    "datagrams": ("64 B/s", 0),
    "datagrams_full": ("1200 B/s", 0),
    "ping": ("ping, ms", 3),
    "ping_loaded": ("loaded, ms", 3),
    "memory": ("memory, MB", 1),
}


# ---- codec --------------------------------------------------------------------------------------


def codec() -> int:
    """Print gigabytes per second that one core seals and opens."""
    from ttun._codec import ffi, lib

    print(f"{'GB/s on one core':<20}" + "".join(f"{size:>16}" for size in SIZES) + "  bytes")
    for cipher in CIPHERS.values():
        cells = []
        for size in SIZES:
            sealing, opening = (CipherState(cipher, 0, bytes(32)) for _ in range(2))
            buffer, rates = ffi.new("uint8_t[]", CODEC_BUFFER), ffi.new("double[2]")
            sizes = CODEC_BUFFER, size
            if lib.ttun_bench(sealing.c, opening.c, buffer, *sizes, CODEC_SECONDS, rates) != 0:
                raise TtunError(f"{cipher.name} does not open what it sealed")
            cells.append(f"{rates[0] / 1e9:.2f} / {rates[1] / 1e9:.2f}")
        print(f"{cipher.name:<20}" + "".join(f"{cell:>16}" for cell in cells) + "  seal / open")
    return 0


# ---- tunnel -------------------------------------------------------------------------------------


def tunnel(
    rounds: int,
    seconds: float,
    others: list[str],
    json_file: str | None,
    plot_file: str | None,
) -> int:
    """Measure, print the table, and write what was asked for; return the exit code."""
    mine = [
        RAW,
        *(ours("-m", cipher.name) for cipher in fast()),
        *(ours("--wire", "v1", "-m", cipher.name) for cipher in fast() if cipher.in_v1),
    ]
    subjects = [*mine, *(against(text) for text in others)]
    if plot_file is not None:
        from ttun.lab import plot  # that its library is there is better known now than afterwards
    if not netns.may_make_hosts():
        raise TtunError("measuring makes two hosts on this machine: run it with sudo")
    if len({subject.name for subject in subjects}) < len(subjects):
        raise UsageError("two of what is to be measured have the same name")
    results: dict[str, list[Figures]] = {subject.name: [] for subject in subjects}
    with Hosts() as pair:
        for number in range(rounds):
            for subject in subjects:
                progress(f"round {number + 1} of {rounds}: {subject.name}")
                try:
                    figures = _measure(pair, subject, seconds)
                except TtunError as error:
                    if subject in mine:
                        raise
                    progress(f"left out of this round: {error}")
                    continue
                bare = figures if subject is RAW else results[RAW.name][-1]
                figures["up_ratio"] = figures["up"] / bare["up"]
                figures["down_ratio"] = figures["down"] / bare["down"]
                results[subject.name].append(figures)
    medians = {name: _medians(runs) for name, runs in results.items() if runs}
    print(_table(medians))
    report = {
        "ttun": __version__,
        "machine": {"system": platform.platform(), "cores": len(os.sched_getaffinity(0))},
        "rounds": rounds,
        "seconds": seconds,
        "medians": medians,
        "runs": results,
    }
    if json_file is not None:
        Path(json_file).write_text(json.dumps(report, indent=1) + "\n")
    if plot_file is not None:
        plot.draw(medians, Path(plot_file))
    return 0


def _measure(pair: Hosts, subject: Subject, seconds: float) -> Figures:
    """Start a subject, measure all of it once, and end it."""
    with contextlib.ExitStack() as running:
        ends = subject.start(pair) if subject.start else []
        for process in ends:
            running.callback(end, process)
        _await(pair, subject)
        server = pair.start(
            SERVER,
            netns.python("ttun.lab.traffic", "serve", subject.address, PORT),
            environment=netns.environment(),
            stdout=subprocess.PIPE,
        )
        running.callback(end, server)
        assert server.stdout is not None
        running.callback(server.stdout.close)
        server.stdout.readline()

        def run(action: str, *arguments: object, where: str = PORT) -> Any:
            result = measured(pair, action, subject.address, where, *map(str, arguments))
            if result is None:
                raise TtunError(f"{subject.name}: {action} did not come to an end")
            return result

        figures: Figures = {"ping": _median_ms(run("ping", 56, 0.01, where="100"))}
        used = _cpu(ends)
        figures["up"] = run("flood", 1, seconds) / 1e9
        figures["cpu_per_gib"] = (_cpu(ends) - used) / (figures["up"] * seconds / 8 / 1.073741824)
        figures["down"] = run("drain", 1, seconds) / 1e9
        figures["up_8"] = run("flood", 8, seconds) / 1e9
        figures["down_8"] = run("drain", 8, seconds) / 1e9
        used = _cpu(ends)
        steady = run("datagrams", 64, STEADY_RATE, seconds)
        figures["datagram_cpu"] = (_cpu(ends) - used) / steady["sent"] * 1e6
        figures["datagram_loss"] = 100 * (1 - steady["arrived"] / steady["sent"])
        for name, size in (("datagrams", 64), ("datagrams_full", 1200)):
            flooded = run("datagrams", size, 0, seconds)
            figures[name] = flooded["arrived"] / flooded["seconds"]
        load = pair.start(
            netns.CLIENT,
            netns.python("ttun.lab.traffic", "flood", subject.address, PORT, "1", str(seconds + 1)),
            environment=netns.environment(),
            stdout=subprocess.DEVNULL,
        )
        running.callback(end, load)
        time.sleep(0.5)
        figures["ping_loaded"] = _median_ms(
            run("ping", 56, 0.01, where=str(max(10, int(seconds * 50))))
        )
        load.wait()
        figures["memory"] = max((_peak_memory(process) for process in ends), default=0.0)
        return figures


def _await(pair: Hosts, subject: Subject) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while measured(pair, "ping", subject.address, "1") in (None, [None]):
        if time.monotonic() > deadline:
            raise TtunError(f"{subject.name}: no ping through it within {START_TIMEOUT:.0f} s")
        time.sleep(0.1)


def _median_ms(times: list[float | None]) -> float:
    answered = [seconds * 1000 for seconds in times if seconds is not None]
    return statistics.median(answered) if answered else float("inf")


def _cpu(ends: list[subprocess.Popen[str]]) -> float:
    """Return the CPU seconds that both ends have used."""
    total = 0
    for process in ends:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICKS


def _peak_memory(process: subprocess.Popen[str]) -> float:
    """Return the most that was resident, in MB of 1024 KiB."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.split("VmHWM:", 1)[1].split(None, 1)[0]) / 1024


def _medians(runs: list[Figures]) -> Figures:
    return {name: statistics.median(run[name] for run in runs) for name in COLUMNS}


def _table(medians: dict[str, Figures]) -> str:
    """Return a table with a line for each figure and a column for each subject."""
    width = max(len(title) for title, _ in COLUMNS.values())
    widths = {name: max(10, len(name)) for name in medians}
    lines = [" " * width + "".join(f"  {name:>{widths[name]}}" for name in medians)]
    for column, (title, digits) in COLUMNS.items():
        cells = (f"  {medians[name][column]:>{widths[name]},.{digits}f}" for name in medians)
        lines.append(f"{title:<{width}}" + "".join(cells))
    return "\n".join(lines)
