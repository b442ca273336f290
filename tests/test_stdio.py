"""``ttun server --stdio``: one peer, then the end; nothing but the tunnel on stdout, no port."""

from __future__ import annotations

import contextlib
import os
import pty
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from peer import Peer, echo_request
from tunnel import CLIENT, PROGRAM, SERVER, TUNNEL4, Bench, eventually

from ttun import handshake
from ttun.lab import netns

pytestmark = pytest.mark.hosts
KEY = b"a secret of sixteen bytes"


class Server:
    """A server on its stdin and stdout."""

    def __init__(self, bench: Bench, *options: str, **streams: Any) -> None:
        self.path = bench.directory / f"{len(bench.helpers)}.log"
        words = [*PROGRAM, "server", "--stdio", *bench.options, *options]
        with self.path.open("w") as log:
            self.process = subprocess.Popen(
                bench.pair.command(SERVER, words),
                env={**os.environ, **netns.environment(), "TTUN_PSK": KEY.decode()},
                **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log, **streams},
            )

        if self.process.stdout is not None:
            bench.helpers.append(self.process)

    def log(self) -> str:
        return self.path.read_text()

    def shake(self) -> None:
        """The client's part of a handshake."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        steps = handshake.client(handshake.psk_key(KEY), handshake.agreeable("v1", None, 1280))
        with contextlib.suppress(StopIteration):
            data, wanted = next(steps)
            while True:
                self.process.stdin.write(data)
                self.process.stdin.flush()
                data, wanted = steps.send(self.process.stdout.read(wanted))


@pytest.mark.parametrize("end", ["stdin", "stdout"])
def test_the_end_of_either_stream_ends_it(plain: Bench, end: str) -> None:
    server = Server(plain, "-mtu", "1000")  # without IPv6 the device has nothing to say by itself
    server.shake()
    time.sleep(0.5)
    assert server.process.poll() is None
    getattr(server.process, end).close()
    assert server.process.wait(10) == 0
    assert "authenticated: protocol v1" in server.log()
    assert "the peer closed the connection" in server.log()
    assert "other clients" not in server.log()


@pytest.mark.parametrize(("wire", "answer"), [("auto", 16), ("x1", 0)])
def test_garbage_ends_it_and_gets_no_more_than_a_stranger_would(
    plain: Bench, wire: str, answer: int
) -> None:
    server = Server(plain, "--wire", wire)
    out, _ = server.process.communicate(os.urandom(5000), timeout=10)
    assert server.process.returncode == 0
    assert len(out) == answer
    assert "handshake with stdio failed" in server.log()


@pytest.mark.parametrize("source", [os.devnull, __file__])
def test_the_end_of_a_file_ends_it(plain: Bench, source: str) -> None:
    with Path(source).open("rb") as file:
        server = Server(plain, stdin=file)
        out, _ = server.process.communicate(timeout=10)
    assert server.process.returncode == 0
    assert len(out) == (0 if source == os.devnull else 16)
    assert "handshake with stdio failed" in server.log()


def test_it_waits_for_its_peer_and_ends_by_a_signal_meanwhile(plain: Bench) -> None:
    server = Server(plain)
    time.sleep(13)  # longer than a handshake may take
    assert server.process.poll() is None
    server.shake()
    server = Server(plain)
    eventually(lambda: "dropped privileges" in server.log(), "it waits for its peer")
    server.process.terminate()
    assert server.process.wait(5) == 0
    assert "SIGTERM" in server.log()


def test_a_reader_that_takes_nothing_does_not_hold_the_end_up(plain: Bench) -> None:
    server = Server(plain)
    server.shake()
    with plain.on(SERVER, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sock:
        for _ in range(3000):
            sock.sendto(bytes(1200), (TUNNEL4[CLIENT], 9))
    time.sleep(1)
    assert server.process.poll() is None
    server.process.terminate()
    assert server.process.wait(10) == 0


def test_a_parent_that_makes_the_socket_non_blocking_does_no_harm(plain: Bench) -> None:
    """The open file is the parent's too: the session once ended, «Resource temporarily …»."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        server = Server(plain, "--wire", "v1", stdin=theirs, stdout=theirs)
        peer = Peer(ours, KEY)
        peer.handshake_as_client()
        theirs.setblocking(False)
        request = echo_request(TUNNEL4[CLIENT], TUNNEL4[SERVER], b"a ping")
        for _ in range(5):
            peer.send(request)
            peer.receive_reply(request)
        server.process.terminate()
        assert server.process.wait(10) == 0
        assert "disconnected after" in server.log()
        assert ": stopped;" in server.log()


def test_no_port_is_opened(plain: Bench) -> None:
    server = Server(plain)
    server.shake()
    assert plain.run(SERVER, "ss", "-Htuln") == ""
    server.process.terminate()
    assert server.process.wait(5) == 0


def test_a_terminal_is_refused(plain: Bench) -> None:
    master, slave = pty.openpty()
    for stream in ("stdin", "stdout"):
        server = Server(plain, **{stream: slave})
        assert server.process.wait(10) == 2
        assert server.log().count("\n") == 1
        assert "not to a terminal" in server.log()
    os.close(master)
    os.close(slave)


def test_without_a_key_none_is_made_and_nothing_is_printed(plain: Bench) -> None:
    nowhere = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none /etc/ttun; exec "$@"', "sh"]
    command = [*(nowhere if Path("/etc/ttun").exists() else []), *PROGRAM, "server", "--stdio"]
    done = subprocess.run(command, capture_output=True, check=False, text=True, timeout=20)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("ttun: no key (")
    assert done.stderr.count("\n") == 1


def test_other_ways_to_listen_are_refused() -> None:
    for more in (["-l", ":1"], ["--tox"]):
        done = subprocess.run(
            [*PROGRAM, "server", "-k", KEY.decode(), "--stdio", *more],
            capture_output=True, check=False, text=True, timeout=20, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
