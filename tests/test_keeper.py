"""The keeper: it runs what it was told at its start, whatever is asked of it, and ends in time."""

from __future__ import annotations

import array
import contextlib
import errno
import functools
import os
import pty
import pwd
import random
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine import IS_NOBODY_HERE, threads
from test_hooks import running
from tunnel import CLIENT, PROGRAM, ROOT, SERVER, TUNNEL4, Bench, Program, children, eventually

from ttun import privileges
from ttun.commands.hooks import Hooks
from ttun.errors import TtunError
from ttun.process import keeper as module
from ttun.process.keeper import Keeper, parse, via
from ttun.process.process_group import becoming

other_users = pytest.mark.skipif(not IS_NOBODY_HERE, reason="no other user in this user namespace")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
ENVIRONMENT = {"PATH", "PWD", "OLDPWD", "SHLVL", "_"}  # all but the first by some shell


@pytest.fixture
def keeper() -> Iterator[Keeper]:
    made = Keeper()
    yield made
    made.close()


@pytest.fixture
def said() -> Iterator[Path]:
    """A file for commands to write to, as whoever they run as."""
    place = "/run" if os.access("/run", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place) as directory:
        os.chmod(directory, 0o777)
        yield Path(directory, "said")


@pytest.fixture
def nap() -> Iterator[str]:
    """How long to sleep, in a way that no other process does; who still sleeps is killed."""
    seconds = f"2{random.randrange(10**8):08}.5"
    yield seconds
    for pid in running(seconds):
        os.kill(pid, signal.SIGKILL)


def process(made: Keeper) -> int:
    assert made._process is not None
    return made._process.pid


def keeper_of(pid: int) -> int:
    """The keeper of a program."""

    def found() -> list[int]:
        lines = {child: Path(f"/proc/{child}/cmdline").read_bytes() for child in children(pid)}
        return [child for child, line in lines.items() if b"process.keeper" in line]

    return eventually(found, f"a keeper of {pid}")[0]


def is_gone(pid: int) -> bool:
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True


def descriptors(pid: int) -> list[str]:
    found = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(os.readlink(path))
    return found


def received(sock: socket.socket) -> bytes:
    """All that comes, to its end."""
    sock.settimeout(20)
    data = b""
    while part := sock.recv(4096):
        data += part
    return data


def dialled(made: Keeper, host: str = "", port: str = "") -> bytes:
    """What a command of --via writes, to its end."""
    sock, stderr = made.dial(host, port)
    os.close(stderr)
    with sock:
        return received(sock)


# ---- --hook-user, with a whole tunnel ----

END_TO_END = pytest.mark.parametrize("bench", ["x1"], indirect=True)


@pytest.mark.hosts
@END_TO_END
def test_hooks_of_root_run_as_root_with_a_fixed_environment(bench: Bench, said: Path) -> None:
    up = f"(id -u; env) > {said}; grep Cap /proc/self/status >> {said}"
    server = bench.start(
        SERVER, "server", "-k", "secret", "--hook-user", "root", "--up", up,
        "--down", f"echo down $TTUN_DEVICE, $TTUN_REASON >> {said}",
        environment={"TTUN_PSK": "a secret", "LD_PRELOAD": "", "ENV": "/evil"},
    )  # fmt: skip
    server.says("listening on")
    client = bench.client()
    client.says("authenticated")
    text = eventually(
        lambda: said.exists() and "CapAmb" in said.read_text() and said.read_text(), ""
    )
    first, *lines = text.splitlines()
    assert first == "0"
    variables = dict(line.split("=", 1) for line in lines if "=" in line)
    facts = {name: value for name, value in variables.items() if name.startswith("TTUN_")}
    assert set(variables) - set(facts) <= ENVIRONMENT
    assert variables["PATH"] == module.PATH
    assert facts.pop("TTUN_PEER").startswith("192.0.2.2:")
    assert facts == {
        "TTUN_ROLE": "server", "TTUN_DEVICE": "ttun0", "TTUN_TRANSPORT": "tcp", "TTUN_WIRE": "x1",
        "TTUN_CIPHER": bench.cipher, "TTUN_LOCAL4": "10.1.1.1/30", "TTUN_LOCAL6": "fc11::1/126",
    }  # fmt: skip
    assert int(re.search(r"CapEff:\s+(\w+)", text)[1], 16) != 0  # type: ignore[index]
    for thread in threads(server.process.pid):
        assert int(thread["CapPrm"], 16) == 0, "the program itself has none left"
    client.stop()
    eventually(lambda: "down ttun0, the peer closed" in said.read_text(), "--down ran")
    pid = keeper_of(server.process.pid)
    assert server.stop() == 0
    assert is_gone(pid)


@pytest.mark.hosts
@END_TO_END
def test_after_kill_9_the_keeper_runs_down_removes_the_status_socket_and_ends(
    bench: Bench, said: Path, nap: str
) -> None:
    server = bench.server(
        "--hook-user", "root", "--up", f"sleep {nap} & echo up > {said}",
        "--down", f"echo down $TTUN_PEER >> {said}",
    )  # fmt: skip
    bench.client().says("authenticated")
    eventually(lambda: said.exists() and running(nap), "--up ran")
    pid = keeper_of(server.process.pid)
    path = server.socket()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # of a terminal, of systemd
        os.kill(pid, number)
    time.sleep(0.3)
    assert not is_gone(pid), "it ends with the program, not by signals"
    server.kill()
    eventually(lambda: is_gone(pid), "the keeper has ended")
    assert said.read_text().startswith("up\ndown 192.0.2.2:")
    assert running(nap) == []
    assert not path.exists()


@pytest.mark.hosts
@END_TO_END
def test_without_its_keeper_a_tunnel_goes_on_and_says_so_once(bench: Bench) -> None:
    server = bench.server("--hook-user", "root", "--up", "true", "--down", "true")
    server.status()
    os.kill(keeper_of(server.process.pid), signal.SIGKILL)
    client = bench.client()
    client.says("authenticated")
    bench.answers()
    assert bench.ping(CLIENT, TUNNEL4[SERVER], 3) == 3
    client.stop()
    bench.client().says("authenticated")
    server.says("authenticated", times=2)
    assert server.log().count("the keeper process ended") == 1
    assert server.stop() == 0


def memory(pid: int) -> bytes:
    """What is in a process's memory, as far as it can be written."""
    found = b""
    with open(f"/proc/{pid}/mem", "rb", 0) as file:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            if line.split()[1].startswith("rw"):
                start, end = (int(number, 16) for number in line.split()[0].split("-"))
                with contextlib.suppress(OSError):
                    file.seek(start)
                    found += file.read(end - start)
    return found


@pytest.mark.hosts
@END_TO_END
@pytest.mark.parametrize("how", ["-k", "TTUN_PSK"])
def test_no_key_is_in_the_memory_of_the_keeper(bench: Bench, how: str) -> None:
    key = "the-key-that-nobody-finds-there"
    given, environment = (["-k", key], {}) if how == "-k" else ([], {how: key})
    server = bench.start(
        SERVER, "server", *given, "--hook-user", "root", "--up", "true", environment=environment
    )
    server.says("listening on")
    pid = keeper_of(server.process.pid)
    assert key.encode() in memory(server.process.pid), "else it is not looked for in the right way"
    assert key.encode() not in memory(pid)
    for name in ("cmdline", "environ"):
        assert key.encode() not in Path(f"/proc/{pid}/{name}").read_bytes()


@pytest.mark.hosts
@END_TO_END
def test_a_keeper_has_few_descriptors_and_there_is_none_without_need(bench: Bench) -> None:
    plain = bench.server("--up", "true", "--hook-user", "root")
    plain.status()
    pid = keeper_of(plain.process.pid)
    log, stdin, control, directory = bench.ends[-1].path, "pipe:", "socket:", "/run/ttun"
    kinds = [str(log), stdin, control, directory]
    for name in descriptors(pid):
        assert any(name.startswith(kind) for kind in kinds), name
    assert Path(f"/proc/{pid}/limits").read_text().split("core file size")[1].split()[0] == "0"
    plain.stop()
    for options in (("--up", "true"), ("--hook-user", "root")):
        server = bench.server(*options)
        server.status()
        assert children(server.process.pid) == {}
        server.stop()


@pytest.mark.hosts
@other_users
@END_TO_END
def test_hooks_can_be_those_of_another_user_with_its_groups(bench: Bench, said: Path) -> None:
    server = bench.server("--hook-user", "daemon", "--up", f"id -u > {said}; id -G >> {said}")
    bench.client().says("authenticated")
    entry = pwd.getpwnam("daemon")
    groups = os.getgrouplist("daemon", entry.pw_gid)
    eventually(lambda: said.exists() and said.read_text().count("\n") == 2, "it ran")
    number, *found = said.read_text().split()
    assert (int(number), set(map(int, found))) == (entry.pw_uid, set(groups))
    assert server.stop() == 0


NO_ROOT = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups",
           "--inh-caps", "-all,+net_admin", "--ambient-caps", "+net_admin"]  # fmt: skip


@other_users
@as_root
def test_who_cannot_become_the_user_of_hooks_says_so_and_does_not_start() -> None:
    command = [*NO_ROOT, *PROGRAM, "server", "-k", "secret", "--hook-user", "root", "--up", "true"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "cannot run --up and --down as root: " in done.stderr


def runs_for_all(python: str) -> bool:
    """Whether a Python can be started by a user that is not root: root's own cannot."""
    start = (
        "import subprocess, sys, cffi, nacl; subprocess.run([sys.executable, '-c', ''], check=True)"
    )
    done = subprocess.run(
        [*NO_ROOT, python, "-c", start], capture_output=True, env=paths(), check=False
    )
    return done.returncode == 0


def paths() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}


@pytest.mark.hosts
@other_users
@END_TO_END
def test_hooks_of_a_user_with_one_capability_keep_that_one(bench: Bench, said: Path) -> None:
    """What replaces root under a service manager that gives CAP_NET_ADMIN alone."""
    pythons = [each for each in (sys.executable, "/usr/bin/python3") if runs_for_all(each)]
    if not pythons:
        pytest.skip("no Python here that another user may start")
    log = bench.directory / "ambient.log"
    options = ["--hook-user", "65534", "--up", f"grep CapEff /proc/self/status > {said}"]
    with log.open("w") as file:
        started = bench.pair.start(
            SERVER, [*NO_ROOT, pythons[0], "-m", "ttun", "server", "-k", "secret", *options],
            stderr=file, environment=paths(),
        )  # fmt: skip
    server = Program(started, log)
    try:
        server.says("listening on")
        bench.client().says("authenticated")
        eventually(lambda: said.exists() and said.read_text().endswith("\n"), "it ran")
        assert int(said.read_text().split()[1], 16) == 1 << privileges.NET_ADMIN
        environ = f"/proc/{keeper_of(started.pid)}/environ"
        assert os.stat(environ).st_uid == 0, "it is not dumpable"
    finally:
        assert server.stop() == 0


# ---- what is asked of it ----


def test_a_command_of_root_cannot_be_had_without_being_root(keeper: Keeper) -> None:
    root = privileges.User("root", 0, 0)
    assert privileges.can_be(root) == (os.geteuid() == 0)
    if os.geteuid() == 0:
        assert becoming(root) == {}


def test_at_the_end_it_does_what_it_was_told_to_at_its_start(
    keeper: Keeper, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("first", "second"):
        keeper.at_end.append(functools.partial(os.mkdir, str(tmp_path / name)))
        keeper.at_end.append(functools.partial(os.rmdir, "/"))
    keeper.at_end.append(functools.partial(os.unlink, str(tmp_path / "nothing")))
    directory = os.open(tmp_path, os.O_RDONLY)
    (tmp_path / "entry").touch()
    keeper.start({}, ("entry", directory))
    assert list(tmp_path.iterdir()) == [tmp_path / "entry"]
    pid = process(keeper)
    os.close(directory)
    keeper.close()
    assert is_gone(pid)
    assert {path.name for path in tmp_path.iterdir()} == {"first", "second"}
    assert capfd.readouterr().err.count("keeper: at the end: ") == 2


def test_what_hangs_at_the_end_does_not_hold_it(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    keeper.at_end += [functools.partial(time.sleep, 600)]
    monkeypatch.setattr(module, "START_CODE", LIMITED)
    keeper.start({})
    pid = process(keeper)
    started = time.monotonic()
    keeper.close()
    assert is_gone(pid)
    assert time.monotonic() - started < 20


LIMITED = module.START_CODE.replace("main({})", "main.__globals__.update(AT_END=1)\nmain({})")


@pytest.mark.parametrize("code", ["raise SystemExit(3)", "import time; time.sleep(600)"])
def test_a_keeper_that_does_not_start_is_one_line(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    monkeypatch.setattr(module, "START_CODE", code + "  # {} {}")
    monkeypatch.setattr(module, "START", 1.0)
    monkeypatch.setattr(module, "AT_END", 0)
    keeper.at_end.append(os.getpid)
    with pytest.raises(TtunError, match="cannot start the keeper process: "):
        keeper.start({})
    assert keeper._process is not None
    keeper._process.kill()


def test_messages_are_checked_by_their_form() -> None:
    assert parse(b"up\0peer=[2001:db8::1%eth0]:20203\0wire=x1") == (
        "up", {"peer": "[2001:db8::1%eth0]:20203", "wire": "x1"}
    )  # fmt: skip
    assert parse("down\0reason=weg: größer".encode()) == ("down", {"reason": "weg: größer"})
    for good in (b"dial\0number=1\0host=fe80::1%eth0\0port=65535", b"dial\0number=1\0host=\0port="):
        parse(good)
    for wrong in (
        b"", b"\0", b"UP", b"run", b"up\0", b"up\0peer", b"up\0device=eth0", b"up\0local4=10.0.0.1",
        b"up\0peer=a;b", b"up\0peer=$(b)", b"up\0peer=`b`", b"up\0peer=a\nb", b"up\0peer=*",
        b"up\0peer=" + b"a" * 256, b"up\0peer=\xff", "up\0peer=é".encode(), b"up\0wire=x2",
        b"up\0wire=x1\0wire=x1", b"down\0reason=\x1b[31m", b"down\0reason=a\nb", b"up\0cipher=A",
        b"down\0reason=" + b"a" * 257, b"dial\0number=1\0host=-oProxyCommand=x", b"hangup\0port=1",
        b"dial\0number=1\0host=a b", b"dial\0number=1\0port=65536", b"dial\0number=1\0port=0",
        b"dial\0number=1\0port=-1", b"dial\0number=x", "dial\0number=1\0port=\u0661".encode(),
        b"dial\0number=1\0host=" + b"a" * 256, b"dial\0number=1\0host=a\n", bytes(5000),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"."):
            parse(wrong)


def test_a_dial_fills_in_host_and_port_and_no_more(keeper: Keeper, said: Path) -> None:
    keeper.via = via("echo '%h' '%p' '%%h' %x; echo %h > /dev/null", None)
    keeper.start({})
    assert dialled(keeper, "fe80::1%eth0", "22") == b"fe80::1%eth0 22 %h %x\n"
    assert dialled(keeper) == b"  %h %x\n"
    for host, port in (
        (f"$(touch {said})", ""),
        ("-o", "1"),
        ("a b", "1"),
        ("a", "70000"),
        ("a", "x"),
    ):
        with pytest.raises(OSError, match="cannot dial: malformed"):
            keeper.dial(host, port)
    assert not said.exists()


def test_a_dial_relays_both_ways_and_gives_its_stderr(keeper: Keeper) -> None:
    keeper.via = via("echo ready >&2; cat", None)
    keeper.start({})
    sock, stderr = keeper.dial("host", "1")
    assert os.get_inheritable(sock.fileno()) is os.get_inheritable(stderr) is False
    with sock, open(stderr, "rb") as lines:
        assert lines.readline() == b"ready\n"
        data = os.urandom(1 << 16)
        sock.settimeout(20)
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        assert received(sock) == data


def test_the_group_of_a_dial_ends_with_a_hangup_the_next_dial_or_the_program(
    keeper: Keeper, nap: str
) -> None:
    keeper.via = via(f"trap '' TERM; sleep {nap} & (sleep {nap}; true) & wait", None)
    keeper.start({})

    def again() -> None:
        sock, stderr = keeper.dial("", "")
        os.close(stderr)
        sock.close()

    for end in (keeper.hang_up, again, keeper.close):
        sock, stderr = keeper.dial("", "")
        os.close(stderr)
        before = eventually(lambda: len(running(nap)) >= 2 and running(nap), "it runs")
        end()
        eventually(lambda before=before: not {*before} & {*running(nap)}, "all of it has ended")
        with sock:
            assert received(sock) == b""
    assert running(nap) == []


def test_a_command_that_ends_ends_the_connection_and_what_it_left(
    keeper: Keeper, nap: str, capfd: pytest.CaptureFixture[str]
) -> None:
    keeper.via = via(f"sleep {nap} & sleep 0.2; exit 7", None)
    keeper.start({})
    assert dialled(keeper) == b""
    eventually(lambda: running(nap) == [], "the rest of it ended")
    keeper.close()
    assert "--via: exit code 7" in capfd.readouterr().err


def test_what_cannot_be_started_is_an_error_with_its_reason_and_the_next_dial_works(
    keeper: Keeper,
) -> None:
    """Here for lack of descriptors, which the keeper has as many of as the program had."""
    keeper.via = via("echo here", None)
    keeper.start({})
    pid = process(keeper)
    most = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (len(descriptors(pid)), most[1]))
    with pytest.raises(OSError, match="open files") as raised:
        keeper.dial("", "")
    assert raised.value.errno == errno.EMFILE
    resource.prlimit(pid, resource.RLIMIT_NOFILE, most)
    assert dialled(keeper) == b"here\n"


def test_without_room_for_its_descriptors_here_a_dial_is_an_error_and_keeps_none(
    keeper: Keeper,
) -> None:
    keeper.via = via("echo here", None)
    keeper.start({})
    usual = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = [os.open("/dev/null", os.O_RDONLY)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (used[0] + 2, usual[1]))
    try:
        for _ in range(5):  # one of the two has room
            with pytest.raises(OSError, match="Too many open files"):
                keeper.dial("", "")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, usual)
        os.close(used[0])
    assert dialled(keeper) == b"here\n"


def test_a_dial_of_a_dead_or_stopped_keeper_has_an_end(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper.via = via("echo here", None)
    keeper.start({})
    monkeypatch.setattr(module, "DIAL", 0.5)
    os.kill(process(keeper), signal.SIGSTOP)
    with pytest.raises(OSError, match="does not answer"):
        keeper.dial("", "")
    os.kill(process(keeper), signal.SIGCONT)
    monkeypatch.setattr(module, "DIAL", 20)
    assert dialled(keeper) == b"here\n", "and not the late answer to the first one"
    os.kill(process(keeper), signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(OSError, match="the keeper process ended"):
            keeper.dial("", "")


WHO = "id -u; id -g; id -G; env; grep -E 'NoNewPrivs|CapEff' /proc/self/status"


@as_root
@other_users
def test_under_sudo_a_dial_is_the_callers(keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = pwd.getpwnam("daemon")
    monkeypatch.setenv("SUDO_UID", str(entry.pw_uid))
    monkeypatch.setenv("SUDO_GID", str(entry.pw_gid))
    monkeypatch.setenv("SSH_AUTH_SOCK", "/tmp/agent")
    monkeypatch.setenv("TTUN_PSK", "a secret")
    keeper.via = via(WHO, privileges.find_user("nobody"))
    keeper.start({})
    text = dialled(keeper).decode()
    uid, gid, groups, *lines = text.splitlines()
    assert (int(uid), int(gid)) == (entry.pw_uid, entry.pw_gid)
    assert set(map(int, groups.split())) == set(os.getgrouplist("daemon", entry.pw_gid))
    variables = dict(line.split("=", 1) for line in lines if "=" in line)
    assert variables["HOME"] == entry.pw_dir
    assert variables["USER"] == variables["LOGNAME"] == "daemon"
    assert variables["SSH_AUTH_SOCK"] == "/tmp/agent"
    assert "SUDO_UID" not in variables
    assert "secret" not in text
    assert re.search(r"CapEff:\s+0+$", text, re.M)
    assert re.search(r"NoNewPrivs:\s+0$", text, re.M), "sudo in a command of the caller works"


@as_root
@other_users
@pytest.mark.parametrize("caller", [None, "0"])
@pytest.mark.parametrize("user", ["nobody", "root"])
def test_without_sudo_a_dial_is_that_of_user_without_capabilities(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch, user: str, caller: str | None
) -> None:
    monkeypatch.delenv("SUDO_UID", raising=False)
    if caller is not None:
        monkeypatch.setenv("SUDO_UID", caller)
    keeper.via = via(WHO, privileges.find_user(user))
    keeper.start({})
    text = dialled(keeper).decode()
    assert int(text.splitlines()[0]) == pwd.getpwnam(user).pw_uid
    assert re.search(r"CapEff:\s+0+$", text, re.M)
    assert re.search(r"NoNewPrivs:\s+1$", text, re.M)


def test_a_command_finds_the_signals_and_descriptors_of_a_normal_program(keeper: Keeper) -> None:
    keeper.via = via("grep Sig /proc/self/status; ls /proc/self/fd; ps -o pgid=,sid= -p $$", None)
    keeper.start({})
    text = dialled(keeper).decode()
    assert re.search(r"SigBlk:\s+0+$", text, re.M)
    *numbers, groups = text.split("SigCgt:")[1].splitlines()[1:]
    assert set(numbers) == {"0", "1", "2", "3"}, "3 is that of ls"
    group, session = map(int, groups.split())
    assert group not in (os.getpgrp(), session)
    assert session == os.getsid(0), "or ssh could ask nothing of the terminal"


# ---- taken over: a program that speaks to it as it likes ----


def mutated(chance: random.Random, message: bytes) -> bytes:
    data = bytearray(message)
    for _ in range(chance.randint(1, 4)):
        how, place = chance.randrange(5), chance.randrange(len(data) + 1)
        if how == 0:
            data[place:place] = chance.choice(ODD)
        elif how == 1:
            del data[place : place + chance.randint(1, 8)]
        elif how == 2 and data:
            data[place % len(data)] = chance.randrange(256)
        elif how == 3:
            data[place:place] = data[: chance.randint(0, 40)]
        else:
            data += b"\0" + chance.choice(FACTS)
    return bytes(data)


FACTS = [
    b"peer=192.0.2.1:20203", b"peer=[2001:db8::1]:20203", b"wire=x1", b"cipher=aegis-256",
    b"transport=tcp", b"reason=the peer closed the connection", b"device=eth0", b"local4=10.0.0.1",
    b"host=example.net", b"port=22", b"number=1", b"command=id", b"path=/bin/sh", b"user=root",
    b"up=id", b"hooks=id", b"LD_PRELOAD=/tmp/x", b"PATH=/tmp", b"__class__=x", b"=", b"",
]  # fmt: skip
SEEDS = [
    b"up\0peer=192.0.2.1:20203\0transport=tcp\0wire=x1\0cipher=aegis-256",
    b"down\0peer=192.0.2.1:20203\0wire=x1\0reason=the peer closed the connection",
    b"hangup", b"background", b"run\0command=id", b'{"do": "up", "command": "id"}', b"",
]  # fmt: skip
DIAL = b"dial\0number=7\0host=example.net\0port=22"
ODD = [
    b"\0",
    b"\n",
    b"\xff",
    b"=",
    b"%h",
    b"%p",
    b"'",
    b'"',
    b"\\",
    b"../..",
    b"-",
    b"\x1b[31m",
    bytes(99),
]


@pytest.mark.slow
def test_a_hundred_thousand_messages_of_a_program_taken_over_do_no_harm(
    keeper: Keeper, said: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """No command but the fixed ones runs, no descriptor and no memory is kept, and it answers."""
    evil = said.with_name("evil")
    for shell in (f"$(touch {evil})", f"`touch {evil}`", f";touch {evil};", f"'\n touch {evil} #"):
        ODD.append(shell.encode())
    ran = said.with_name("ran")
    keeper.hooks = functools.partial(
        Hooks, f"eval : $TTUN_PEER; echo up >> {said}", f"echo down $TTUN_DEVICE >> {said}"
    )
    keeper.via = via(f"echo '%h' >> {ran}; cat", None)
    keeper.start({"device": "ttun0", "role": "server"})
    pid, sock = process(keeper), keeper._socket
    assert sock is not None
    sock_of_dial, stderr = keeper.dial("first", "1")
    os.close(stderr)
    sock_of_dial.close()
    keeper.hang_up()
    time.sleep(0.5)
    before = sorted(descriptors(pid))
    chance = random.Random(int(os.environ.get("TTUN_TEST_SEED", "1")))
    memory_before, dials = 0, 0
    given = os.open("/dev/null", os.O_RDONLY)

    def drain() -> None:
        room = socket.CMSG_LEN(64)
        with contextlib.suppress(BlockingIOError):
            while True:
                _, came, _, _ = sock.recvmsg(4096, room, socket.MSG_DONTWAIT)
                for _, _, data in came:
                    for descriptor in array.array("i", data):
                        os.close(descriptor)

    for number in range(100_000):
        kind = chance.randrange(100)
        if kind == 0:
            message = mutated(chance, DIAL) if number % 10 else DIAL
            dials += 1
        elif kind < 30:
            message = chance.randbytes(chance.choice((0, 1, 10, 200, module.MOST, 9000)))
        elif kind < 40:
            message = chance.choice(SEEDS) + b"\0" + b"\0".join(chance.sample(FACTS, 3))
        else:
            message = mutated(chance, chance.choice(SEEDS))
        if kind % 10 == 5:
            socket.send_fds(sock, [message or b"x"], [given] * chance.randint(1, 5))
        else:
            sock.send(message)
        if number % 100 == 0:
            drain()
        if number == 20_000:
            memory_before = resident(pid)
    os.close(given)
    drain()
    keeper.hang_up()
    eventually(lambda: (drain(), sorted(descriptors(pid)) == before)[1], "it has no more open", 60)
    assert resident(pid) < memory_before + 4096, "KiB"
    assert dials > 500
    sock_of_dial, stderr = keeper.dial("last", "1")
    os.close(stderr)
    sock_of_dial.close()
    keeper.close()
    assert set(said.read_text().splitlines()) == {"up", "down ttun0"}
    assert "last" in ran.read_text().splitlines()
    for line in ran.read_text().splitlines():
        assert re.fullmatch(module.FORMS["host"], line), line
    assert not evil.exists()
    text = capfd.readouterr().err
    assert "Traceback" not in text
    assert "keeper: refused a request: " in text
    assert len(text) < 100_000, "it does not fill the log either"


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0])


# ---- the terminal ----

ON_A_TERMINAL = """
import os, signal, sys, time
from ttun.process.keeper import Keeper, via
from ttun.process import log_writer
log_writer.install()
signal.signal(signal.SIGINT, lambda *_: print("interrupted", flush=True))
is_ours = lambda: os.tcgetpgrp(0) == os.getpgrp()
if sys.argv[2] == "background":
    reading, writing = os.pipe()
    if os.fork():
        os.wait()
        sys.exit()
    os.setpgid(0, 0)
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
keeper = Keeper()
keeper.via = via(sys.argv[1], None)
keeper.start({})
before = os.tcgetpgrp(0)
for seconds in (20, 10):
    sock, stderr = keeper.dial("host", "1")
    sock.settimeout(seconds)
    same = os.tcgetpgrp(0) == before
    print("came", sock.recv(100), "ours", is_ours(), "as before", same, flush=True)
    if sys.argv[2] == "once":
        keeper.background()
    else:
        keeper.hang_up()
    time.sleep(0.5)
    print("then ours", is_ours(), flush=True)
keeper.close()
print("end ours", is_ours(), "as before", os.tcgetpgrp(0) == before, flush=True)
"""


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, command: str, how: str) -> None:
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            os.environ["PYTHONPATH"] = str(ROOT)
            os.execv(sys.executable, [sys.executable, "-c", ON_A_TERMINAL, command, how])
        self.shown = b""

    def says(self, text: str) -> str:
        deadline = time.monotonic() + 20
        while text.encode() not in self.shown:
            left = max(0, deadline - time.monotonic())
            assert select.select([self.master], [], [], left)[0], self.shown
            try:
                self.shown += os.read(self.master, 4096)
            except OSError:
                raise AssertionError(self.shown) from None
        return self.shown.decode()

    def types(self, text: str) -> None:
        os.write(self.master, text.encode())

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        os.close(self.master)
        os.waitpid(self.pid, 0)


@contextlib.contextmanager
def terminal(command: str, how: str) -> Iterator[Terminal]:
    made = Terminal(command, how)
    try:
        yield made
    finally:
        made.close()


ASKS = "stty -echo < /dev/tty; printf 'password: ' > /dev/tty; read it < /dev/tty; echo $it; cat"


def test_a_command_has_the_terminal_until_its_end(nap: str) -> None:
    """As a password of ssh is asked for there, and each time while there was no session."""
    with terminal(ASKS, "each time") as made:
        made.says("password: ")
        made.types("hunter2\n")
        text = made.says("then ours True")
        assert "came b'hunter2\\n' ours False" in text
        made.shown = b""
        made.says("password: ")
        made.types("hunter3\n")
        assert "came b'hunter3\\n' ours False" in made.says("end ours True")


def test_after_the_first_session_a_command_runs_in_the_background(nap: str) -> None:
    with terminal("read it < /dev/tty; echo $it; echo -; cat", "once") as made:
        time.sleep(0.5)
        made.types("hunter2\n")
        assert "came b'hunter2\\n" in made.says("then ours True")
        made.types("hunter3\n")
        made.says("TimeoutError")  # the second one is stopped when it reads what is not for it


def test_a_program_in_the_background_leaves_the_terminal_to_whoever_has_it() -> None:
    with terminal("echo here; cat", "background") as made:
        text = made.says("end ours")
        assert text.count("came b'here\\n' ours False as before True") == 2


def test_ctrl_c_while_a_command_has_the_terminal_is_meant_for_the_program() -> None:
    with terminal("printf 'password: ' > /dev/tty; exec cat < /dev/tty", "each time") as made:
        made.says("password: ")
        made.types("\x03")
        made.says("interrupted")
