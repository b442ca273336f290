"""``ttun demo``: run both ends in two namespaces of this machine, and show that the tunnel works.

1. Make two hosts, and start a server and a client of this program on them.
2. Ping over IPv4 and IPv6.
3. Send random bytes each way and compare their SHA-256.
4. Measure the throughput of one TCP stream each way. Here nothing is hashed: hashing is slower than
   the tunnel.
5. Print the results, and remove everything.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ttun.commands import terminal
from ttun.errors import TtunError
from ttun.lab import machine, netns
from ttun.lab.netns import CLIENT, SERVER, Hosts
from ttun.lab.progress import Progress

PORT = 5001  # of the traffic server, in a namespace of its own
PINGS = 50
SECONDS = 2.0  # of each measurement of throughput
START_TIMEOUT = 20.0  # seconds until the first ping must be answered
HASHED = 200.0  # MiB that are sent and hashed in a second, about
WAYS = ("client to server", "server to client")

Row = tuple[str, str, bool]  # what, figure, whether it is good


def run(size: int) -> int:
    """Run the demo with transfers of size MiB; return its exit code."""
    if not netns.may_make_hosts():
        print("not root: continuing as root of a user namespace", file=sys.stderr, flush=True)
        netns.enter_user_namespace(netns.python("ttun", "demo", "--size", str(size)))
    steps = _Steps(size)
    with steps.progress, tempfile.TemporaryDirectory() as directory:
        steps.next("creating two network namespaces joined by a veth pair")
        with Hosts() as pair:
            rows = _measure(pair, Path(directory), size, steps)
    failed = [row for row in rows if not row[2]]
    print()
    for name, figure, good in rows:
        state = terminal.colored("ok  ", "green") if good else terminal.colored("FAIL", "red")
        print(f"  {state}  {name:<34} {figure}")
    where = f"Both ends and the load share {machine.name()}."
    print("", *terminal.wrapped(f"One TCP stream: {SECONDS:g} s each way. {where}", 0), sep="\n")
    print("The tunnel works." if not failed else "The tunnel does not work: see FAIL above.")
    return 1 if failed else 0


class _Steps:
    """The steps of the demo, and how many seconds each takes, about."""

    def __init__(self, size: int) -> None:
        hashed = 0.3 + size / HASHED
        self._seconds = [0.3, 1.3, 0.8, 0.8, hashed, hashed, SECONDS + 0.3, SECONDS + 0.3]
        self._number = 0
        self.progress = Progress(sum(self._seconds))

    def next(self, what: str) -> None:
        self.progress.begin(what, sum(self._seconds[: self._number]))
        self._number += 1


def _measure(pair: Hosts, directory: Path, size: int, steps: _Steps) -> list[Row]:
    rows: list[Row] = []
    environment = netns.environment_of_ends()
    server = netns.python("ttun", "server")
    client = netns.python("ttun", "client", "-s", netns.IPV4[SERVER])
    with contextlib.ExitStack() as running:
        logs = {host: directory / f"{host}.log" for host in (SERVER, CLIENT)}
        steps.next("starting the server on one and the client on the other")
        started = time.monotonic()
        ends = []
        for host, command in ((SERVER, server), (CLIENT, client)):
            log = running.enter_context(logs[host].open("w"))
            ends.append(pair.start(host, command, environment=environment, stdout=log, stderr=log))
            running.callback(end, ends[-1])
        _await_tunnel(pair, ends, logs)
        rows.append(("tunnel up", f"after {time.monotonic() - started:.1f} s", True))
        for address in ("10.1.1.1", "fc11::1"):
            steps.next(f"ping {address}")
            rows.append(_ping(pair, address))

        serve(pair, running, "ttun.lab.traffic", "10.1.1.1", str(PORT))
        for action, way in zip(("send", "receive"), WAYS):
            steps.next(f"{size} MiB, {way}")
            rows.append(_transfer(pair, action, f"{size} MiB, {way}", size))
        for action, way in zip(("flood", "drain"), WAYS):
            steps.next(f"throughput, {way}")
            rows.append(_throughput(pair, action, f"one TCP stream, {way}"))
    for host, process in zip((SERVER, CLIENT), ends):
        clean = process.returncode == 0
        rows.append((f"{host} stopped cleanly", f"exit code {process.returncode}", clean))
    return rows


def _await_tunnel(pair: Hosts, ends: list[subprocess.Popen[str]], logs: dict[str, Path]) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while measured(pair, "ping", "10.1.1.1", "1") in (None, [None]):
        if time.monotonic() > deadline or any(process.poll() is not None for process in ends):
            said = "; ".join(f"{host}: {_last_line(log)}" for host, log in logs.items())
            raise TtunError(f"the tunnel did not come up: {said}")
        time.sleep(0.05)


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no output"


def _ping(pair: Hosts, address: str) -> Row:
    times = measured(pair, "ping", address, str(PINGS)) or []
    answered = [seconds for seconds in times if seconds is not None]
    median = f", median {statistics.median(answered) * 1000:.2f} ms" if answered else ""
    figure = f"{len(answered)} of {PINGS} answered{median}"
    return f"ping {address}", figure, len(answered) == PINGS


def _transfer(pair: Hosts, action: str, name: str, size: int) -> Row:
    result = measured(pair, action, "10.1.1.1", str(PORT), str(size << 20))
    if result is None:
        return name, "did not arrive", False
    return name, "SHA-256 matches" if result["whole"] else "CORRUPTED", result["whole"]


def _throughput(pair: Hosts, action: str, name: str) -> Row:
    rate = measured(pair, action, "10.1.1.1", str(PORT), "1", str(SECONDS))
    return name, "transfer failed" if rate is None else f"{rate / 1e9:.2f} Gbit/s", bool(rate)


def serve(pair: Hosts, running: contextlib.ExitStack, module: str, *arguments: str) -> None:
    """Start a traffic server on the server's host. Raises TtunError if it does not start.

    arguments: its address and port first. running: stops it.
    """
    server = pair.start(
        SERVER,
        netns.python(module, "serve", *arguments),
        environment=netns.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # the client's side says what failed
    )
    running.callback(end, server)
    assert server.stdout is not None
    running.callback(server.stdout.close)
    told = select.select([server.stdout], [], [], START_TIMEOUT)[0]
    if not told or server.stdout.readline() != "ready\n":
        where = ":".join(arguments[:2])
        raise TtunError(f"the traffic server cannot listen on {where}, at the server's end")


def measured(pair: Hosts, *arguments: str) -> Any:
    """Run ttun.lab.traffic on the client's host; return what it measured, None if it failed."""
    done = subprocess.run(
        pair.command(CLIENT, netns.python("ttun.lab.traffic", *arguments)),
        env={**os.environ, **netns.environment()},
        capture_output=True,
        text=True,
        check=False,
    )
    return json.loads(done.stdout) if done.returncode == 0 else None


def end(process: subprocess.Popen[str]) -> None:
    """Stop a process: SIGTERM, then SIGKILL."""
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
