"""Log lines that go to syslog, and a log daemon that nobody serves."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine import record
from syslog_line import line

from ttun.process import syslog
from ttun.process.log_writer import Writer


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Where a log daemon would listen."""
    monkeypatch.setattr(syslog, "SYSLOG", str(tmp_path / "log"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(syslog.SYSLOG)
        sock.settimeout(10)
        yield sock


def test_syslog_gets_lines_with_their_level_also_after_it_was_started_anew(
    daemon: socket.socket,
) -> None:
    writer = Writer(syslog.Syslog())
    writer.start()
    pid = os.getpid()
    writer.handle(record("hello"))
    assert line(daemon) == f"<30>ttun[{pid}]: hello\0"
    writer.handle(record("beware", logging.WARNING))
    assert line(daemon) == f"<28>ttun[{pid}]: beware\0"
    os.unlink(syslog.SYSLOG)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as anew:
        anew.bind(syslog.SYSLOG)
        anew.settimeout(10)
        daemon.close()
        writer.handle(record("again"))
        assert line(anew) == f"<30>ttun[{pid}]: again\0"


def test_a_syslog_that_nobody_reads_holds_up_nobody(daemon: socket.socket) -> None:
    writer = Writer(syslog.Syslog())
    writer.start()
    started = time.monotonic()
    for number in range(4000):
        writer.handle(record(f"{number} {'.' * 90}"))
    writer.flush()
    assert time.monotonic() - started < 10
    while b"log lines lost: the log is not being read" not in (data := daemon.recv(1000)):
        assert data.startswith(b"<30>")
    writer.handle(record("the next one"))
    assert b"the next one" in daemon.recv(1000)
