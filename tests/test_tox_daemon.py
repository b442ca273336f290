"""ttun tox in the background, and syslog as its log: on a real socket, read or not."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine import record
from tunnel import PROGRAM, SERVER, Bench, eventually

from ttun.lab import netns
from ttun.process.log_writer import Writer
from ttun.tox import daemon


@pytest.fixture
def syslog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Where a log daemon would listen."""
    monkeypatch.setattr(daemon, "SYSLOG", str(tmp_path / "log"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(daemon.SYSLOG)
        sock.settimeout(10)
        yield sock


def line(syslog: socket.socket) -> str:
    """The next line, without its time, which has the length that logd of OpenWrt cuts off."""
    text = syslog.recv(1000).decode()
    priority, time_, rest = re.fullmatch(r"(<\d+>)(.{15} )(.*)", text, re.S).groups()  # type: ignore[union-attr]
    assert abs(time.mktime(time.strptime(f"{time.localtime().tm_year} {time_.strip()}",
                                         "%Y %b %d %H:%M:%S")) - time.time()) < 60  # fmt: skip
    return f"{priority}{rest}"


def test_syslog_gets_lines_with_their_level_also_after_it_was_started_anew(
    syslog: socket.socket,
) -> None:
    writer = Writer(daemon.Syslog())
    writer.start()
    pid = os.getpid()
    writer.handle(record("hello"))
    assert line(syslog) == f"<30>ttun[{pid}]: hello\0"
    writer.handle(record("beware", logging.WARNING))
    assert line(syslog) == f"<28>ttun[{pid}]: beware\0"
    os.unlink(daemon.SYSLOG)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as anew:
        anew.bind(daemon.SYSLOG)
        anew.settimeout(10)
        syslog.close()
        writer.handle(record("again"))
        assert line(anew) == f"<30>ttun[{pid}]: again\0"


def test_a_syslog_that_nobody_reads_holds_up_nobody(syslog: socket.socket) -> None:
    writer = Writer(daemon.Syslog())
    writer.start()
    started = time.monotonic()
    for number in range(4000):
        writer.handle(record(f"{number} {'.' * 90}"))
    writer.flush()
    assert time.monotonic() - started < 10
    while b"log lines lost: the log is not being read" not in (data := syslog.recv(1000)):
        assert data.startswith(b"<30>")
    writer.handle(record("the next one"))
    assert b"the next one" in syslog.recv(1000)


@pytest.mark.hosts
@pytest.mark.tox
@pytest.mark.parametrize("is_full", [False, True], ids=["read", "never read"])
def test_tox_in_the_background_logs_to_syslog_and_ends(
    plain: Bench, tmp_path: Path, is_full: bool
) -> None:
    """In a /dev of its own, as there may be no log daemon on this machine, or a real one."""
    log, pid_file = tmp_path / "log", tmp_path / "pid"
    nodes = "null zero urandom random tty"
    script = f"""
        set -e
        mount -t tmpfs none /mnt
        for node in {nodes}; do touch /mnt/$node; mount --bind /dev/$node /mnt/$node; done
        ln -s {log} /mnt/log
        mount --rbind /mnt /dev
        exec "$@"
    """
    command = ["unshare", "--mount", "sh", "-c", script, "sh", *PROGRAM, "tox", "-z", "-s", "x",
               "-C", str(tmp_path), "-F", str(pid_file)]  # fmt: skip
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as syslog:
        syslog.bind(str(log))
        syslog.settimeout(20)
        assert plain.pair.start(SERVER, command, environment=netns.environment()).wait(20) == 0
        pid = int(eventually(lambda: pid_file.exists() and pid_file.read_text(), "its process id"))
        try:
            eventually(lambda: len(os.listdir(f"/proc/{pid}/task")) > 2, "its threads run")
            time.sleep(0.5)
            if is_full:
                with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as others:
                    others.connect(str(log))
                    others.setblocking(False)
                    with contextlib.suppress(BlockingIOError):
                        while True:
                            others.send(b"a line of another program's")
            os.kill(pid, signal.SIGTERM)
            eventually(lambda: not Path(f"/proc/{pid}").exists(), "it has ended", 10)
            if not is_full:
                assert line(syslog) == f"<30>ttun[{pid}]: SIGTERM: stopping\0"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
