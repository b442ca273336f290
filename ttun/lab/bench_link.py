"""``ttun bench link``: what TCP inside a tunnel achieves on a link with delay and loss.

 1. Each round measures every target once. For each one, two hosts joined by the link
    (link_emulator.py) are made, both ends are started there, and everything is removed again. So no
    state of one measurement affects the next. All targets of a round get the same loss seed.
 2. Goodput of one and of eight streams each way. With several loss rates, only this is measured.
 3. Pings and fetches, idle and during a download; pings during an upload.
 4. Goodput is the median of the rounds. Pings and fetches are the median and percentiles over all
    rounds.

The targets are plain TCP with the hosts' congestion control and with bbr, ttun, and the competitors
that --against names.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ttun.errors import TtunError, UsageError
from ttun.lab import link_report, machine, netns, report, table
from ttun.lab.demo import end, serve
from ttun.lab.link_emulator import Link, LinkedHosts, choose
from ttun.lab.netns import CLIENT, SERVER
from ttun.lab.progress import Progress
from ttun.lab.targets import BARE_LINK, Target, competitor, ttun
from ttun.version import __version__

PORT = "5001"  # of the traffic server, in a namespace of its own
PINGS = 1000  # over all rounds, at least
PINGS_LEAST = 50  # per round
PING_INTERVAL = 0.02  # seconds
PAGE = 100_000  # bytes of a fetch
STREAMS = 8
SETTLE = 4.0  # seconds, at most, that a load runs before something is measured beside it
PAUSE = 0.5  # seconds between two measurements, plus what the link needs to empty
START_TIMEOUT = 30.0  # seconds until a ping must be answered
START = 3.0  # seconds until a target is started, and stopped again
SLACK = 90.0  # seconds that a measurement may take longer than planned
BBR = "bbr"

Popen = subprocess.Popen[str]
Times = list["float | None"]


@dataclass(frozen=True)
class Case:
    """A benchmark target, and the congestion control of the load's own connections."""

    target: Target
    congestion: str
    is_ttun: bool = False

    @property
    def name(self) -> str:
        """Its name in tables and in the JSON."""
        if self.target.start is None:
            return f"no tunnel, {self.congestion}"
        return self.target.name


@dataclass
class Figures:
    """The results of one measurement of one target: bits per second, and seconds."""

    goodput: dict[str, float] = field(default_factory=dict)
    pings: dict[str, Times] = field(default_factory=dict)
    fetches: dict[str, Times] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What to measure, and how."""

    link: Link
    losses: Sequence[float]  # percent; with more than one, only goodput is measured
    rounds: int
    seconds: float  # of each transfer
    congestion: str  # of both hosts
    emulator: str = "auto"

    @property
    def pings(self) -> int:
        """Pings in one round."""
        return max(PINGS_LEAST, -(-PINGS // self.rounds))

    @property
    def estimate(self) -> float:
        """Seconds that one case takes, about."""
        settle = _settling(self.link)
        seconds = START + 4 * (settle + self.seconds)
        if len(self.losses) == 1:
            load = min(SETTLE, self.seconds)
            seconds += 3 * (settle + self.pings * PING_INTERVAL) + 2 * load + self.seconds
        return seconds


def parse_link(rate: str, rtt: float, queue: float) -> Link:
    """Return a link without loss. rate: DOWN or DOWN/UP, Mbit/s. Raises UsageError."""
    down, *up = _numbers(rate, "/", 2, "--rate")
    return Link(down, up[0] if up else None, rtt, 0, queue)


def parse_losses(text: str) -> list[float]:
    """Return the loss rates to measure, in percent. Raises UsageError."""
    losses = _numbers(text, ",", link_report.MOST_LOSSES, "--loss")
    if len(set(losses)) < len(losses):
        raise UsageError(f"--loss {text}: a value is given twice")
    for loss in losses:
        Link(loss=loss)  # raises UsageError if it is out of range
    return losses


def _settling(link: Link) -> float:
    """Return the seconds to wait before a measurement, so that the link is empty."""
    return PAUSE + (link.queue + 2 * link.rtt) / 1000


def _numbers(text: str, separator: str, most: int, option: str) -> list[float]:
    parts = text.split(separator)
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        raise UsageError(f"{option} {text!r} is not a number") from None
    if len(numbers) > most:
        raise UsageError(f"{option} {text!r}: at most {most} numbers")
    return numbers


def run(
    plan: Plan,
    competitors: Sequence[str],
    json_file: str | None = None,
    plot_file: str | None = None,
) -> int:
    """Measure, print the tables, write the files that were asked for; return the exit code."""
    cases = [
        Case(BARE_LINK, plan.congestion),
        Case(ttun(), plan.congestion, is_ttun=True),
        *(Case(competitor(text), plan.congestion) for text in competitors),
    ]
    _check_congestion(plan.congestion)
    left_out = ""
    if plan.congestion != BBR:
        try:
            _check_congestion(BBR)
            cases.insert(1, Case(BARE_LINK, BBR))
        except TtunError as error:
            left_out = f"not measured: no tunnel with {error}"
    names = [case.name for case in cases]
    if len(set(names)) < len(names):
        raise UsageError("two benchmark targets have the same name (put NAME= in front of one)")
    if plot_file is not None:
        from ttun.lab import plot  # raises now, not after the measurement, if matplotlib is missing
    choose(plan.emulator)  # as above
    report.check(json_file, plot_file)
    if not netns.may_make_hosts():
        raise TtunError("this needs root, to make two hosts on this machine (use sudo)")
    links = [replace(plan.link, loss=loss) for loss in plan.losses]
    each = plan.estimate
    with Progress(each * plan.rounds * len(links) * len(cases)) as progress:
        if left_out:
            progress.note(left_out)
        runs, failures = _measure_all(plan, links, cases, progress)
    summaries = [
        {name: link_report.summary(figures) for name, figures in results.items() if figures}
        for results in runs
    ]
    how = f"{plan.link}; {plan.congestion}"
    often = table.rounds(plan.rounds, plan.seconds)
    print(link_report.render([machine.name(), how, often], plan.losses, summaries))
    found = {
        "ttun": __version__,
        "machine": machine.describe(),
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
    try:
        if json_file is not None:
            report.write_json(json_file, found)
    finally:
        if plot_file is not None:
            caption = f"{machine.name()}; {how}; {often}"
            plot.draw_link(plan.losses, summaries, caption, Path(plot_file))
    return 0 if all(len(each) == len(names) for each in summaries) else 1


def _measure_all(
    plan: Plan, links: Sequence[Link], cases: Sequence[Case], progress: Progress
) -> tuple[list[dict[str, list[Figures]]], list[str]]:
    """Return for each link what each case gave in each round, and what failed."""
    runs: list[dict[str, list[Figures]]] = [{case.name: [] for case in cases} for _ in links]
    failures = []
    begun = 0
    for number in range(plan.rounds):
        for link, results in zip(links, runs):
            for case in cases:
                title = f"round {number + 1} of {plan.rounds}, {link.loss:g} % loss: {case.name}"
                progress.begin(title, begun * plan.estimate)
                begun += 1
                try:
                    results[case.name].append(_measure(plan, link, case, number, progress))
                except TtunError as error:
                    progress.note(f"left out of this round: {error}")
                    failures.append(f"{link.loss:g} %, {case.name}: {error}")
    return runs, failures


def _measure(plan: Plan, link: Link, case: Case, number: int, progress: Progress) -> Figures:
    """Make the hosts, start a target there, measure everything once, and remove the hosts."""
    with LinkedHosts(link, seed=number, emulator=plan.emulator) as pair:
        if not _set_default(pair, plan.congestion) and case.target.start and not case.is_ttun:
            progress.note(
                f"{plan.congestion} is set by a route: "
                "net.ipv4.tcp_allowed_congestion_control does not list it"
            )
            _set_on_route(pair, plan.congestion)
        with contextlib.ExitStack() as running:
            progress.step("starting", START)
            for process in case.target.start(pair) if case.target.start else []:
                running.callback(end, process)
            load = Load(pair, case, plan.seconds, running, progress)
            load.measure_goodput()
            if len(plan.losses) == 1:
                load.measure_latency(plan.pings)
            return load.figures


def _set_default(pair: LinkedHosts, congestion: str) -> bool:
    """Make it TCP's default on both hosts; return whether the kernel allows that.

    Outside the initial network namespace, the kernel allows only what
    net.ipv4.tcp_allowed_congestion_control lists. Also disable TCP's metrics cache.
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
    """Have connections between the hosts use it, whatever their sockets ask for (ip-route(8))."""
    for host in (SERVER, CLIENT):
        netns.ip("-n", pair.names[host], "route", "replace", "192.0.2.0/24", "dev",
                 pair.links[host], "proto", "kernel", "scope", "link", "src", netns.IPV4[host],
                 "congctl", congestion)  # fmt: skip


def _check_congestion(name: str) -> None:
    """Raise TtunError if this kernel lacks it."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode())
        except OSError as error:
            raise TtunError(
                f"congestion control {name}: {error.strerror} (try modprobe tcp_{name})"
            ) from None


class Load:
    """Generate and measure traffic through one target."""

    def __init__(
        self,
        pair: LinkedHosts,
        case: Case,
        seconds: float,
        running: contextlib.ExitStack,
        progress: Progress,
    ) -> None:
        """Wait until a ping is answered, and start the traffic server.

        running: stops what this starts. Raises TtunError.
        """
        self.figures = Figures()
        self._pair, self._case, self._seconds = pair, case, seconds
        self._progress = progress
        self._address = case.target.address
        self._pause = _settling(pair.link_now)
        deadline = time.monotonic() + START_TIMEOUT
        while not self._is_answered():
            if time.monotonic() > deadline:
                raise TtunError(f"no answer to a ping within {START_TIMEOUT:.0f} s")
            time.sleep(0.1)
        where = self._address, PORT, case.congestion
        serve(pair, running, "ttun.lab.link_traffic", *where)

    def _is_answered(self) -> bool:
        with contextlib.suppress(TtunError):  # no route there yet
            return bool(self._run("ping", 1, 0, seconds=0) != [None])
        return False

    def measure_goodput(self) -> None:
        """Measure the goodput of one stream and of several, each way."""
        for streams in (1, STREAMS):
            for action in ("up", "down"):
                many = f"{streams} streams" if streams > 1 else "one stream"
                self._progress.step(f"{many} {action}", self._pause + self._seconds)
                time.sleep(self._pause)
                self.figures.goodput[f"{action}_{streams}"] = self._run(
                    action, PORT, streams, self._seconds, self._case.congestion
                )

    def measure_latency(self, pings: int) -> None:
        """Measure pings and fetches, idle and beside one stream."""
        for beside, where in link_report.BESIDE.items():
            wait = 0.0 if beside == "idle" else min(SETTLE, self._seconds)
            self._progress.step(f"ping {where}", self._pause + wait + pings * PING_INTERVAL)
            time.sleep(self._pause)
            with contextlib.ExitStack() as loaded:
                if beside != "idle":
                    self._load(beside, pings, loaded)
                self.figures.pings[beside] = self._run(
                    "ping", pings, PING_INTERVAL, seconds=pings * PING_INTERVAL
                )
                if beside != "up":
                    self._progress.step(f"fetch {where}", self._seconds / 2)
                    self.figures.fetches[beside] = self._run(
                        "fetch", PORT, PAGE, self._seconds / 2, self._case.congestion
                    )

    def _load(self, action: str, pings: int, loaded: contextlib.ExitStack) -> None:
        """Start a stream that runs until loaded is closed, and give it time to fill the link."""
        longest = SETTLE + pings * PING_INTERVAL + self._seconds + 2 * SLACK
        process = self._start(action, PORT, 1, longest, self._case.congestion)
        loaded.callback(end, process)
        time.sleep(min(SETTLE, self._seconds))

    def _start(self, *arguments: object, stdout: int = subprocess.DEVNULL) -> Popen:
        action, *rest = arguments
        command = netns.python("ttun.lab.link_traffic", str(action), self._address, *map(str, rest))
        return self._pair.start(
            CLIENT, command, environment=netns.environment(), stdout=stdout,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def _run(self, *arguments: object, seconds: float | None = None) -> Any:
        """Return what ttun.lab.link_traffic measured. Raises TtunError if it failed."""
        process = self._start(*arguments, stdout=subprocess.PIPE)
        try:
            patience = (self._seconds if seconds is None else seconds) + SLACK
            shown, _ = process.communicate(timeout=patience)
        except subprocess.TimeoutExpired:
            shown = ""
        finally:
            end(process)
        if process.returncode != 0:
            raise TtunError(f"the {arguments[0]} measurement failed")
        return json.loads(shown)
