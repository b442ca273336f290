"""What the journal of systemd gets: the right priority, and no second time stamp; -v and -q."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tunnel import CLIENT, PROGRAM, ROOT, SERVER, Bench, Program, eventually

from ttun.lab import netns

STAMP = re.compile(r"\d{4}/\d\d/\d\d \d\d:\d\d:\d\d ")


def stream(descriptor: int) -> str:
    """JOURNAL_STREAM of systemd.exec(5) for an open file."""
    state = os.fstat(descriptor)
    return f"{state.st_dev}:{state.st_ino}"


def said(script: str, *, is_journal: bool = True) -> str:
    """What a Python program writes to a pipe that the journal reads, or does not."""
    readable, writable = os.pipe()
    named = stream(writable if is_journal else 0)
    done = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stderr=writable,
        env={**os.environ, "JOURNAL_STREAM": named},
    )  # fmt: skip
    os.close(writable)
    with os.fdopen(readable) as lines:
        text = lines.read()
    assert done.wait(20) == 0, text
    return text


LINES = """if True:
    import sys
    from ttun.process import log_writer
    log_writer.install()
    log_writer.start()
    log_writer.log.setLevel("DEBUG")
    for level in (10, 20, 30, 40):
        log_writer.log.log(level, "level %d", level)
    log_writer.log.info("a peer's\\n<0>own priority")
    try:
        1 / 0
    except ZeroDivisionError:
        log_writer.log.exception("failed")
    print("on stderr", file=sys.stderr)
    log_writer.finish()
"""


def test_each_line_for_the_journal_has_its_priority_and_no_time_stamp() -> None:
    first, trace = said(LINES).split("<3>failed\n")
    assert first.splitlines() == [
        "<7>level 10", "<6>level 20", "<4>level 30", "<3>level 40",
        "<6>a peer's", "<6><0>own priority",
    ]  # fmt: skip
    lines = trace.splitlines()
    assert lines[0] == "<3>Traceback (most recent call last):"
    assert lines[-2:] == ["<3>ZeroDivisionError: division by zero", "<3>on stderr"]
    assert all(line.startswith("<3>") for line in lines)


def test_a_journal_that_has_another_file_of_the_service_changes_nothing() -> None:
    """As with StandardError=file:, or a program that a service starts with another stderr."""
    lines = said(LINES, is_journal=False).splitlines()
    assert [STAMP.sub("", line) for line in lines[:4]] == [f"level {n}0" for n in range(1, 5)]
    assert all(STAMP.match(line) for line in lines[:4])


class Journal:
    """Runs an end whose stderr the journal reads; its lines."""

    def __init__(self, bench: Bench, host: str, *arguments: str) -> None:
        readable, writable = os.pipe()
        self.path = bench.directory / f"{host}.journal"
        process = bench.pair.start(
            host, [*PROGRAM, *arguments], stderr=writable,
            environment=netns.environment(JOURNAL_STREAM=stream(writable)),
        )  # fmt: skip
        os.close(writable)
        threading.Thread(target=self._copy, args=(readable,), daemon=True).start()
        self.end = Program(process, self.path)
        bench.ends.append(self.end)  # type: ignore[arg-type]

    def _copy(self, readable: int) -> None:
        with os.fdopen(readable, "rb") as source, Path(self.path).open("wb", 0) as file:
            while data := source.read1():
                file.write(data)


@pytest.mark.hosts
def test_what_fails_is_a_warning_and_what_is_usual_is_not(plain: Bench) -> None:
    server = Journal(plain, SERVER, "server", "-k", "secret").end
    server.path.touch()
    server.says("<6>listening on ")
    client = plain.client(key="another")
    server.says("<4>handshake with 192.0.2.2:")
    client.stop()
    client = plain.client()
    server.says("authenticated: ")
    assert client.stop() == 0
    server.says("disconnected")
    assert server.stop() == 0
    for line in server.log().splitlines():
        assert re.match(r"<[346]>\S", line) and not STAMP.search(line), line


@pytest.mark.hosts
def test_an_error_on_the_command_line_is_an_error_for_the_journal(plain: Bench) -> None:
    end = Journal(plain, SERVER, "server", "--lisen", ":1").end
    assert end.ended() == 2
    end.says("<3>ttun server: ")


@pytest.mark.hosts
@pytest.mark.parametrize("option", ["-v", "-q"])
def test_the_keeper_logs_as_the_program_does(plain: Bench, option: str) -> None:
    """It is another process, and what fails in --up is a warning that only it tells."""
    hooks = ("--hook-user", "root", "--up", "echo said >&2; env >&2; exit 3")
    server = Journal(plain, SERVER, "server", "-k", "a" * 16, option, *hooks).end
    server.path.touch()
    eventually(lambda: plain.on(SERVER, listens), "it listens")
    plain.client(key="a" * 16)
    server.says("<4>--up: exit code 3\n")
    assert server.stop() == 0
    log = server.log()
    assert ("<6>--up: said\n" in log, "<7>--up: started\n" in log) == (option == "-v",) * 2
    for line in log.splitlines():
        assert re.match(r"<[3467]>\S", line) and not STAMP.search(line), line
    assert "JOURNAL_STREAM" not in log


def listens() -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", 20203)) == 0


@pytest.mark.hosts
@pytest.mark.parametrize("is_there", [True, False])
def test_under_procd_the_log_goes_to_syslog_if_there_is_one(
    plain: Bench, tmp_path: Path, is_there: bool
) -> None:
    """The init script of OpenWrt asks for that: procd takes each line of stderr for an error."""
    nodes = "null zero urandom random net/tun"
    script = f"""
        mount -t tmpfs none /mnt; mkdir /mnt/net
        for node in {nodes}; do touch /mnt/$node; mount --bind /dev/$node /mnt/$node; done
        ln -s {tmp_path}/socket /mnt/log; mount --rbind /mnt /dev
        exec "$@"
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as syslog:
        if is_there:
            syslog.bind(f"{tmp_path}/socket")

        def client(*options: str) -> subprocess.CompletedProcess[str]:
            words = ["unshare", "--mount", "sh", "-ec", script, "sh", *PROGRAM, "client", "-k", "x"]
            return subprocess.run(
                plain.pair.command(CLIENT, ["timeout", "-k", "9", "6", *words, *options]),
                env={**os.environ, **netns.environment(TTUN_LOG="syslog")},
                capture_output=True, text=True, check=False, timeout=40,
            )  # fmt: skip

        done = client("-s", "192.0.2.1", "--dev", "lo")
        assert done.returncode == 1
        if not is_there:
            assert "weak key: " in done.stderr and "ttun: device lo" in done.stderr
            return
        assert done.stderr == ""
        syslog.settimeout(5)
        for priority, text in ((28, "weak key: "), (30, "ttun "), (27, "ttun: device lo ")):
            line = syslog.recv(1000).decode()
            assert re.match(rf"<{priority}>\w{{3}} [ \d]\d [\d:]{{8}} ttun\[\d+\]: {text}", line)
        done = client("--via", "exit 3")  # of which the keeper tells
        assert done.stderr == ""
        lines = ""
        while "exit code 3" not in lines:
            lines = syslog.recv(1000).decode()
        assert re.match(r"<28>\w{3} .* ttun\[\d+\]: --via: exit code 3", lines)


@pytest.mark.hosts
def test_quiet_leaves_warnings_and_verbose_adds_each_attempt(plain: Bench) -> None:
    quiet = plain.start(CLIENT, "client", "-q", "-k", "a" * 16, "-s", "192.0.2.1:9")
    quiet.says("cannot connect to 192.0.2.1:9", times=2)
    lines = [STAMP.sub("", line) for line in quiet.log().splitlines()]
    assert all(line.startswith("cannot connect to ") for line in lines), lines
    assert quiet.stop() == 0
    plain.server()
    options = ("--verbose", "--rekey", "1", "--up", "true")
    verbose = plain.client(*options)
    for text in ("connecting to 192.0.2.1:20203", "--up: started", "--up: ended after ",
                 "rekey 1 of this session"):  # fmt: skip
        verbose.says(text)
    assert verbose.stop() == 0
    usual = plain.client("--rekey", "1", "--up", "true")
    usual.says("authenticated")
    assert usual.stop() == 0
    assert not re.search("connecting to|--up|rekey", usual.log())
