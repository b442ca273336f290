"""A log that nobody reads: it costs log lines, and nothing else."""

from __future__ import annotations

import fcntl
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from flood import nonsense
from machine import record
from peer import Peer
from strangers import connect
from tunnel import CLIENT, PROGRAM, ROOT, SERVER, Bench, eventually

from ttun.lab import netns
from ttun.process.log_writer import Descriptor, Writer

SIZES = [4096, 65536]  # bytes of a pipe: one page, and what is usual
F_SETPIPE_SZ = 1031  # linux/fcntl.h; fcntl.F_SETPIPE_SZ from Python 3.10 on


class Pipe:
    """What a program has for its stderr; nobody reads it before read() is called."""

    def __init__(self, size: int) -> None:
        self.readable, self.writable = os.pipe()
        fcntl.fcntl(self.writable, F_SETPIPE_SZ, size)
        self.text = b""

    def fill(self) -> None:
        """Write until there is no room for one byte more."""
        os.set_blocking(self.writable, False)
        for size in (4096, 1):
            try:
                while os.write(self.writable, size * b"."):
                    pass
            except BlockingIOError:
                pass
        os.set_blocking(self.writable, True)

    def read(self) -> str:
        """Read what there is now; all that was read so far."""
        os.set_blocking(self.readable, False)
        try:
            while data := os.read(self.readable, 65536):
                self.text += data
        except BlockingIOError:
            pass
        return self.text.decode()

    def says(self, text: str) -> str:
        eventually(lambda: text in self.read(), f"{text!r} in the log")
        return self.read()

    def close(self) -> None:
        for descriptor in (self.readable, self.writable):
            if descriptor >= 0:
                os.close(descriptor)


@pytest.fixture(params=SIZES)
def pipe(request: pytest.FixtureRequest) -> Iterator[Pipe]:
    made = Pipe(request.param)
    yield made
    made.close()


@pytest.mark.parametrize("threaded", [False, True], ids=["before start", "after start"])
def test_lines_that_nobody_reads_are_counted_in_their_place(pipe: Pipe, threaded: bool) -> None:
    writer = Writer(Descriptor(pipe.writable))
    if threaded:
        writer.start()
    count = 4000
    started = time.monotonic()
    for number in range(count):
        writer.handle(record(f"{number} {'.' * 90}"))
    assert time.monotonic() - started < 10, "nobody waited"
    assert os.get_blocking(pipe.writable), "the description is not ours alone"

    for _ in range(2000):
        if threaded or "lost" in pipe.read():
            break
        writer.handle(record("one more"))  # writes what can be written
    pipe.says("lost: ")
    lines = pipe.read().splitlines()
    (place,) = [i for i, line in enumerate(lines) if "lost" in line]
    lost = re.fullmatch(r"(\d+) log lines lost: the log is not being read", lines[place])
    assert lost, lines[place]
    kept = [line.split()[0] for line in lines[:place]]
    assert kept == [str(number) for number in range(len(kept))], "the first ones, in order"
    assert 600 < len(kept) < 1500, "a queue of 64 KiB, and at most as much in the pipe"
    writer.handle(record("the next one"))
    for _ in range(2000):
        if threaded or "the next one\n" in pipe.read():
            break
        writer.handle(record("the next one"))
    after = pipe.says("the next one\n").splitlines()[place + 1 :]
    assert set(after[:-1]) <= {"one more", "the next one"}
    assert after[-1] == "the next one"
    if threaded:
        assert len(kept) + int(lost[1]) == count


@pytest.mark.parametrize("threaded", [False, True], ids=["before start", "after start"])
def test_a_slow_reader_of_what_somebody_made_nonblocking_gets_every_line(
    pipe: Pipe, threaded: bool
) -> None:
    os.set_blocking(pipe.writable, False)
    writer = Writer(Descriptor(pipe.writable))
    if threaded:
        writer.start()
    lines = [f"{number} {number % 500 * '.'}" for number in range(200)]
    for number, line in enumerate(lines):
        writer.handle(record(line))
        if number % 10 == 0:
            pipe.read()
    deadline = time.monotonic() + 20
    while pipe.read().count("\n") < len(lines) and time.monotonic() < deadline:
        if not threaded:
            writer.handle(record("more"))
    assert pipe.read().splitlines()[: len(lines)] == lines


def test_a_reader_that_comes_back_is_told_why_lines_are_missing(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    descriptor = os.open(path, os.O_WRONLY)
    writer = Writer(Descriptor(descriptor))
    writer.start()
    os.close(reader)
    for number in range(3):
        writer.handle(record(f"unread {number}"))
        writer.flush()
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    writer.handle(record("read"))
    writer.flush()
    assert os.read(reader, 1000) == b"1 log line lost: Broken pipe\nunread 1\nunread 2\nread\n"
    os.close(reader)
    os.close(descriptor)


def run(script: str, stderr: object) -> subprocess.CompletedProcess[bytes]:
    """Run a program to its end, which has to come within 20 s."""
    command = [sys.executable, "-c", script]
    return subprocess.run(command, cwd=ROOT, stderr=stderr, timeout=20, check=False)


def test_a_line_that_was_torn_by_a_full_disk_is_ended(tmp_path: Path) -> None:
    """A file may have so many bytes, which is as a disk with room for so many."""
    file = tmp_path / "log"
    script = """if True:
        import resource
        from ttun.process import log_writer
        log_writer.install()
        log_writer.start()
        resource.setrlimit(resource.RLIMIT_FSIZE, (50, 1000))
        log_writer.log.info("%s", 100 * "x")
        log_writer.flush()
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        log_writer.log.info("room again")
        log_writer.finish()
    """
    with file.open("w") as stderr:
        assert run(script, stderr).returncode == 0
    torn, lost, line = file.read_text().splitlines()
    assert len(torn) == 50 and torn.endswith("xxx")
    assert lost.endswith("1 log line lost: File too large")
    assert line.endswith("room again")


def test_where_there_is_no_thread_to_be_had_lines_are_written_without() -> None:
    """A thread takes 8 MiB of address space for its stack, and there are 4."""
    script = """if True:
        import re, resource, threading, time
        from pathlib import Path
        from ttun.process import log_writer
        log_writer.install()
        size = 1024 * int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
        resource.setrlimit(resource.RLIMIT_AS, (size + (4 << 20), resource.RLIM_INFINITY))
        threading.stack_size(8 << 20)
        log_writer.start()
        log_writer.log.info("%d thread", threading.active_count())
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
        time.sleep(1.1)
        log_writer.log.info("the next line")
        log_writer.log.info("%d threads", threading.active_count())
        log_writer.finish()
    """
    done = run(script, subprocess.PIPE)
    said = done.stderr.decode()
    assert done.returncode == 0, said
    assert re.search(r"1 thread\n.*the next line\n.*2 threads\n", said), said


def test_the_end_waits_a_second_at_most_for_a_reader(pipe: Pipe) -> None:
    """Not for the thread that writes, nor for one that died with a traceback."""
    pipe.fill()
    script = """if True:
        import sys, threading
        from ttun.process import log_writer
        log_writer.install()
        log_writer.start()
        for _ in range(1000):
            log_writer.log.info("%s", 1000 * "x")
        dies = threading.Thread(target=lambda: 1 / 0)
        dies.start()
        dies.join()
        print("the last word", file=sys.stderr)
        log_writer.finish()
        sys.exit(3)
    """
    started = time.monotonic()
    assert run(script, pipe.writable).returncode == 3
    assert time.monotonic() - started < 12


@pytest.mark.parametrize("pipe", SIZES[1:], indirect=True)
@pytest.mark.parametrize("unread", [False, True], ids=["read", "never read"])
def test_what_is_said_after_the_end_holds_nothing_up(pipe: Pipe, unread: bool) -> None:
    """By an object that is deleted when all other threads stand still for ever."""
    if unread:
        pipe.fill()
    script = """if True:
        import sys
        from ttun.process import log_writer
        log_writer.install()
        log_writer.start()
        class Late:
            def __del__(self, stderr=sys.stderr):
                stderr.write("too late\\n")
        late = Late()
        log_writer.log.info("the last line")
        log_writer.finish()
    """
    assert run(script, pipe.writable).returncode == 0
    if not unread:
        assert pipe.read().endswith("the last line\ntoo late\n")


@pytest.mark.parametrize("arguments", ["dance", "server -k x --user no.such.user", "tox -p"])
def test_an_error_that_nobody_reads_does_not_hold_up_the_end(arguments: str, pipe: Pipe) -> None:
    pipe.fill()
    process = subprocess.Popen([*PROGRAM, *arguments.split()], stderr=pipe.writable)
    try:
        assert process.wait(20) == 2
    finally:
        process.kill()


def start_unread(bench: Bench, pipe: Pipe, host: str, *arguments: str) -> subprocess.Popen[str]:
    """Start an end whose log nobody reads."""
    end = bench.pair.start(
        host, [*PROGRAM, *arguments], stderr=pipe.writable, environment=netns.environment()
    )
    os.close(pipe.writable)
    pipe.writable = -1
    return end


def ask_for_lines(end: subprocess.Popen[str], count: int = 1500) -> None:
    """Have it log some 300 KB: SIGUSR1 is answered with a line of more than 200 bytes."""
    for _ in range(count):
        end.send_signal(signal.SIGUSR1)
        time.sleep(0.001)


@pytest.mark.hosts
@pytest.mark.parametrize("read_at_last", [False, True], ids=["never read", "read at last"])
def test_a_server_whose_log_nobody_reads_serves_and_ends(
    plain: Bench, pipe: Pipe, read_at_last: bool
) -> None:
    """Strangers and sessions alone fill a page; with 64 KiB the lines asked for do."""
    server = start_unread(plain, pipe, SERVER, "server", "-k", "secret")
    try:
        eventually(lambda: can_connect(plain), "it listens")
        ask_for_lines(server)
        rng = random.Random(1)
        for _ in range(60):
            with connect(plain) as sock:
                sock.sendall(nonsense(rng))
        for _ in range(40):
            with connect(plain) as sock:
                Peer(sock, b"secret").handshake_as_client()
        client = plain.client()
        client.says("authenticated")
        plain.answers()
        if read_at_last:
            assert "listening on" in pipe.says("log lines lost: the log is not being read\n")
            ask_for_lines(server, 1)
            eventually(lambda: "status: " in pipe.read().rpartition(" lost: ")[2], "what comes now")
        server.terminate()
        assert server.wait(10) == 0
        if read_at_last:
            _, stopping, after = pipe.read().rpartition("SIGTERM: stopping\n")
            assert stopping and after.count("disconnected after") == 1
        client.says("disconnected")
    finally:
        server.kill()
        server.wait()


def can_connect(bench: Bench) -> bool:
    try:
        connect(bench).close()
    except OSError:
        return False
    return True


@pytest.mark.hosts
def test_a_client_whose_log_nobody_reads_redials_and_ends(plain: Bench, pipe: Pipe) -> None:
    server = plain.server()
    client = start_unread(plain, pipe, CLIENT, "client", "-k", "secret", "-s", "192.0.2.1")
    try:
        server.says("authenticated")
        ask_for_lines(client)
        server.stop()
        server = plain.server()
        server.says("authenticated")
        plain.answers()
        client.send_signal(signal.SIGINT)
        assert client.wait(10) == 0
    finally:
        client.kill()
        client.wait()


@pytest.mark.hosts
@pytest.mark.tox
def test_tox_whose_log_nobody_reads_ends(plain: Bench, pipe: Pipe, tmp_path: Path) -> None:
    pipe.fill()
    options = ["-d", "-d", "-s", "secret", "-C", str(tmp_path), "-I", str(tmp_path / "id")]
    tox = start_unread(plain, pipe, SERVER, "tox", *options)
    try:
        eventually((tmp_path / "id").exists, "it knows its ID")
        time.sleep(0.5)
        tox.terminate()
        assert tox.wait(10) == 0
    finally:
        tox.kill()
        tox.wait()
