"""``ttun demo``: both ends in two namespaces of this machine, shown to work and measured.

1. Make two hosts and start a server and a client of this very program on them.
2. Ping over IPv4 and IPv6.
3. Send random bytes each way and compare their checksums.
4. Print what was measured, and remove everything.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NoReturn

from ttun.commands import key
from ttun.errors import TtunError
from ttun.lab import netns
from ttun.lab.netns import CLIENT, SERVER, Hosts

PORT = 5001  # of the traffic server, in a namespace of its own
PINGS = 50
START_TIMEOUT = 20.0  # seconds until the first ping must have answered


def run(size: int) -> int:
    """Run the demo with transfers of size MiB; return its exit code."""
    if not netns.may_make_hosts():
        progress("not root: going on as root of a user namespace")
        netns.enter_user_namespace(netns.python("ttun", "demo", "--size", str(size)))
    signal.signal(signal.SIGTERM, _interrupt)  # so that the hosts are removed then too
    progress("making two hosts on this machine, joined by a cable")
    with Hosts() as pair, tempfile.TemporaryDirectory() as directory:
        rows = _measure(pair, Path(directory), size)
    failed = [row for row in rows if not row[2]]
    print()
    for name, figure, good in rows:
        print(f"  {'ok  ' if good else 'FAIL'}  {name:<34} {figure}")
    print()
    print("The tunnel works." if not failed else "The tunnel does not work: see FAIL above.")
    return 1 if failed else 0


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def progress(text: str) -> None:
    """Say what is going on, on stderr so that stdout is the table alone."""
    print(f"... {text}", file=sys.stderr, flush=True)


def _measure(pair: Hosts, directory: Path, size: int) -> list[tuple[str, str, bool]]:
    rows: list[tuple[str, str, bool]] = []
    psk = netns.environment(TTUN_PSK=key.generate())
    server = netns.python("ttun", "server")
    client = netns.python("ttun", "client", "-s", netns.IPV4[SERVER])
    with contextlib.ExitStack() as running:
        logs = {host: directory / f"{host}.log" for host in (SERVER, CLIENT)}
        progress("starting the server on one and the client on the other")
        started = time.monotonic()
        ends = []
        for host, command in ((SERVER, server), (CLIENT, client)):
            log = running.enter_context(logs[host].open("w"))
            ends.append(pair.start(host, command, environment=psk, stdout=log, stderr=log))
            running.callback(end, ends[-1])
        _await_tunnel(pair, ends, logs)
        rows.append(("tunnel up", f"{time.monotonic() - started:.1f} s", True))
        rows += [_ping(pair, "ping 10.1.1.1", "10.1.1.1"), _ping(pair, "ping fc11::1", "fc11::1")]

        receiver = pair.start(
            SERVER,
            netns.python("ttun.lab.traffic", "serve", "10.1.1.1", str(PORT)),
            environment=netns.environment(),
            stdout=subprocess.PIPE,
        )
        running.callback(end, receiver)
        assert receiver.stdout is not None
        receiver.stdout.readline()
        for action, name in (("send", "client to server"), ("receive", "server to client")):
            progress(f"{size} MiB, {name}")
            rows.append(_transfer(pair, action, name, size))
    for host, process in zip((SERVER, CLIENT), ends):
        clean = process.returncode == 0
        rows.append((f"{host} ended cleanly", f"exit code {process.returncode}", clean))
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


def _ping(pair: Hosts, name: str, address: str) -> tuple[str, str, bool]:
    progress(name)
    times = measured(pair, "ping", address, str(PINGS)) or []
    answered = [seconds for seconds in times if seconds is not None]
    median = f", median {statistics.median(answered) * 1000:.2f} ms" if answered else ""
    return name, f"{len(answered)} of {PINGS} answered{median}", len(answered) == PINGS


def _transfer(pair: Hosts, action: str, name: str, size: int) -> tuple[str, str, bool]:
    result = measured(pair, action, "10.1.1.1", str(PORT), str(size << 20))
    title = f"{size} MiB {name}"
    if result is None:
        return title, "did not arrive", False
    rate = (size << 20) * 8 / result["seconds"] / 1e9
    figure = f"{'whole' if result['whole'] else 'CORRUPTED'}, {rate:.2f} Gbit/s"
    return title, figure, result["whole"]


def measured(pair: Hosts, *arguments: str) -> Any:
    """Run ttun.traffic on the client's host; return what it measured, None if it failed."""
    done = subprocess.run(
        pair.command(CLIENT, netns.python("ttun.lab.traffic", *arguments)),
        env={**os.environ, **netns.environment()},
        capture_output=True,
        text=True,
        check=False,
    )
    return json.loads(done.stdout) if done.returncode == 0 else None


def end(process: subprocess.Popen[str]) -> None:
    """End a process, kindly at first."""
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
