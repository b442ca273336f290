"""``ttun bench link``: what TCP inside a tunnel gets from a link with delay and loss.

 1. Each round measures every target once: two hosts are made, joined by the link
    (link_emulator.py), both ends are started there, and all is removed again. So nothing of one
    measurement is left for the next one. All targets of a round have the same seed of loss.
 2. Goodput of one and of eight streams each way. With several losses that is all.
 3. Pings and fetches, idle and beside a download; pings beside an upload.
 4. Medians of the rounds for goodput; median and percentiles of all rounds' pings and fetches.

Beside this program: plain TCP with the hosts' congestion control and with bbr, and what --against
names.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ttun.errors import TtunError, UsageError
from ttun.lab import link_report, netns
from ttun.lab.demo import end, progress
from ttun.lab.link_emulator import Link, LinkedHosts, choose
from ttun.lab.netns import CLIENT, SERVER
from ttun.lab.targets import RAW, Subject, against, ours
from ttun.version import __version__

PORT = "5001"  # of the traffic server, in a namespace of its own
PINGS = 1000  # in all rounds together, at least
PINGS_LEAST = 50  # in one round
PING_INTERVAL = 0.02  # seconds
PAGE = 100_000  # bytes of a fetch
STREAMS = 8
SETTLE = 4.0  # seconds of a download before something is measured beside it, at most
PAUSE = 0.5  # seconds between two measurements, and more on a long link
START_TIMEOUT = 30.0  # seconds until a ping got through
SLACK = 90.0  # seconds that a measurement may take longer than it should
BBR = "bbr"

Popen = subprocess.Popen[str]
Times = list["float | None"]


@dataclass(frozen=True)
class Target:
    """Something to measure, and the congestion control of the load's own connections."""

    subject: Subject
    congestion: str
    is_ours: bool = False

    @property
    def name(self) -> str:
        """What tables and the JSON call it."""
        if self.subject.start is None:
            return f"no tunnel, {self.congestion}"
        return self.subject.name


@dataclass
class Figures:
    """What one measurement of one target gave: bits per second, and seconds."""

    goodput: dict[str, float] = field(default_factory=dict)
    pings: dict[str, Times] = field(default_factory=dict)
    fetches: dict[str, Times] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What is measured, and how."""

    link: Link
    losses: Sequence[float]  # per cent; with more than one only goodput is measured
    rounds: int
    seconds: float  # of each transfer
    congestion: str  # of both hosts
    emulator: str = "auto"


def parse_link(rate: str, rtt: float, queue: float) -> Link:
    """Return the link without loss. rate: DOWN or DOWN/UP. Raises UsageError."""
    down, *up = _numbers(rate, "/", 2, "--rate")
    return Link(down, up[0] if up else None, rtt, 0, queue)


def parse_losses(text: str) -> list[float]:
    """Return the losses in per cent that are to be measured. Raises UsageError."""
    losses = _numbers(text, ",", link_report.MOST_LOSSES, "--loss")
    if len(set(losses)) < len(losses):
        raise UsageError(f"--loss {text}: the same one twice")
    for loss in losses:
        Link(loss=loss)  # is it one?
    return losses


def _numbers(text: str, separator: str, most: int, option: str) -> list[float]:
    parts = text.split(separator)
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        raise UsageError(f"{option} {text!r} is not a number") from None
    if len(numbers) > most:
        raise UsageError(f"{option} {text!r}: no more than {most} numbers")
    return numbers


def run(
    plan: Plan, others: Sequence[str], json_file: str | None = None, plot_file: str | None = None
) -> int:
    """Measure, print the table, write what was asked for; return the exit code."""
    mine = Target(ours(), plan.congestion, is_ours=True)
    targets = [Target(RAW, plan.congestion), mine]
    targets += [Target(against(text), plan.congestion) for text in others]
    _check_congestion(plan.congestion)
    if plan.congestion != BBR:
        try:
            _check_congestion(BBR)
            targets.insert(1, Target(RAW, BBR))
        except TtunError as error:
            progress(f"left out: {error}")
    names = [target.name for target in targets]
    if len(set(names)) < len(names):
        raise UsageError("two of what is to be measured have the same name: NAME=SERVER::CLIENT")
    links = [replace(plan.link, loss=loss) for loss in plan.losses]
    if plot_file is not None:
        from ttun.lab import plot  # that its library is there is better known now than afterwards
    choose(plan.emulator)  # before anything is measured
    if not netns.may_make_hosts():
        raise TtunError("measuring makes two hosts on this machine: run it with sudo")
    runs: list[dict[str, list[Figures]]] = [{name: [] for name in names} for _ in links]
    failures = []
    for number in range(plan.rounds):
        for link, results in zip(links, runs):
            for target in targets:
                progress(f"round {number + 1} of {plan.rounds}, {link.loss:g} %: {target.name}")
                try:
                    results[target.name].append(_measure(plan, link, target, number))
                except TtunError as error:
                    progress(f"left out of this round: {error}")
                    failures.append(f"{link.loss:g} %, {target.name}: {error}")
    summaries = [
        {name: link_report.summary(figures) for name, figures in results.items() if figures}
        for results in runs
    ]
    heading = f"{plan.link}; {plan.congestion}; {plan.rounds} x {plan.seconds:g} s"
    print(link_report.table(heading, plan.losses, summaries))
    report = {
        "ttun": __version__,
        "machine": {"system": platform.platform(), "cores": len(os.sched_getaffinity(0))},
        "link": {"rate": plan.link.rate, "rate_up": plan.link.up, "rtt": plan.link.rtt,
                 "queue": plan.link.queue},
        "congestion_control": plan.congestion,
        "rounds": plan.rounds,
        "seconds": plan.seconds,
        "failures": failures,
        "results": [
            {"loss": loss, "summary": summaries[at],
             "runs": {name: [vars(each) for each in kept] for name, kept in runs[at].items()}}
            for at, loss in enumerate(plan.losses)
        ],
    }  # fmt: skip
    if json_file is not None:
        Path(json_file).write_text(json.dumps(report, indent=1) + "\n")
    if plot_file is not None:
        plot.draw_link(plan.losses, summaries, Path(plot_file))
    return 0 if all(len(each) == len(names) for each in summaries) else 1


def _measure(plan: Plan, link: Link, target: Target, number: int) -> Figures:
    """Make the hosts, start a target on them, measure all of it once, and remove everything."""
    with LinkedHosts(link, seed=number, emulator=plan.emulator) as pair:
        if not _set_default(pair, plan.congestion) and target.subject.start and not target.is_ours:
            progress(f"net.ipv4.tcp_allowed_congestion_control lacks {plan.congestion}: by a route")
            _set_on_route(pair, plan.congestion)
        with contextlib.ExitStack() as running:
            for process in target.subject.start(pair) if target.subject.start else []:
                running.callback(end, process)
            load = Load(pair, target, plan.seconds, running)
            load.measure_goodput()
            if len(plan.losses) == 1:
                load.measure_waiting(max(PINGS_LEAST, -(-PINGS // plan.rounds)))
            return load.figures


def _set_default(pair: LinkedHosts, congestion: str) -> bool:
    """Make it the default of TCP on both hosts; return whether that is allowed.

    Outside of a machine's first namespace, it is for what net.ipv4.tcp_allowed_congestion_control
    lists. And TCP keeps no metrics of one connection for the next one.
    """
    script = (
        "cd /proc/sys/net/ipv4 && echo 1 > tcp_no_metrics_save && "
        'echo "$1" > tcp_congestion_control'
    )
    for host in (SERVER, CLIENT):
        command = pair.command(host, ["sh", "-c", script, "sh", congestion])
        if subprocess.run(command, capture_output=True, check=False).returncode != 0:
            return False
    return True


def _set_on_route(pair: LinkedHosts, congestion: str) -> None:
    """Have connections between the hosts use it whatever their sockets say (ip-route(8))."""
    for host in (SERVER, CLIENT):
        netns.ip("-n", pair.names[host], "route", "replace", "192.0.2.0/24", "dev",
                 pair.links[host], "proto", "kernel", "scope", "link", "src", netns.IPV4[host],
                 "congctl", congestion)  # fmt: skip


def _check_congestion(name: str) -> None:
    """Raise TtunError if this kernel does not have it."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode())
        except OSError as error:
            raise TtunError(
                f"congestion control {name}: {error.strerror} (modprobe tcp_{name})"
            ) from None


class Load:
    """Traffic through one target, measured."""

    def __init__(
        self, pair: LinkedHosts, target: Target, seconds: float, running: contextlib.ExitStack
    ) -> None:
        """Wait until something gets through, and start what answers.

        running: what it starts ends with it. Raises TtunError.
        """
        self.figures = Figures()
        self._pair, self._target, self._seconds = pair, target, seconds
        self._running = running
        self._address = target.subject.address
        deadline = time.monotonic() + START_TIMEOUT
        while not self._is_answered():
            if time.monotonic() > deadline:
                raise TtunError(f"no ping through it within {START_TIMEOUT:.0f} s")
            time.sleep(0.1)
        server = pair.start(
            SERVER,
            netns.python("ttun.lab.link_traffic", "serve", self._address, PORT, target.congestion),
            environment=netns.environment(),
            stdout=subprocess.PIPE,
        )
        running.callback(end, server)
        assert server.stdout is not None
        running.callback(server.stdout.close)
        if server.stdout.readline() != "ready\n":
            raise TtunError("nothing can be served on the address of the server's end")

    def _is_answered(self) -> bool:
        with contextlib.suppress(TtunError):  # no route there yet
            return bool(self._run("ping", 1, 0, seconds=0) != [None])
        return False

    def measure_goodput(self) -> None:
        """Measure what streams carry, one and several, each way."""
        for streams in (1, STREAMS):
            for action in ("up", "down"):
                self._settle()
                self.figures.goodput[f"{action}_{streams}"] = self._run(
                    action, PORT, streams, self._seconds, self._target.congestion
                )

    def measure_waiting(self, pings: int) -> None:
        """Measure pings and fetches, idle and beside one stream."""
        for beside in ("idle", "down", "up"):
            self._settle()
            with contextlib.ExitStack() as loaded:
                if beside != "idle":
                    self._load(beside, pings, loaded)
                self.figures.pings[beside] = self._run(
                    "ping", pings, PING_INTERVAL, seconds=pings * PING_INTERVAL
                )
                if beside != "up":
                    self.figures.fetches[beside] = self._run(
                        "fetch", PORT, PAGE, self._seconds / 2, self._target.congestion
                    )

    def _load(self, action: str, pings: int, loaded: contextlib.ExitStack) -> None:
        """Start a stream that lasts until loaded is closed, and give it time to fill the link."""
        longest = SETTLE + pings * PING_INTERVAL + self._seconds + 2 * SLACK
        process = self._start(action, PORT, 1, longest, self._target.congestion)
        loaded.callback(end, process)
        time.sleep(min(SETTLE, self._seconds))

    def _settle(self) -> None:
        """Wait until what is in the link's queue and on its way has arrived."""
        link = self._pair.link_now
        time.sleep(PAUSE + (link.queue + 2 * link.rtt) / 1000)

    def _start(self, *arguments: object, stdout: int = subprocess.DEVNULL) -> Popen:
        action, *rest = arguments
        command = netns.python("ttun.lab.link_traffic", str(action), self._address, *map(str, rest))
        return self._pair.start(
            CLIENT, command, environment=netns.environment(), stdout=stdout,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def _run(self, *arguments: object, seconds: float | None = None) -> Any:
        """Return what ttun.link_traffic measured. Raises TtunError where it did not."""
        process = self._start(*arguments, stdout=subprocess.PIPE)
        try:
            patience = (self._seconds if seconds is None else seconds) + SLACK
            shown, _ = process.communicate(timeout=patience)
        except subprocess.TimeoutExpired:
            shown = ""
        finally:
            end(process)
        if process.returncode != 0:
            raise TtunError(f"{arguments[0]} did not come to an end")
        return json.loads(shown)
