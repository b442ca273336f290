"""Tunnels through other programs: a server behind socat, and what a client's command leaves."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from tunnel import CLIENT, PROGRAM, SERVER, SERVER_ADDRESS, TUNNEL4, Bench, End, Program

from ttun.lab import netns

PORT = 7000
SIZE = 20 << 20  # bytes
TO_SERVER = f"{SERVER_ADDRESS}:{PORT}"
MARK = f"-lpcarried-{os.getpid()}"  # an argument of this process's socats alone
SOCAT = f"socat {MARK} - TCP:%h:%p"
needs_socat = pytest.mark.skipif(not shutil.which("socat"), reason="apt install socat")


def start(bench: Bench, host: str, name: str, *command: str) -> Program:
    """A program on a host, ended with the test. Its log has what it writes to stderr."""
    log = bench.directory / f"{name}.log"
    with log.open("w") as file:
        process = bench.pair.start(
            host, command, stdout=subprocess.PIPE, stderr=file, environment=netns.environment()
        )
    bench.helpers.append(process)
    return Program(process, log)


def stdio(bench: Bench, *options: str) -> Path:
    """A script that runs a server on its stdin and stdout. Its log is beside it, as server.log."""
    line = shlex.join([*PROGRAM, "server", "-k", "secret", "--stdio", *bench.options, *options])
    log = bench.directory / "server.log"
    script = bench.directory / "server.sh"
    script.write_text(f"#!/bin/sh\ntrap : TERM\n{line} 2>> {log}\necho exit code $? >> {log}\n")
    script.chmod(0o755)
    log.touch()
    return script


def serve(bench: Bench, how: str = "", listen: str = "TCP-LISTEN", *options: str) -> Program:
    """A server behind socat, for each connection a fresh one. how: the options of EXEC."""
    socat = start(
        bench, SERVER, "socat", "socat", "-d", "-d", f"{listen}:{PORT},reuseaddr,fork",
        f"EXEC:{stdio(bench, *options)}{how}",
    )  # fmt: skip
    socat.says("listening on")
    return Program(socat.process, bench.directory / "server.log")


def client(bench: Bench, command: str, *options: str) -> End:
    """A client whose connection is a command."""
    return bench.start(
        CLIENT, "client", "-k", "secret", "--via", command, *bench.options, *options
    )  # fmt: skip


def carries(bench: Bench, size: int = SIZE) -> None:
    """Send data both ways, and compare their hashes."""
    bench.answers()
    bench.serve_traffic(SERVER, TUNNEL4[SERVER])
    for direction in ("send", "receive"):
        result = bench.traffic(CLIENT, direction, TUNNEL4[SERVER], "5001", str(size))
        assert result["whole"]


def lines(end: Program, pattern: str) -> list[str]:
    """The lines of a log in which a pattern is found."""
    return [line for line in end.log().splitlines() if re.search(pattern, line)]
