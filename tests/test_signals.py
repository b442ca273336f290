"""Signals: what each of them does, at every moment of a program, and whoever started it."""

from __future__ import annotations

import os
import pty
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tunnel import CLIENT, PROGRAM, ROOT, SERVER, Bench, Program, children, eventually

from ttun.lab import netns

ENDING = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
ENDING_LATER = [signal.SIGQUIT, signal.SIGALRM, signal.SIGUSR2, signal.SIGXCPU]
each_ending = pytest.mark.parametrize("number", ENDING, ids=lambda number: number.name)

HANG = """
import os, sys, time
def audit(event, arguments):
    if event == "import" and arguments[0] == "ttun.commands.parser":
        open(os.environ["LOADING"], "w").close()
        time.sleep(30)
sys.addaudithook(audit)
"""


def after(line: str) -> list[str]:
    """What to put before a command line, so that this has happened to its process before."""
    script = f"import os, signal, sys; {line}; os.execvp(sys.argv[1], sys.argv[1:])"
    return [sys.executable, "-c", script]


BLOCKED = after("signal.pthread_sigmask(signal.SIG_BLOCK, range(1, signal.NSIG))")
NO_CHILDREN = after("signal.signal(signal.SIGCHLD, signal.SIG_IGN)")
IGNORED = ["sh", "-c", "trap '' TERM INT HUP USR1; exec \"$@\"", "sh"]


@pytest.mark.parametrize("command", ["server", "genkey"])
@each_ending
def test_a_signal_while_it_is_loaded_ends_it_with_a_line(
    tmp_path: Path, number: signal.Signals, command: str
) -> None:
    (tmp_path / "sitecustomize.py").write_text(HANG)
    loading = tmp_path / "loading"
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "LOADING": str(loading)}
    process = subprocess.Popen(
        [*PROGRAM, command], env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    eventually(loading.exists, "it is being loaded")
    process.send_signal(number)
    said = process.communicate(timeout=10)[1]
    assert said == f"ttun: stopped by {number.name} while starting\n"
    assert process.returncode == (0 if command == "server" else 128 + number)


@each_ending
def test_a_signal_while_it_waits_for_its_key_ends_it_with_a_line(
    tmp_path: Path, number: signal.Signals
) -> None:
    key = tmp_path / "key"
    os.mkfifo(key, 0o600)
    command = [*PROGRAM, "server", "--psk-file", str(key)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    descriptors: list[int] = []

    def is_opened() -> bool:
        try:
            descriptors.append(os.open(key, os.O_WRONLY | os.O_NONBLOCK))
        except OSError:
            return False
        return True

    eventually(is_opened, "it reads the key")
    process.send_signal(number)
    said = process.communicate(timeout=10)[1]
    os.close(descriptors[0])
    assert (process.returncode, said) == (0, f"ttun: stopped by {number.name} while starting\n")


@pytest.fixture
def silent_resolver(plain: Bench) -> Iterator[tuple[list[str], socket.socket]]:
    """What to put before a command line, and the name server that it then asks in vain."""
    etc = plain.directory / "etc"
    etc.mkdir()
    (etc / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:20 attempts:1\n")
    (etc / "nsswitch.conf").write_text("hosts: files dns\n")
    script = f'mount --bind {etc} /etc && exec "$@"'
    host = CLIENT
    sock = plain.on(host, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    with sock:
        sock.bind(("127.0.0.1", 53))
        sock.settimeout(20)
        yield ["unshare", "--mount", "sh", "-c", script, "sh"], sock


@pytest.mark.hosts
@pytest.mark.parametrize("command", ["server -l no.such.example:5", "client -s no.such.example"])
@each_ending
def test_a_signal_ends_it_while_no_name_server_answers(
    plain: Bench, silent_resolver: tuple[list[str], socket.socket], number: signal.Signals,
    command: str,
) -> None:  # fmt: skip
    prefix, resolver = silent_resolver
    log = plain.directory / "log"
    with log.open("w") as file:
        process = plain.pair.start(
            CLIENT, [*prefix, *PROGRAM, *command.split(), "-k", "a key of sixteen"], stderr=file,
            environment=netns.environment(),
        )  # fmt: skip
    try:
        resolver.recv(1000)
        process.send_signal(number)
        assert process.wait(5) == 0
    finally:
        process.kill()
    last = log.read_text().splitlines()[-1]
    assert f"stopped by {number.name}" in last or f"{number.name}: stopping" in log.read_text()
    assert "Traceback" not in log.read_text()


@pytest.mark.hosts
@each_ending
def test_signals_that_were_blocked_end_it_all_the_same(
    plain: Bench, number: signal.Signals
) -> None:
    server = start(plain, BLOCKED)
    server.process.send_signal(signal.SIGUSR1)
    server.says("status: ")
    server.process.send_signal(number)
    assert server.ended() == 0
    assert server.log().splitlines()[-1].endswith(f" {number.name}: stopping")


def start(bench: Bench, prefix: list[str], *options: str, host: str = SERVER) -> Program:
    """Start a server, and wait until it listens."""
    log = bench.directory / "server.log"
    command = [*prefix, *PROGRAM, "server", "-k", "secret", *options]
    with log.open("w") as file:
        process = bench.pair.start(host, command, stderr=file, environment=netns.environment())
    server = Program(process, log)
    bench.ends.append(server)  # so that it is ended with the test
    server.says("listening on")
    runs(process.pid)
    return server


def runs(pid: int) -> None:
    """Wait until an end has all its threads: before them come its handlers."""
    eventually(lambda: len(os.listdir(f"/proc/{pid}/task")) >= 5, "its threads run")


@pytest.mark.hosts
def test_what_nohup_and_a_shells_background_job_ignore_stays_ignored_but_sigterm_ends(
    plain: Bench,
) -> None:
    server = start(plain, IGNORED)
    for number in (signal.SIGHUP, signal.SIGINT):
        server.process.send_signal(number)
    server.process.send_signal(signal.SIGUSR1)
    server.says("status: ")
    plain.client().says("authenticated")
    server.process.send_signal(signal.SIGTERM)
    assert server.ended() == 0
    assert "SIGTERM: stopping" in server.log()


@pytest.fixture
def said() -> Iterator[Path]:
    """A file that hooks can write, whoever they run as; /run is the tests' own."""
    with tempfile.TemporaryDirectory(dir="/run") as directory:
        os.chmod(directory, 0o777)
        yield Path(directory, "said")


@pytest.mark.hosts
def test_how_a_hook_ended_is_known_where_whoever_started_us_ignores_its_children(
    plain: Bench,
) -> None:
    server = start(plain, NO_CHILDREN, "--up", "exit 3")
    plain.client().says("authenticated")
    server.says("--up: exit code 3")


@pytest.mark.hosts
@pytest.mark.parametrize("number", [*ENDING, *ENDING_LATER])
def test_down_runs_when_a_signal_ends_it(plain: Bench, said: Path, number: signal.Signals) -> None:
    server = start(plain, [], "--down", f'echo "$TTUN_REASON" > {said}')
    plain.client()
    plain.answers()  # the session has begun on both ends
    server.process.send_signal(number)
    assert server.ended() == 0
    assert said.read_text() == "stopped\n"
    assert f"{number.name}: stopping" in server.log()


@pytest.mark.hosts
def test_down_runs_when_the_terminal_is_closed(plain: Bench, said: Path) -> None:
    """The kernel sends SIGHUP then, and nothing can be written there any more."""
    ours, theirs = pty.openpty()
    command = ["setsid", "--ctty", *PROGRAM, "server", "-k", "secret", "--down", f"echo > {said}"]
    server = subprocess.Popen(
        plain.pair.command(SERVER, command), stdin=theirs, stdout=theirs, stderr=theirs,
        env={**os.environ, **netns.environment()},
    )  # fmt: skip
    os.close(theirs)
    try:
        plain.client()
        plain.answers()
        os.close(ours)
        assert server.wait(10) == 0
    finally:
        server.kill()
    assert said.exists()


@pytest.mark.hosts
def test_more_signals_while_it_stops_change_nothing(plain: Bench) -> None:
    """Down to the moment when the process is gone."""
    server = start(plain, [], "--down", "sleep 1")
    plain.client()
    plain.answers()  # the session has begun on both ends
    server.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 20
    while server.process.poll() is None and time.monotonic() < deadline:
        for number in [*ENDING, signal.SIGUSR1, signal.SIGPIPE]:
            server.process.send_signal(number)
    assert server.ended() == 0
    assert server.log().count("stopping") == 1
    assert "Traceback" not in server.log()


@pytest.mark.hosts
def test_a_log_whose_reader_is_gone_is_no_end(plain: Bench) -> None:
    """Every line is an EPIPE, and SIGPIPE would be the end of any other program."""
    readable, writable = os.pipe()
    server = plain.pair.start(SERVER, [*PROGRAM, "server", "-k", "secret"], stderr=writable)
    os.close(writable)
    os.read(readable, 1)
    os.close(readable)
    try:
        plain.client().says("authenticated")
        plain.answers()
        server.send_signal(signal.SIGHUP)
        assert server.wait(10) == 0
    finally:
        server.kill()


@pytest.mark.hosts
@pytest.mark.tox
@pytest.mark.parametrize("prefix", [[], BLOCKED], ids=["as usual", "blocked"])
@each_ending
def test_tox_ends_the_same_way(
    plain: Bench, tmp_path: Path, number: signal.Signals, prefix: list[str]
) -> None:
    tox = Program(
        plain.pair.start(
            SERVER, [*prefix, *PROGRAM, "tox", "-s", "secret", "-C", str(tmp_path)],
            stderr=(tmp_path / "log").open("w"), environment=netns.environment(),
        ),
        tmp_path / "log",
    )  # fmt: skip
    plain.ends.append(tox)
    tox.says("Using Tox ID")
    tox.process.send_signal(number)
    assert tox.ended() == 0
    last = tox.log().splitlines()[-1]
    assert f"{number.name}: stopping" in last or f"stopped by {number.name}" in last


@pytest.mark.hosts
@pytest.mark.tox
def test_tox_answers_sigusr1_with_a_line_and_goes_on(plain: Bench, tmp_path: Path) -> None:
    tox = Program(
        plain.pair.start(
            SERVER, [*PROGRAM, "tox", "-s", "secret", "-C", str(tmp_path)],
            stderr=(tmp_path / "log").open("w"), environment=netns.environment(),
        ),
        tmp_path / "log",
    )  # fmt: skip
    plain.ends.append(tox)
    tox.says("Using Tox ID")

    def answers() -> bool:  # the first ones may come before it waits for them
        tox.process.send_signal(signal.SIGUSR1)
        return tox.log().count("status: not on the Tox network; no peers") >= 3

    eventually(answers, "three lines")

    def has_answered_all() -> bool:
        before = tox.log()
        time.sleep(0.5)
        return tox.log() == before

    eventually(has_answered_all, "no more lines")
    tox.process.send_signal(signal.SIGTERM)
    assert tox.ended() == 0
    assert "SIGTERM: stopping" in tox.log().splitlines()[-1]


AS_FIRST = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]


@pytest.fixture
def first() -> list[str]:
    """What makes a program process 1, as that of a container is."""
    if subprocess.run([*AS_FIRST, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("no namespace of processes can be made here")
    return AS_FIRST


@pytest.mark.hosts
@each_ending
def test_process_1_of_a_container_reaps_orphans_and_is_ended_by_signals(
    plain: Bench, first: list[str], number: signal.Signals
) -> None:
    log = plain.directory / "log"
    command = [*first, *PROGRAM, "server", "-k", "secret", "--up", "sleep 1 & sleep 1.5 & exit 3"]
    with log.open("w") as file:
        outside = plain.pair.start(SERVER, command, stderr=file, environment=netns.environment())
    server = Program(outside, log)
    try:
        server.says("listening on")
        (pid,) = children(outside.pid)
        runs(pid)
        plain.client().says("authenticated")
        eventually(lambda: len(children(pid)) == 2, "two orphans")
        eventually(lambda: children(pid) == {}, "they have ended, and none is a zombie")
        os.kill(pid, signal.SIGUSR1)
        server.says("status: ")
        os.kill(pid, number)
        assert server.ended() == 0
        assert f"{number.name}: stopping" in server.log()
        assert "exit code 3" in server.log(), "whoever runs the hook learns how it ended"
    finally:
        for pid in children(outside.pid):  # the death of its parent is nothing to another user's
            os.kill(pid, signal.SIGKILL)
        outside.kill()


@pytest.mark.hosts
def test_process_1_leaves_its_own_children_to_whoever_waits_for_them(first: list[str]) -> None:
    script = """if True:
        import os, subprocess, threading, time
        from pathlib import Path
        from ttun.process import process_group
        from ttun.process.signals import Signals
        assert os.getpid() == 1
        signals = Signals()
        codes, left = [], []
        def many():
            for number in range(40):
                start = process_group.start if number % 2 else subprocess.Popen
                child = start(["sh", "-c", f"sleep 0.02 & exit {number}"])
                time.sleep(0.02 * (number % 3))  # it has ended, and nobody has waited yet
                codes.append(child.wait())
            signals.wake()
        threading.Thread(target=many).start()
        assert signals.wait(60) == 0
        assert codes == list(range(40)), codes
        ours = process_group.start(["sh", "-c", "exit 5"])
        def one():
            assert process_group.start(["sh", "-c", "sleep 0.2 &"]).wait() == 0
            time.sleep(1)  # the orphan has ended, behind ours
            codes.append(ours.wait())  # no signal comes of that
            time.sleep(2)
            left.extend(p for p in Path("/proc").glob("[0-9]*") if p.name != "1")
            signals.wake()
        threading.Thread(target=one).start()
        assert signals.wait(60) == 0
        assert codes[-1] == 5, codes
        assert left == [], left
    """
    done = subprocess.run([*first, sys.executable, "-c", script], cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 0
