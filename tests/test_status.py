"""The status socket: where it is, who may ask, what is left of it, and what it lives through."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from impostor import line
from machine import IS_NOBODY_HERE
from tunnel import PROGRAM, SERVER, Bench, eventually

import ttun
from ttun.commands import query, runtime, status
from ttun.lab import netns
from ttun.privileges import User

SYSTEM = runtime.SYSTEM
another_user = pytest.mark.skipif(not IS_NOBODY_HERE, reason="no other user in this namespace")


@pytest.fixture(autouse=True)
def nothing_there() -> None:
    """What a test before this one killed has left its socket."""
    if os.path.ismount("/run"):  # the tests' own
        shutil.rmtree(SYSTEM, ignore_errors=True)


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The only directory that is looked into."""
    with tempfile.TemporaryDirectory(prefix="ttun-", dir="/tmp") as made:
        monkeypatch.setattr(runtime, "directories", lambda: [Path(made)])
        yield Path(made)


def sockets() -> list[Path]:
    """What is below /run/ttun and no directory."""
    return [path for path in SYSTEM.rglob("*") if not path.is_dir()]


@pytest.mark.hosts
def test_nothing_is_left_of_an_end_that_was_stopped_while_it_started(plain: Bench) -> None:
    """As soon as there is a socket, somebody ends the program."""
    for _ in range(5):
        server = plain.start(SERVER, "server", "-k", "secret")
        eventually(sockets, "a socket")
        assert server.stop() == 0
        assert sockets() == []


@pytest.mark.hosts
@pytest.mark.parametrize("user", [[], ["--user", "root"]], ids=["nobody", "root"])
def test_nothing_is_left_of_an_end_that_was_stopped_nor_of_one_that_was_killed(
    plain: Bench, user: list[str]
) -> None:
    server = plain.server(*user)
    path = server.socket()
    mode = path.stat().st_mode
    assert stat.S_ISSOCK(mode) and stat.S_IMODE(mode) == 0o600
    assert path.stat().st_uid == path.parent.stat().st_uid
    assert server.stop() == 0
    assert sockets() == []
    server = plain.server(*user)
    killed = server.socket()
    server.kill()
    assert sockets() == [killed]
    server = plain.server(*user)
    path = server.socket()
    eventually(lambda: sockets() == [path], "the next one removes what the killed one left")
    assert server.stop() == 0
    assert sockets() == []


@pytest.mark.hosts
def test_nothing_is_left_of_an_end_that_could_not_start(plain: Bench) -> None:
    """It may not become that user, which it finds out when the socket is there already."""
    prefix = ["setpriv", "--bounding-set=-setuid,-setgid", *PROGRAM]
    log = plain.directory / "failed.log"
    with log.open("w") as file:
        process = plain.pair.start(
            SERVER, [*prefix, "server", "-k", "secret", "--user", "daemon"], stderr=file
        )
    assert process.wait(20) == 1
    assert "cannot switch to user daemon" in log.read_text()
    assert sockets() == []


@pytest.mark.hosts
def test_an_umask_does_not_keep_a_user_from_its_directory(plain: Bench) -> None:
    command = ["sh", "-c", 'rm -rf /run/ttun; umask 077; exec "$@"', "sh", *PROGRAM]
    log = plain.directory / "umask.log"
    with log.open("w") as file:
        process = plain.pair.start(SERVER, [*command, "server", "-k", "secret"], stderr=file)
    try:
        eventually(sockets, "it answers")
        modes = {stat.S_IMODE(path.stat().st_mode) for path in (SYSTEM, *SYSTEM.rglob("*"))}
        assert modes == {0o755, 0o600}
    finally:
        process.terminate()
        assert process.wait(10) == 0
    assert sockets() == []


@pytest.fixture
def foreign() -> Iterator[User]:
    """/run/ttun belongs to a user, as it does to a service's with RuntimeDirectory=ttun."""
    entry = pwd.getpwnam("daemon")
    subprocess.run(["rm", "-rf", SYSTEM], check=True)
    SYSTEM.mkdir(mode=0o755)
    os.chown(SYSTEM, entry.pw_uid, entry.pw_gid)
    yield User(entry.pw_name, entry.pw_uid, entry.pw_gid)
    subprocess.run(["rm", "-rf", SYSTEM], check=True)


@pytest.mark.hosts
@another_user
def test_root_leaves_alone_what_is_in_a_directory_of_another(plain: Bench, foreign: User) -> None:
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(SYSTEM / "ttun9.1.sock"))
    dead.close()
    (SYSTEM / "file.sock").touch()
    server = plain.server()
    assert server.status()["role"] == "server"
    assert {path.name for path in SYSTEM.iterdir()} == {"ttun9.1.sock", "file.sock", "65534"}
    assert server.stop() == 0
    assert {path.name for path in sockets()} == {"ttun9.1.sock", "file.sock"}


@pytest.mark.hosts
@another_user
@pytest.mark.parametrize("what", ["link", "directory", "file", "root's directory"])
def test_root_does_not_write_where_the_owner_of_the_directory_leads(
    plain: Bench, foreign: User, tmp_path: Path, what: str
) -> None:
    planted = SYSTEM / "65534"
    victim = tmp_path / "victim"
    victim.mkdir(mode=0o700)
    (victim / "kept").touch()
    if what == "link":
        planted.symlink_to(victim)
    elif what == "directory":
        planted.mkdir()
        os.chown(planted, foreign.uid, foreign.gid)
    elif what == "file":
        planted.touch()
    else:
        planted.mkdir(mode=0o700)
        (planted / "kept").touch()
    before = planted.lstat()
    server = plain.server()
    server.says("dropped privileges")
    after = planted.lstat()
    assert (before.st_mode, before.st_uid) == (after.st_mode, after.st_uid)
    assert os.listdir(victim) == ["kept"] and victim.stat().st_uid == 0
    if planted.is_dir() and not planted.is_symlink():
        assert os.listdir(planted) in ([], ["kept"])
    assert server.stop() == 0


@pytest.mark.hosts
@another_user
def test_who_is_not_root_cannot_be_taken_for_a_tunnel_of_root(plain: Bench, foreign: User) -> None:
    """Not even another process of the user that such a tunnel became."""
    server = plain.server()
    path = server.socket()
    server.process.send_signal(signal.SIGSTOP)
    path.unlink()
    script = (
        "import os, socket, sys; os.setgid(65534); os.setuid(65534)\n"
        "listener = socket.socket(socket.AF_UNIX); listener.bind(sys.argv[1]); listener.listen()\n"
        "print('ready', flush=True); asking, _ = listener.accept()\n"
        "asking.sendall(sys.argv[2].encode()); asking.close()\n"
    )
    plain.helper(SERVER, sys.executable, "-c", script, str(path), line().decode())
    out = plain.run(SERVER, *PROGRAM, "show")
    assert out.startswith("ttun0: server, user nobody\n")
    server.kill()


def test_a_place_that_cannot_be_written_to_is_a_line(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(runtime, "directories", lambda: [home / "missing" / "deeper"])
    caplog.set_level("INFO", "ttun")
    silent = status.StatusSocket("ttun0")
    silent.serve(lambda: pytest.fail("nobody can ask"))
    assert silent.patience(None) is None and silent.patience(7.0) == 7.0
    silent.close()
    assert f"cannot listen in {home}/missing/deeper: No such file or directory" in caplog.text


def test_a_long_path_is_no_trouble(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = home / ("x" * 200)
    monkeypatch.setattr(runtime, "directories", lambda: [deep])
    with answering("ttun0"):
        (path,) = deep.iterdir()
        assert len(str(path)) > 108
        (tunnel,) = query.ask([deep]).tunnels
        assert tunnel["pid"] == os.getpid()
    assert list(deep.iterdir()) == []


def test_what_systemd_made_for_a_unit_comes_first(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "SYSTEM", home)
    unit = home / "ttun-server@office.sock"
    unit.mkdir()
    monkeypatch.setenv("RUNTIME_DIRECTORY", f"/run/other:{unit}")
    with answering("ttun0"):
        assert [path.name for path in unit.iterdir()] == [f"ttun0.{os.getpid()}.sock"]
        assert len(query.ask([home]).tunnels) == 1, "whatever the unit's name is"
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/run/other")
    with answering("ttun0"):
        assert (home / f"ttun0.{os.getpid()}.sock").exists(), "where ttun show looks"


@contextlib.contextmanager
def answering(device: str) -> Iterator[status.StatusSocket]:
    """A socket that says what a server is doing which was not started."""
    made = status.StatusSocket(device)
    made.serve(ttun.Server(b"key").status)
    yield made
    made.close()


def test_a_name_that_is_taken_by_another_namespace_is_no_trouble(home: Path) -> None:
    with answering("ttun0"), answering("ttun0"):
        assert len(list(home.iterdir())) == 2
        assert len(query.ask([home]).tunnels) == 2
    assert list(home.iterdir()) == []


def test_askers_that_read_nothing_hold_nobody_up(home: Path) -> None:
    with answering("ttun0"):
        (path,) = home.iterdir()
        silent = []
        for _ in range(300):
            silent.append(socket.socket(socket.AF_UNIX))
            silent[-1].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            silent[-1].connect(str(path))
        for _ in range(300):
            assert len(query.ask([home]).tunnels) == 1
        for sock in silent:
            sock.close()


LACKING = """
import logging, os, resource, socket, sys, threading
import ttun
from pathlib import Path
from ttun.commands import query, runtime, status
logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.INFO)
home = Path(sys.argv[1])
runtime.directories = lambda: [home]
made = status.StatusSocket("ttun0")
endpoint = ttun.Server(b"key")
def say(word):
    print(word, flush=True)
    sys.stdin.readline()
"""
NO_DESCRIPTORS = """
taken = []
resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))
try:
    while True:
        taken.append(os.dup(2))
except OSError:
    made.serve(endpoint.status)
    say("none")
for descriptor in taken:
    os.close(descriptor)
say("some")
made.close()
"""
NO_THREADS = """
os.setgid(65534), os.setuid(65534)
hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
resource.setrlimit(resource.RLIMIT_NPROC, (1, hard))
made.serve(endpoint.status)
made.serve(endpoint.status)
assert made.patience(None) == status.RETRY and made.patience(0.5) == 0.5
say("none")
resource.setrlimit(resource.RLIMIT_NPROC, (hard, hard))
made.serve(endpoint.status)
assert made.patience(None) is None
say("some")
made.close()
"""


class Lacking:
    """A program that answers, and lacks something until it is told to go on."""

    def __init__(self, script: str, home: Path) -> None:
        self.log = home.with_name(home.name + ".log")
        self.process = subprocess.Popen(
            [sys.executable, "-c", LACKING + script, home], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self.log.open("w"), text=True,
            env={**os.environ, **netns.environment()},
        )  # fmt: skip

    def says(self, word: str) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == word + "\n", self.log.read_text()

    def goes_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def processor_time(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_lack_of_descriptors_passes(home: Path) -> None:
    program = Lacking(NO_DESCRIPTORS, home)
    program.says("none")
    (path,) = home.iterdir()
    time.sleep(1)
    assert program.log.read_text() == "", "nobody asks"
    before = program.processor_time()
    silent = [socket.socket(socket.AF_UNIX) for _ in range(300)]
    for sock in silent:
        sock.setblocking(False)
        sock.connect_ex(str(path))
    time.sleep(2)
    assert program.processor_time() - before < 1, "it does not spin"
    assert query.ask([home], 0.5).tunnels == []
    program.goes_on()
    program.says("some")
    eventually(lambda: query.ask([home]).tunnels, "it answers again", 5)
    program.goes_on()
    assert program.process.wait(10) == 0
    said = program.log.read_text()
    assert said == "cannot answer ttun show: Too many open files\n"
    assert list(home.iterdir()) == []


@another_user
@pytest.mark.hosts
def test_a_lack_of_threads_passes(home: Path) -> None:
    home.chmod(0o777)
    program = Lacking(NO_THREADS, home)
    program.says("none")
    assert query.ask([home], 0.5).tunnels == []
    program.goes_on()
    program.says("some")
    assert len(query.ask([home]).tunnels) == 1
    program.goes_on()
    assert program.process.wait(10) == 0
    said = program.log.read_text()
    assert said.count("cannot answer ttun show: can't start new thread") == 1
    assert list(home.iterdir()) == []
