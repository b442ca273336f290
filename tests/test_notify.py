"""Readiness and signs of life, as a service manager gets them: on a real datagram socket."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tunnel import CLIENT, PROGRAM, SERVER, Bench, eventually

from ttun.commands.notify import Manager
from ttun.lab import netns

FAST = "200000"  # microseconds: a sign of life each 0.1 s


@contextlib.contextmanager
def manager_socket(address: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(address.replace("@", "\0", 1))
        sock.settimeout(20)
        yield sock


def addresses(directory: Path) -> list[str]:
    return [str(directory / "notify"), f"@ttun-test-{os.getpid()}"]


def test_without_a_manager_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    manager = Manager()
    assert manager.interval is None
    manager.tell(manager.READY)


@pytest.mark.parametrize("kind", [0, 1])
def test_a_path_and_an_abstract_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: int
) -> None:
    address = addresses(tmp_path)[kind]
    with manager_socket(address) as sock:
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        manager = Manager()
        manager.tell(manager.READY)
        assert sock.recv(100) == b"READY=1"
        assert "NOTIFY_SOCKET" not in os.environ, "what we start does not speak in our name"


@pytest.mark.parametrize(
    ("microseconds", "pid", "interval"),
    [
        ("30000000", "", 15.0),
        ("30000000", "ours", 15.0),
        ("30000000", "1", None),
        ("", "", None),
        ("0", "", None),
        ("-5", "", None),
        ("soon", "", None),
    ],
)
def test_how_often_a_sign_of_life_is_due(
    monkeypatch: pytest.MonkeyPatch, microseconds: str, pid: str, interval: float | None
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", microseconds)
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()) if pid == "ours" else pid)
    assert Manager().interval == interval


def test_a_manager_that_does_not_listen_is_no_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    caplog.set_level("INFO", "ttun")
    Manager().tell(Manager.READY)
    assert "cannot connect to the service manager: No such file" in caplog.text


def test_a_manager_that_does_not_read_does_not_hold_us_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    address = addresses(tmp_path)[0]
    with manager_socket(address):
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        manager = Manager()
        for _ in range(1000):  # far more than a socket holds
            manager.tell(manager.ALIVE)


@pytest.mark.hosts
@pytest.mark.parametrize("host", [SERVER, CLIENT])
def test_a_tunnel_says_when_it_is_ready_that_it_lives_and_that_it_stops(
    bench: Bench, host: str
) -> None:
    address = str(bench.directory / "notify")
    arguments = ["server"] if host == SERVER else ["client", "-s", "192.0.2.1"]
    with manager_socket(address) as sock:
        process = bench.pair.start(
            host, [*PROGRAM, *arguments, "-k", "secret", *bench.options],
            environment=netns.environment(NOTIFY_SOCKET=address, WATCHDOG_USEC=FAST),
        )  # fmt: skip
        try:
            assert sock.recv(100) == b"READY=1"
            assert bench.devices(host) == ["ttun0"], "ready means that the device is there"
            for _ in range(5):
                assert sock.recv(100) == b"WATCHDOG=1"
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.3)  # what it sent before that
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while sock.recv(100):
                    pass
            time.sleep(1)
            with pytest.raises(BlockingIOError):
                sock.recv(100)
            sock.settimeout(20)
            process.send_signal(signal.SIGCONT)
            assert sock.recv(100) == b"WATCHDOG=1"
            process.send_signal(signal.SIGUSR1)  # is answered, and ends nothing
            assert sock.recv(100) == b"WATCHDOG=1"
            process.terminate()
            while (state := sock.recv(100)) == b"WATCHDOG=1":
                pass
            assert state == b"STOPPING=1"
            assert process.wait(10) == 0
        finally:
            process.kill()
            process.wait()


@pytest.mark.hosts
def test_an_endpoint_that_ended_gives_no_sign_of_life(bench: Bench) -> None:
    address = str(bench.directory / "notify")
    with manager_socket(address) as sock:
        client = bench.pair.start(
            CLIENT, [*PROGRAM, "client", "-k", "secret", "-s", "192.0.2.1", *bench.options],
            environment=netns.environment(NOTIFY_SOCKET=address, WATCHDOG_USEC=FAST),
        )  # fmt: skip
        server = bench.server()
        states: list[bytes] = []
        sock.setblocking(False)

        def read() -> bool:  # all the time, as a manager does: the socket takes ten
            with contextlib.suppress(BlockingIOError):
                while True:
                    states.append(sock.recv(100))
            return True

        eventually(lambda: read() and "authenticated" in server.log(), "a session")
        netns.ip("-n", bench.pair.names[CLIENT], "link", "delete", "ttun0")
        eventually(lambda: read() and client.poll() is not None, "its end", 20)
        read()
    assert client.returncode == 1
    assert states[0] == b"READY=1"
    assert states[-1] == b"STOPPING=1"
