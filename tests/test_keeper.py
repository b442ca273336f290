"""The keeper: it runs what it was told at its start, for whoever it was told, and ends in time."""

from __future__ import annotations

import datetime
import errno
import functools
import importlib
import os
import pwd
import re
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import kept
import pytest
from kept import as_root, descriptors, dialled, is_gone, other_users, process, received
from machine import running
from tunnel import eventually

from ttun import privileges
from ttun.errors import TtunError
from ttun.flag import Flag
from ttun.process import keeper as module
from ttun.process.keeper import Keeper, via
from ttun.process.process_group import becoming


@pytest.fixture
def keeper() -> Iterator[Keeper]:
    with kept.made() as made:
        yield made


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


@pytest.mark.parametrize("number", module.IGNORED)
def test_a_signal_of_the_terminal_while_it_starts_does_not_end_it(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    code = "import time; time.sleep(1)\n" + module.START_CODE
    monkeypatch.setattr(module, "START_CODE", code)
    keeper.via = via("echo here", None)
    timer = threading.Timer(0.5, lambda: os.kill(process(keeper), number))
    timer.start()
    keeper.start({})
    timer.join()
    assert dialled(keeper) == b"here\n"


def test_hooks_that_cannot_start_are_an_error_and_the_end_is_as_planned(
    keeper: Keeper, tmp_path: Path
) -> None:
    keeper.hooks = kept.Failing
    keeper.at_end.append(functools.partial(os.mkdir, str(tmp_path / "done")))
    with pytest.raises(TtunError, match="there is no thread"):
        keeper.start({})
    assert (tmp_path / "done").exists()


def test_what_is_put_where_the_program_was_started_is_not_imported_later(
    keeper: Keeper,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """As by a program that was taken over, if it was started in a directory of its user."""
    monkeypatch.syspath_prepend(tmp_path)
    keeper.at_end.append(functools.partial(importlib.import_module, "that_is_not_there_yet"))
    keeper.start({})
    (tmp_path / "that_is_not_there_yet.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    keeper.close()
    assert not (tmp_path / "ran").exists()
    assert "No module named 'that_is_not_there_yet'" in capfd.readouterr().err


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


LIMITED = module.START_CODE.replace("main({}", "main.__globals__.update(AT_END=1)\nmain({}")


def test_the_end_of_a_keeper_is_waited_for_and_told_once(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The program closes it as what runs its hooks, and as what keeps its rules."""
    keeper.at_end.append(os.getpid)
    keeper.start({})
    pid = process(keeper)
    os.kill(pid, signal.SIGSTOP)
    monkeypatch.setattr(module, "AT_END", 0)
    keeper.close()
    keeper.close()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert caplog.text.count("the keeper process did not end") == 1


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
            keeper.dial(host, port, Flag())
    assert not said.exists()


def test_a_dial_relays_both_ways_and_gives_its_stderr(keeper: Keeper) -> None:
    keeper.via = via("echo ready >&2; cat", None)
    keeper.start({})
    sock, stderr = keeper.dial("host", "1", Flag())
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
        sock, stderr = keeper.dial("", "", Flag())
        os.close(stderr)
        sock.close()

    for end in (keeper.hang_up, again, keeper.close):
        sock, stderr = keeper.dial("", "", Flag())
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


def test_how_a_command_ended_is_said_also_if_the_program_hangs_up_at_once(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It has TICK for that: here more, as this machine may be busy."""
    longer = 'main.__globals__["process_group"].TICK = 0.5\nmain({}'
    monkeypatch.setattr(module, "START_CODE", module.START_CODE.replace("main({}", longer))
    keeper.via = via("exec <&- >&-; (exit 7)", None)
    keeper.start({})
    for _ in range(8):
        assert dialled(keeper) == b""
        keeper.hang_up()
    keeper.close()
    assert capfd.readouterr().err.count("--via: exit code 7") == 8


def test_its_lines_have_the_time_zone_of_the_programs(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TZ", "JST-9")  # east of Greenwich
    keeper.via = via("exit 7", None)
    keeper.start({})
    assert dialled(keeper) == b""
    keeper.close()
    (line,) = (x for x in capfd.readouterr().err.splitlines() if "exit code 7" in x)
    monkeypatch.undo()  # strptime() has the C library take the time zone over
    written = datetime.datetime.strptime(line[:19], "%Y/%m/%d %H:%M:%S")
    ahead = written - datetime.datetime.now(datetime.timezone.utc).replace(tzinfo=None)
    assert round(ahead.total_seconds() / 3600) == 9


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
        keeper.dial("", "", Flag())
    assert raised.value.errno == errno.EMFILE
    resource.prlimit(pid, resource.RLIMIT_NOFILE, most)
    assert dialled(keeper) == b"here\n"


def test_without_room_for_its_descriptors_here_a_dial_is_an_error_and_keeps_none(
    keeper: Keeper,
) -> None:
    keeper.via = via("echo here", None)
    keeper.start({})
    usual = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = os.open("/dev/null", os.O_RDONLY)
    before = len(descriptors(os.getpid()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 2, usual[1]))
    try:
        for _ in range(5):  # one of the two has room
            with pytest.raises(OSError, match="Too many open files"):
                keeper.dial("", "", Flag())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, usual)
        os.close(used)
    assert len(descriptors(os.getpid())) == before - 1
    assert dialled(keeper) == b"here\n"


def test_a_dial_of_a_dead_or_stopped_keeper_has_an_end(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper.via = via("echo %h", None)
    keeper.start({})
    monkeypatch.setattr(module, "DIAL", 0.5)
    os.kill(process(keeper), signal.SIGSTOP)
    with pytest.raises(OSError, match="does not answer"):
        keeper.dial("late", "", Flag())
    os.kill(process(keeper), signal.SIGCONT)
    monkeypatch.setattr(module, "DIAL", 20)
    assert dialled(keeper, "here") == b"here\n", "and not the late answer to the first one"
    os.kill(process(keeper), signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(OSError, match="the keeper process ended"):
            keeper.dial("", "", Flag())


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
    keeper.via = via(
        "grep Sig /proc/self/status; ls /proc/self/fd; ps -o pgid=,sid= -p $$",
        None,
        foreground=False,
    )
    keeper.start({})
    text = dialled(keeper).decode()
    for kind in ("SigBlk", "SigIgn"):
        found = re.search(rf"{kind}:\s+([0-9a-f]+)$", text, re.M)
        assert found is not None
        assert int(found[1], 16) & 0x7FFFFFFF == 0, (
            kind
        )  # from 32 on: left by who started the tests
    *numbers, groups = text.split("SigCgt:")[1].splitlines()[1:]
    assert set(numbers) == {"0", "1", "2", "3"}, "3 is that of ls"
    group, session = map(int, groups.split())
    assert group == session != os.getsid(0), "without a terminal to ask on it has none"
