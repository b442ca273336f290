"""Two hosts on one machine: they go whatever happens, and figures are what they are said to be."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tunnel import PROGRAM, ROOT, eventually

from ttun import cli
from ttun.errors import TtunError
from ttun.lab import bench, demo, link_emulator, netns, report, traffic
from ttun.lab.link_emulator import Link, LinkedHosts
from ttun.lab.netns import CLIENT, SERVER, Hosts
from ttun.lab.progress import Progress
from ttun.lab.targets import BARE_LINK, Target

HOLD = """
import time
from ttun.lab.netns import Hosts
with Hosts():
    print("made", flush=True)
    time.sleep(60)
"""


def left(pid: int) -> list[str]:
    """The namespaces of a program."""
    shown = netns.ip("netns", "list").splitlines()
    return [line for line in shown if line.startswith(f"ttun-{pid}-")]


# ---- what is left -------------------------------------------------------------------------------


@pytest.mark.hosts
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("what", ["demo", "bench tunnel", "bench link"])
def test_a_signal_leaves_no_hosts_behind(what: str, number: int) -> None:
    program = subprocess.Popen(
        [*PROGRAM, *what.split()], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        eventually(lambda: len(left(program.pid)) == 2, "both hosts", 60)
        program.send_signal(number)
        assert program.wait(60) == 130
    finally:
        program.kill()
        program.wait()
    assert left(program.pid) == []


@pytest.mark.hosts
def test_nohup_is_obeyed() -> None:
    program = subprocess.Popen(
        ["nohup", sys.executable, "-c",
         f"from ttun.lab import netns; netns.end_as_by_ctrl_c(){HOLD}"],
        env={**os.environ, **netns.environment()}, stdout=subprocess.PIPE, text=True,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    with program:
        assert program.stdout is not None
        assert program.stdout.readline() == "made\n"
        program.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        assert program.poll() is None
        program.terminate()
    assert left(program.pid) == []


@pytest.mark.hosts
def test_one_ctrl_c_after_the_other_leaves_no_hosts_behind(tmp_path: Path) -> None:
    """As the terminal sends it: to ip(8) too, which takes its time here."""
    slow = tmp_path / "ip"
    lines = [
        f"#!{sys.executable} -IS",  # not sh, which unblocks signals
        "import os, sys, time",
        "time.sleep(0.2)",
        f"os.execv({shutil.which('ip')!r}, sys.argv)",
    ]
    slow.write_text("\n".join(lines))
    slow.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    program = subprocess.Popen(
        [sys.executable, "-c", HOLD],
        env={**os.environ, **netns.environment(PATH=path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    with program:
        assert program.stdout is not None
        assert program.stdout.readline() == "made\n"
        deadline = time.monotonic() + 60
        while program.poll() is None:
            assert time.monotonic() < deadline
            with contextlib.suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGINT)
            time.sleep(0.3)
    assert left(program.pid) == []


def test_only_what_is_ours_is_swept(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = 1 << 22  # the highest process ID is lower
    shown = [f"ttun-{gone}-server0 (id: 3)", f"ttun-{gone}-client12", f"ttun-{gone}-office-1",
             f"ttun-{gone}-office", f"ttun-{os.getpid()}-server0", "other"]  # fmt: skip
    monkeypatch.setattr(netns, "ip", lambda *_: "\n".join(shown))
    removed: list[str] = []
    monkeypatch.setattr(netns, "_remove", removed.append)
    netns._sweep()
    assert removed == [f"ttun-{gone}-server0", f"ttun-{gone}-client12"]


@pytest.mark.hosts
def test_a_relay_that_does_not_end_is_killed(
    pair: Hosts, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "relay"
    program.write_text("#!/bin/sh\necho ready\nexec sleep 300\n")
    program.chmod(0o755)
    monkeypatch.setattr(link_emulator, "_compiled", lambda: str(program))
    monkeypatch.setattr(link_emulator, "ANSWER_TIMEOUT", 5.0)
    relay = link_emulator._Relay(pair, 1)
    relay.start(Link())
    closing = threading.Thread(target=relay.close, daemon=True)
    closing.start()
    closing.join(60)
    assert not closing.is_alive()


@pytest.mark.hosts
def test_what_a_target_leaves_does_not_meet_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def measure(pair: Hosts, target: Target, *_: object) -> dict[str, float]:
        seen.append(target.name)
        assert netns.ip("netns", "pids", pair.names[SERVER]) == ""
        if target.name == "bad":
            pair.start(SERVER, ["sleep", "300"])
            raise TtunError("it did not start")
        return dict.fromkeys(bench.COLUMNS, 1.0)

    monkeypatch.setattr(bench, "_measure", measure)
    assert bench.tunnel(2, 0.1, ["bad=sh :: sh"], None, None) == 0
    assert seen.count("bad") == 2


# ---- figures ------------------------------------------------------------------------------------


class Answering:
    """A traffic server for one connection, and a thread that ends with it."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = self._listener.getsockname()
        self.thread = threading.Thread(target=self._answer, daemon=True)
        self.thread.start()

    def _answer(self) -> None:
        with self._listener:
            traffic._answer(self._listener.accept()[0])


def test_datagrams_are_counted_for_longer_than_a_transfer_may_stand_still(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(traffic, "PATIENCE", 3.0)
    counted = traffic.datagrams(*Answering().address, 64, 100, 4)
    assert counted["sent"] == counted["arrived"] > 100


def test_a_client_that_resets_is_waited_for_no_more() -> None:
    server = Answering()
    with socket.create_connection(server.address) as sock:
        sock.sendall(traffic.REQUEST.pack(traffic.DATAGRAMS, 100))
        traffic.receive_exactly(sock, 8)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    server.thread.join(20)
    assert not server.thread.is_alive()


def test_a_ping_without_an_answer_took_longer_than_all_others() -> None:
    assert bench._median_ms([0.001, 0.002, 0.003, None]) == pytest.approx(2.5)
    assert bench._median_ms([0.001, None, None]) == float("inf")


@pytest.mark.hosts
@pytest.mark.slow
def test_all_pings_under_load_are_under_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if they take longer than a transfer does."""
    beside: list[tuple[str, bool]] = []

    def measured(pair: Hosts, *arguments: str) -> object:
        found = demo.measured(pair, *arguments)
        pids = netns.ip("netns", "pids", pair.names[CLIENT]).split()
        running = [Path("/proc", pid, "cmdline").read_bytes().split(b"\0") for pid in pids]
        beside.append((arguments[0], any(b"flood" in words for words in running)))
        return found

    monkeypatch.setattr(bench, "measured", measured)
    with LinkedHosts(Link(rtt=150)) as pair, Progress(1) as progress:
        bench._measure(pair, BARE_LINK, 0.5, progress)
    assert beside[-1] == ("ping", True)


@pytest.mark.hosts
def test_a_traffic_server_that_cannot_listen_is_one_line(
    pair: Hosts, capfd: pytest.CaptureFixture[str]
) -> None:
    with (
        contextlib.ExitStack() as running,
        pytest.raises(TtunError, match=r"cannot listen on 10\.9\.9\.9:5001"),
    ):
        demo.serve(pair, running, "ttun.lab.traffic", "10.9.9.9", "5001")
    assert capfd.readouterr().err == ""


# ---- bad usage, and files -----------------------------------------------------------------------


@pytest.mark.parametrize("seconds", ["0", "0.001", "nan", "3601", "-1"])
@pytest.mark.parametrize("kind", ["tunnel", "link"])
def test_seconds_that_measure_nothing_are_bad_usage(
    kind: str, seconds: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", kind, f"--seconds={seconds}"]) == 2
    assert "--seconds (0.01 to 3600)" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--json", "--plot"])
@pytest.mark.parametrize("kind", ["tunnel", "link"])
@pytest.mark.parametrize(
    ("file", "why"),
    [("/no/such/file", "No such file or directory"), (".", "Is a directory"),
     ("/proc/version/x", "Not a directory")],
)  # fmt: skip
def test_a_file_that_cannot_be_written_is_said_first(
    kind: str,
    option: str,
    file: str,
    why: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(netns, "may_make_hosts", lambda: False)
    if option == "--plot":
        pytest.importorskip("matplotlib")
    assert cli.main(["bench", kind, option, file]) == 1
    assert capsys.readouterr().err == f"ttun: cannot write {file}: {why}\n"


def test_a_full_disk_is_a_line_that_names_the_file() -> None:
    with pytest.raises(TtunError, match="cannot write /dev/full: No space left on device"):
        report.write_json("/dev/full", {})


def test_a_report_is_json_also_without_a_figure(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    report.write_json(str(file), {"a": float("inf"), "b": [{"c": float("nan")}, (1.5, None, "x")]})
    assert json.loads(file.read_text()) == {"a": None, "b": [{"c": None}, [1.5, None, "x"]]}
    assert "Infinity" not in file.read_text()


def test_an_unknown_system_of_check_wheels_is_one_line() -> None:
    command = [sys.executable, str(ROOT / "packaging" / "check_wheels.py"), "debian-vax"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("debian-vax: choose from here, ")
