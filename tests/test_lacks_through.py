"""Shortages while a tunnel goes through a command or a proxy, and of its keeper: it lives, and
works again when they are over."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from carried import MARK, SOCAT, TO_SERVER, client, needs_socat, serve
from kept import keeper_of
from lacks import lives, no_descriptors, no_threads
from machine import IS_NOBODY_HERE, running
from tunnel import CLIENT, PROGRAM, ROOT, SERVER, Bench, Program, eventually

from ttun.lab import netns

pytestmark = [pytest.mark.hosts, needs_socat]
others = pytest.mark.skipif(not IS_NOBODY_HERE, reason="no other user in this user namespace")
SOON = 30.0  # seconds; at most 5 are usual
PROXY = ("--proxy", "http://192.0.2.1:3128")


def start_proxy(plain: Bench) -> None:
    script = ROOT / "tests/helpers/proxy.py"
    plain.helpers.append(
        plain.pair.start(
            SERVER, [sys.executable, str(script), "http", "3128"], stdout=subprocess.PIPE,
            environment=netns.environment(),
        )
    )  # fmt: skip
    eventually(lambda: plain.run(SERVER, "ss", "-Htln", "sport = 3128"), "it listens")


@pytest.mark.parametrize("more", [0, 1, 3, 5])
def test_a_client_without_descriptors_runs_its_command_again(plain: Bench, more: int) -> None:
    """Whether it lacks the first of a dial or another one."""
    end = client(plain, SOCAT, "-s", TO_SERVER)
    end.says("reconnecting in")
    with no_descriptors(end, more):
        serve(plain)
        time.sleep(6)
        assert lives(end), end.log()
    end.says("authenticated", seconds=SOON)
    plain.answers()
    assert end.stop() == 0
    assert not running(MARK)


@pytest.mark.parametrize("more", [0, 3])
def test_a_keeper_without_descriptors_runs_commands_when_it_has_some_again(
    plain: Bench, said: Path, more: int
) -> None:
    hooks = ("--hook-user", "root", "--up", f"echo up >> {said}", "--down", f"echo down >> {said}")
    end = client(plain, SOCAT, "-s", TO_SERVER, *hooks)
    end.says("reconnecting in")
    with no_descriptors(end, more, keeper_of(end.process.pid)):
        serve(plain)
        time.sleep(6)
        assert lives(end), end.log()
        assert "Too many open files" in end.log()
    end.says("authenticated", seconds=SOON)
    plain.answers()
    eventually(said.exists, "--up ran")
    with no_descriptors(end, 0, keeper_of(end.process.pid)):
        for pid in running(MARK):
            os.kill(pid, 9)
        end.says("cannot run --down: Too many open files")
    eventually(lambda: "up\ndown\nup\n" in said.read_text(), "both ran later", 60)
    assert end.stop() == 0
    assert not running(MARK)


@others
def test_a_client_without_threads_and_processes_runs_its_command_again(plain: Bench) -> None:
    end = client(plain, SOCAT, "-s", TO_SERVER, "--user", "4000000003")
    end.says("reconnecting in")
    with no_threads(end):
        serve(plain)
        time.sleep(6)
        assert lives(end), end.log()
        assert "authenticated" not in end.log()
    end.says("authenticated", seconds=SOON)
    plain.answers()
    with no_threads(end):
        for pid in running(MARK):
            os.kill(pid, 9)
        time.sleep(6)
        assert lives(end), end.log()
    end.says("authenticated", times=2, seconds=SOON)
    plain.answers()
    assert end.stop() == 0
    assert not running(MARK)


@pytest.mark.parametrize("more", [0, 1, 2])
def test_a_client_of_a_proxy_without_descriptors_dials_again(plain: Bench, more: int) -> None:
    end = plain.client(*PROXY)
    end.says("Connection refused")
    with no_descriptors(end, more):
        start_proxy(plain)
        plain.server()
        time.sleep(6)
        assert lives(end), end.log()
    end.says("authenticated", seconds=SOON)
    plain.answers()


WAYS = {
    "via": ("--via", SOCAT, "-s", TO_SERVER),
    "proxy": (*PROXY, "-s", "192.0.2.1"),
    "keeper": ("--hook-user", "root", "--up", "true", "-s", "192.0.2.1"),
    "default": ("--route", "default", "--user", "4711", "-s", "192.0.2.1"),
}


@pytest.mark.parametrize(
    "way", [pytest.param(each, marks=others if each == "default" else []) for each in WAYS]
)
def test_too_few_descriptors_at_the_start_are_one_line(plain: Bench, way: str) -> None:
    """From none to enough: it runs, or reports an error in one line. 24 are enough."""
    enough = plain.directory / "enough.log"
    for limit in (8, 10, 12, 14, 16, 18, 20, 24):
        words = [*PROGRAM, "client", "-k", "secret", *WAYS[way]]
        log = enough if limit == 24 else plain.directory / "few.log"
        with log.open("w") as file:
            end = Program(plain.pair.start(
                CLIENT, ["sh", "-c", f'ulimit -n {limit}; exec "$@"', "sh", *words], stderr=file,
                environment=netns.environment(),
            ), log)  # fmt: skip
        if limit == 24:
            start_proxy(plain)
            plain.server()
            serve(plain, "", "TCP-LISTEN", "--dev", "other", "--local4", "10.1.1.1/30")
            end.says("authenticated", seconds=SOON)
        else:
            with contextlib.suppress(subprocess.TimeoutExpired):
                end.process.wait(3)
        code = end.process.poll()
        assert code is None or code == 1 or "Fatal Python error" in end.log()
        assert code is None or re.search("^(Fatal Python|ttun: |Error|Traceback)", end.log(), re.M)
        assert "Traceback" not in end.log().partition("ttun")[2], (limit, end.log())
        assert "internal error" not in end.log()
        print(way, limit, code, end.log()[-200:])
        end.stop() if code is None else None


class Reader:
    """Where a log goes: to a full disk, or to a pipe that nobody reads."""

    def __init__(self, kind: str) -> None:
        if kind == "full":
            self.read, self.write = -1, os.open("/dev/full", os.O_WRONLY)
        else:
            self.read, self.write = os.pipe()

    def close(self) -> None:
        for each in {self.read, self.write} - {-1}:
            os.close(each)


@pytest.mark.parametrize("kind", ["full", "undrained"])
@pytest.mark.parametrize("way", ["via", "proxy"])
def test_a_log_that_takes_nothing_holds_nobody_up(
    plain: Bench, kind: str, way: str, said: Path
) -> None:
    """The client's, its keeper's, and what its commands write to stderr."""
    words = [*WAYS[way], "--hook-user", "root", "--up",
             f"yes much ado | head -c 200000 >&2; echo up >> {said}"]  # fmt: skip
    if way == "via":
        words[1] = f"yes much ado >&2 & exec {SOCAT}"
        server = serve(plain)
    else:
        start_proxy(plain)
        server = plain.server("--takeover")
    reader = Reader(kind)
    with open(reader.write, "wb", closefd=False) as file:
        process = plain.pair.start(
            CLIENT,
            [*PROGRAM, "client", "-k", "secret", "-v", *words],
            stderr=file,
            environment=netns.environment(),
        )
    try:
        server.says("authenticated")
        plain.answers()
        eventually(said.exists, "--up ran")
        for pid in running(MARK):
            os.kill(pid, 9)
        if way == "via":
            server.says("authenticated", times=2, seconds=SOON)
            eventually(lambda: said.read_text() == "up\nup\n", "it ran again")
        plain.answers()
        process.terminate()
        assert process.wait(20) == 0
        assert not running(MARK)
    finally:
        process.kill()
        process.wait()
        reader.close()
