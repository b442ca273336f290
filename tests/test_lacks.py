"""Shortages of descriptors and threads: a log line and the back-off, never an exit."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import time
from pathlib import Path

import pytest
from embedded import run
from lacks import lives, no_descriptors, no_threads
from machine import IS_NOBODY_HERE
from peer import Peer
from strangers import connect
from tunnel import CLIENT, PROGRAM, SERVER, SERVER_ADDRESS, Bench, eventually

from ttun.lab import netns

pytestmark = pytest.mark.hosts

SOON = 20.0  # seconds; at most 5 are usual


@pytest.mark.parametrize("more", [0, 1, 2])
def test_a_client_without_descriptors_dials_again(plain: Bench, more: int) -> None:
    """Whether it lacks the first of a dial or another one."""
    client = plain.client()
    client.says("Connection refused")
    with no_descriptors(client, more):
        plain.server()
        time.sleep(6)
        assert lives(client), client.log()
    client.says("authenticated", seconds=SOON)
    assert lives(client)


@pytest.mark.parametrize("more", [0, 1, 2])
def test_a_session_that_ends_without_descriptors_is_followed_by_another(
    plain: Bench, more: int
) -> None:
    server, client = plain.tunnel()
    with contextlib.ExitStack() as stack:
        for end in (server, client):
            stack.enter_context(no_descriptors(end, more))
        plain.run(SERVER, "ss", "--kill", "state", "established", "( sport = :20203 )")
        server.says("disconnected")
        client.says("disconnected")
        time.sleep(3)
        assert lives(server), server.log()
        assert lives(client), client.log()
    client.says("authenticated", times=2, seconds=SOON)
    plain.answers()


def test_a_server_without_descriptors_accepts_again(plain: Bench) -> None:
    server = plain.server()
    with no_descriptors(server):
        for _ in range(100):
            connect(plain).close()
        server.says("cannot accept a connection: Too many open files")
        time.sleep(2)
        assert server.log().count("Too many open files") < 30, "bounded, however many came"
    plain.client().says("authenticated", seconds=SOON)
    assert lives(server)


MANY = 300


def visit_many_times(bench: Bench, path: Path) -> list[int]:
    """As many sessions, strangers and questions for the status as there may be; how many worked.

    path: where the server answers those questions.
    """
    worked = [0, 0, 0]
    for number in range(MANY):
        with contextlib.suppress(OSError, EOFError), quick_connection(bench) as sock:
            sock.sendall(bytes(number % 20))
            worked[1] += 1
        with contextlib.suppress(OSError, EOFError), quick_connection(bench) as sock:
            peer = Peer(sock, b"secret")
            sock.settimeout(0.2)
            peer.handshake_as_client()
            worked[0] += 1
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as asking:
            asking.settimeout(0.2)
            asking.connect(str(path))
            worked[2] += asking.recv(1) == b"{"
    return worked


def quick_connection(bench: Bench) -> socket.socket:
    return bench.on(CLIENT, lambda: socket.create_connection((SERVER_ADDRESS, 20203), 0.2))


@pytest.mark.slow
@pytest.mark.parametrize("lack", ["descriptors", "threads"])
def test_many_of_everything_during_a_lack_end_nothing(plain: Bench, lack: str) -> None:
    """It keeps running, and after the shortage a client connects at once."""
    if lack == "threads" and not IS_NOBODY_HERE:
        pytest.skip("no other user in this user namespace")
    server = plain.server("--user", "4000000002") if IS_NOBODY_HERE else plain.server()
    path = server.socket()  # it has started
    with no_descriptors(server) if lack == "descriptors" else no_threads(server):
        print(f"{lack}: sessions, strangers, status: {visit_many_times(plain, path)}")
        assert lives(server), server.log()[-2000:]
    over = time.monotonic()
    client = plain.client()
    client.says("authenticated", seconds=SOON)
    print(f"in {time.monotonic() - over:.1f} s after it was over")
    plain.answers()
    assert lives(server)


@pytest.mark.skipif(not IS_NOBODY_HERE, reason="no other user in this user namespace")
@pytest.mark.parametrize("host", [SERVER, CLIENT])
def test_an_end_without_threads_tries_again(plain: Bench, host: str) -> None:
    ends = {SERVER: plain.server("--user", "4000000001")}
    if host == SERVER:
        with no_threads(ends[SERVER]):
            client = plain.client()
            ends[SERVER].says("cannot start a session with", times=2)
    else:
        ends[SERVER].stop()
        client = plain.client("--user", "4000000001")
        client.says("Connection refused")
        ends = {CLIENT: client}
        with no_threads(client):
            plain.server()
            client.says("cannot start a session with", times=2)
    client.says("reconnecting", times=2)
    eventually(lambda: client.log().count("authenticated") > client.log().count("cannot start"),
               "it is in", 60)  # fmt: skip
    plain.answers()
    assert all(map(lives, ends.values()))


def test_a_session_survives_a_time_without_descriptors_and_threads(plain: Bench) -> None:
    ends = plain.tunnel()
    plain.answers()
    with contextlib.ExitStack() as stack:
        for end in ends:
            stack.enter_context(no_threads(end))  # first: it asks the end, which takes descriptors
            stack.enter_context(no_descriptors(end))
        for _ in range(100):
            connect(plain).close()
        time.sleep(3)
        assert plain.ping(CLIENT, "10.1.1.1", 5) == 5
    for end in ends:
        assert lives(end)
        assert "disconnected" not in end.log()


def test_with_few_descriptors_strangers_do_not_lock_the_client_out(plain: Bench) -> None:
    """Silent and sending ones. It once took 39 s."""
    log = plain.directory / "few.log"
    script = f"ulimit -n 40; exec {' '.join(PROGRAM)} server -k secret"
    with log.open("w") as file:
        process = plain.pair.start(
            SERVER, ["sh", "-c", script], stdout=file, stderr=file, environment=netns.environment()
        )
    try:
        eventually(lambda: "listening" in log.read_text(), "it listens")
        strangers = []
        for number in range(200):
            sock = plain.on(CLIENT, lambda: socket.create_connection((SERVER_ADDRESS, 20203), 15))
            with contextlib.suppress(OSError):
                sock.sendall(bytes(number % 20))
            strangers.append(sock)
        started = time.monotonic()
        client = plain.client()
        client.says("authenticated", seconds=10)
        print(f"in after {time.monotonic() - started:.1f} s")
        plain.answers()
        assert log.read_text().count("cannot accept") < 30
        for sock in strangers:
            sock.close()
    finally:
        process.terminate()
        process.wait(10)


@pytest.mark.parametrize("role", ["server", "client -s 192.0.2.1"])
def test_too_few_descriptors_at_the_start_are_one_line(plain: Bench, role: str) -> None:
    """From none to enough: it runs, or reports an error in one line."""
    outcomes = set()
    for limit in range(4, 26, 3):
        script = f"ulimit -n {limit}; exec timeout 3 {' '.join(PROGRAM)} {role} -k secret --wire v1"
        done = subprocess.run(
            plain.pair.command(SERVER, ["sh", "-c", script]),
            env={**os.environ, **netns.environment()}, capture_output=True, text=True, timeout=60,
            check=False,
        )  # fmt: skip
        if re.search("^(Fatal Python error|Error processing line)", done.stderr, re.M):
            continue  # Python itself did not come up
        outcomes.add(done.returncode)
        if done.returncode == 1:
            assert "Traceback" not in done.stderr, (limit, done.stderr)
    assert 124 in outcomes or 0 in outcomes, "with enough of them it runs"


def test_a_session_survives_a_time_without_memory_for_what_the_kernel_says(plain: Bench) -> None:
    """The device is looked at also while the endpoint waits because of a lack."""
    client = plain.client()
    printed = run(
        plain,
        SERVER,
        """
        from ttun.network import netlink

        def receive(self):
            raise MemoryError

        server = ttun.Server(b"secret")
        server.start()
        until(lambda: server.status().peer)
        usual, netlink.Netlink.receive = netlink.Netlink.receive, receive
        time.sleep(4)
        netlink.Netlink.receive = usual
        print("over:", server.wait(1), "peer:", server.status().peer is not None)
        server.stop()
        """,
    )
    assert printed.count("cannot monitor ttun0: netlink: MemoryError") == 1
    assert "over: False peer: True" in printed
    assert lives(client)


def test_a_shortage_during_a_dial_has_a_name(plain: Bench) -> None:
    printed = run(
        plain,
        CLIENT,
        """
        import errno

        class Dialer(ttun.Dialer):
            name = "there"

            def kind(self, sock):
                return "tcp"

            def candidates(self, stop):
                def first(stop): raise MemoryError
                def second(stop): raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
                return [ttun.Candidate("there", None, each) for each in (first, second)]

        with ttun.Client(b"secret", server=Dialer()) as client:
            until(lambda: client.status().failed_attempts)
        """,
    )
    assert "cannot connect to there: MemoryError; Too many open files\n" in printed
