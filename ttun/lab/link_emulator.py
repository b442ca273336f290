"""Two hosts on this machine, joined by a link with a rate, a delay, random loss and a queue.

    server's host 192.0.2.1 ---- link_emulator.c, or netem ---- 192.0.2.2 client's host

For ``ttun bench link`` and the tests. The properties of the link can change while traffic runs.

There are two implementations. The relay (link_emulator.c, compiled on first use) forwards frames
between a TAP device on each host. netem is the kernel's (tc-netem(8)), which not every kernel has.
The relay is preferred where there is a C compiler, so that figures of different machines come from
the same link: netem counts frames in flight as part of its queue, and shares the sender's device.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import select
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ttun.errors import TtunError, UsageError
from ttun.lab import netns
from ttun.lab.netns import CLIENT, SERVER, Hosts, LinkEnd

SOURCE = Path(__file__).with_suffix(".c")
MACS = {SERVER: "02:00:00:00:00:01", CLIENT: "02:00:00:00:00:02"}  # locally administered
DEVICE_QUEUE = 10_000  # packets; so large that only the link drops packets
ANSWER_TIMEOUT = 10.0  # seconds
FRAME = 1514  # bytes of a full-size Ethernet frame
DOWN, UP = "down", "up"  # to the client, to the server
# name -> minimum, maximum
BOUNDS = {"rate": (0.01, 10_000.0), "rtt": (0.0, 60_000.0), "loss": (0.0, 100.0),
          "queue": (0.0, 60_000.0)}  # fmt: skip


@dataclass(frozen=True)
class Link:
    """The properties of a link. Raises UsageError for a value out of range."""

    rate: float = 100.0  # Mbit/s to the client
    rate_up: float | None = None  # Mbit/s to the server; None: the same
    rtt: float = 0.0  # ms, half of it each way
    loss: float = 0.0  # percent of the frames, each way
    queue: float = 100.0  # longest wait in the queue, in ms; then frames are dropped

    def __post_init__(self) -> None:
        """Check the ranges."""
        values = (("rate", self.rate), ("rate", self.up), ("rtt", self.rtt), ("loss", self.loss),
                  ("queue", self.queue))  # fmt: skip
        for name, value in values:
            least, most = BOUNDS[name]
            if not least <= value <= most:
                raise UsageError(f"{name} {value:g} is out of range ({least:g} to {most:g})")

    @property
    def up(self) -> float:
        """Mbit/s to the server."""
        return self.rate if self.rate_up is None else self.rate_up

    def __str__(self) -> str:
        """Describe the link in one line, without the loss."""
        rate = f"{self.rate:g}" if self.up == self.rate else f"{self.rate:g}/{self.up:g}"
        return f"{rate} Mbit/s, round trip {self.rtt:g} ms, queue {self.queue:g} ms"


@dataclass(frozen=True)
class Counters:
    """Counters of one direction, in frames and bytes."""

    passed: int
    bytes: int
    lost: int
    dropped: int  # as the queue was full
    waiting: int  # bytes in the queue now


class LinkedHosts(Hosts):
    """The two hosts, joined by an emulated link. A context manager."""

    def __init__(self, link: Link, *, seed: int = 1, emulator: str = "auto") -> None:
        """Choose names. seed: the same seed loses the same frames. emulator: auto, relay, netem."""
        super().__init__()
        self.link_now = link
        self._is_cut = False
        self._emulator: _Relay | _Netem = choose(emulator)(self, seed)

    def __exit__(self, *what: object) -> None:
        """Remove the hosts and the link."""
        try:
            super().__exit__(*what)
        finally:
            self._emulator.close()

    def change(self, **changes: float) -> None:
        """Change properties of the link: rate, rate_up, rtt, loss, queue, as in Link."""
        self.link_now = replace(self.link_now, **changes)
        self._emulator.set(self.link_now, self._is_cut)

    @contextlib.contextmanager
    def cut(self) -> Iterator[None]:
        """Drop everything while the context lasts; the devices of both ends stay up."""
        self._is_cut = True
        self._emulator.set(self.link_now, True)
        try:
            yield
        finally:
            self._is_cut = False
            self._emulator.set(self.link_now, False)

    def counters(self) -> dict[str, Counters]:
        """Return the counters of each direction."""
        return self._emulator.counters()

    def _join(self) -> None:
        self._emulator.start(self.link_now)
        for host, other in ((SERVER, CLIENT), (CLIENT, SERVER)):
            name, device = self.names[host], self.links[host]
            netns.ip("-n", name, "link", "set", device, "address", MACS[host],
                     "txqueuelen", str(DEVICE_QUEUE), "up")  # fmt: skip
            for family, prefix, more in ((netns.IPV4, 24, []), (netns.IPV6, 64, ["nodad"])):
                netns.ip("-n", name, "address", "replace", f"{family[host]}/{prefix}", "dev",
                         device, *more)  # fmt: skip
                # On a real link ARP ends at a router, so it does not cross the link.
                netns.ip("-n", name, "neighbour", "replace", family[other], "lladdr", MACS[other],
                         "dev", device, "nud", "permanent")  # fmt: skip


class _Relay:
    """link_emulator.c, running between the two hosts."""

    def __init__(self, pair: Hosts, seed: int) -> None:
        self._pair, self._seed = pair, seed
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()  # held from a command to its answer

    def start(self, link: Link) -> None:
        ends = [(self._pair.names[host], self._pair.links[host]) for host in (SERVER, CLIENT)]
        self._process = subprocess.Popen(
            [_compiled(), *ends[0], *ends[1], *" ".join(_commands(link)).split(), "seed",
             str(self._seed)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            bufsize=1,
        )  # fmt: skip
        self._answer("ready")

    def set(self, link: Link, is_cut: bool) -> None:
        for command in [*_commands(link), "cut" if is_cut else "join"]:
            self._ask(command, "ok")

    def counters(self) -> dict[str, Counters]:
        numbers = [int(word) for word in self._ask("counters").split()]
        half = len(numbers) // 2
        return {DOWN: Counters(*numbers[:half]), UP: Counters(*numbers[half:])}

    def close(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with process:  # closes its pipes; it ends at the end of its stdin
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                process.communicate(timeout=ANSWER_TIMEOUT)
            process.kill()

    def _ask(self, command: str, expected: str | None = None) -> str:
        assert self._process is not None
        assert self._process.stdin is not None
        with self._lock:
            try:
                self._process.stdin.write(command + "\n")
            except OSError as error:
                raise TtunError(f"the link emulator exited: {error}") from None
            return self._answer(expected)

    def _answer(self, expected: str | None = None) -> str:
        assert self._process is not None
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], ANSWER_TIMEOUT)[0]:
            raise TtunError(f"the link emulator did not answer within {ANSWER_TIMEOUT:.0f} s")
        answer = self._process.stdout.readline().strip()
        if not answer:
            assert self._process.stderr is not None
            said = self._process.stderr.read().strip() or "no error message"
            raise TtunError(f"the link emulator exited: {said}")
        if expected is not None and answer != expected:
            raise TtunError(f"the link emulator rejected a command: {answer}")
        return answer


def _commands(link: Link) -> list[str]:
    return [f"rate {link.rate!r}/{link.up!r}", f"rtt {link.rtt!r}", f"loss {link.loss!r}",
            f"queue {link.queue!r}"]  # fmt: skip


class _Netem:
    """The kernel's netem on both ends of a veth pair."""

    def __init__(self, pair: Hosts, seed: int) -> None:
        self._pair, self._seed = pair, seed

    def start(self, link: Link) -> None:
        ends = [LinkEnd(host, self._pair.links[host], []) for host in (SERVER, CLIENT)]
        self._pair.link(ends[0], ends[1])
        for host in (SERVER, CLIENT):
            # Otherwise 64 KiB would be delayed and lost as one packet.
            netns.ip("-n", self._pair.names[host], "link", "set", self._pair.links[host],
                     "gso_max_segs", "1")  # fmt: skip
            self._tc(host, "qdisc", "add", *self._qdisc(host, link, False))

    def set(self, link: Link, is_cut: bool) -> None:
        for host in (SERVER, CLIENT):
            self._tc(host, "qdisc", "change", *self._qdisc(host, link, is_cut))

    def counters(self) -> dict[str, Counters]:
        return {way: self._counted(host) for host, way in ((SERVER, DOWN), (CLIENT, UP))}

    def close(self) -> None:
        """Do nothing: the qdisc is removed with its device."""

    def _qdisc(self, host: str, link: Link, is_cut: bool) -> list[str]:
        rate = link.rate if host == SERVER else link.up
        # The limit is in packets, and includes those in flight.
        limit = max(2, int(rate * 1e3 / 8 * (link.queue + link.rtt / 2) / FRAME))
        return ["dev", self._pair.links[host], "root", "netem", "limit", str(limit), "delay",
                f"{link.rtt / 2}ms", "rate", f"{rate}mbit", "loss",
                f"{100.0 if is_cut else link.loss}%"]  # fmt: skip

    def _counted(self, host: str) -> Counters:
        shown = self._tc(host, "-s", "-json", "qdisc", "show", "dev", self._pair.links[host])
        one = json.loads(shown)[0]
        # netem does not tell random loss from a full queue.
        return Counters(one["packets"], one["bytes"], one["drops"], 0, one["backlog"])

    def _tc(self, host: str, *arguments: str) -> str:
        done = _tc(self._pair.names[host], *arguments)
        if done.returncode != 0:
            raise TtunError(f"tc {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout


def _tc(namespace: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["tc", "-n", namespace, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def choose(emulator: str) -> type[_Relay] | type[_Netem]:
    """Return the implementation to use. emulator: auto, relay or netem.

    Raises TtunError if it is not available here, UsageError for another name.
    """
    if emulator not in ("auto", "relay", "netem"):
        raise UsageError(f"--emulator {emulator} is not auto, relay or netem")
    if emulator != "netem" and _compiler() is not None:
        return _Relay
    if emulator != "relay" and _has_netem():
        return _Netem
    lacks = {
        "auto": "an emulated link needs a C compiler or netem in the kernel",
        "relay": "the relay needs a C compiler",
        "netem": "netem is not available (modprobe sch_netem; apt install iproute2)",
    }
    raise TtunError(lacks[emulator] + ("" if emulator == "netem" else " (apt install gcc)"))


def _has_netem() -> bool:
    """Return whether netem works, tried in a new namespace."""
    if not shutil.which("tc") or not netns.may_make_hosts():
        return False
    with netns.Namespaces("netem") as place:
        done = _tc(place.names["netem"], "qdisc", "add", "dev", "lo", "root", "netem", "delay",
                   "1ms")  # fmt: skip
        return done.returncode == 0


def _compiler() -> list[str] | None:
    """Return the command of the C compiler, or None if there is none."""
    command = shlex.split(os.environ.get("CC", "")) or ["cc"]
    return command if shutil.which(command[0]) else None


@functools.cache
def _compiled() -> str:
    """Compile the relay, once per process; return the path of the program.

    It is in a private temporary directory: root runs it, so no other user may be able to write it.
    """
    directory = tempfile.mkdtemp(prefix="ttun-link-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    program = f"{directory}/link_emulator"
    command = [*(_compiler() or ["cc"]), "-std=c11", "-O2", "-o", program, str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise TtunError(f"cannot compile {SOURCE.name}: {lines[0]} (apt install gcc libc6-dev)")
    return program
