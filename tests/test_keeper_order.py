"""The keeper of a program comes after that of one that was killed: --up after the old --down."""

from __future__ import annotations

import functools
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import kept
import pytest
from kept import as_root, dialled, is_gone, keeper_of, other_users, process
from machine import cpu
from tunnel import SERVER, Bench, eventually

from ttun.process import keeper as module
from ttun.process.keeper import Keeper, via

DEVICE = f"test{os.getpid()}"
NAME = f"\0ttun-keeper-{DEVICE}"


@pytest.fixture
def keeper() -> Iterator[Keeper]:
    with kept.made() as made:
        yield made


def is_held() -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        return sock.connect_ex(NAME) == 0


@pytest.mark.hosts
def test_after_kill_9_up_runs_after_the_old_down(plain: Bench, said: Path) -> None:
    options = ("--hook-user", "root", "--up", f"echo up >> {said}",
               "--down", f"echo begin >> {said}; sleep 2; echo end >> {said}")  # fmt: skip
    server = plain.server(*options)
    plain.client().says("authenticated")
    eventually(said.exists, "--up ran")
    old = keeper_of(server.process.pid)
    os.kill(old, signal.SIGSTOP)
    server.kill()
    again = plain.start(SERVER, "server", "-k", "secret", *options)
    again.says("waiting for the keeper process")
    os.kill(old, signal.SIGCONT)
    again.says("authenticated", seconds=40)
    eventually(lambda: said.read_text() == "up\nbegin\nend\nup\n", "the order")
    assert is_gone(old)
    assert again.log().count("waiting for the keeper process of a killed ttun") == 1


@pytest.mark.hosts
def test_a_start_that_waits_can_be_ended(plain: Bench) -> None:
    server = plain.server("--hook-user", "root", "--up", "true")
    server.status()
    old = keeper_of(server.process.pid)
    os.kill(old, signal.SIGSTOP)
    server.kill()
    again = plain.start(SERVER, "server", "-k", "secret")
    again.says("waiting for the keeper process")
    started = time.monotonic()
    assert again.stop() == 0
    assert time.monotonic() - started < 5
    os.kill(old, signal.SIGCONT)


def test_a_name_is_free_again_when_its_keeper_has_ended(keeper: Keeper, tmp_path: Path) -> None:
    begun, over = tmp_path / "begun", tmp_path / "over"
    keeper.at_end.append(functools.partial(os.mkdir, str(begun)))
    keeper.at_end.append(functools.partial(time.sleep, 1))
    keeper.at_end.append(functools.partial(os.mkdir, str(over)))
    keeper.hold(DEVICE)
    keeper.start({})
    assert is_held()
    ending = threading.Thread(target=keeper.close)
    ending.start()
    eventually(begun.exists, "its end has begun")
    with kept.made() as second:
        second.hold(DEVICE)
        assert over.exists()
        ending.join(10)
        assert is_held()
        second.start({})  # which needs no process
        assert not is_held()


def test_the_keeper_of_a_program_that_is_there_is_not_waited_for(
    keeper: Keeper, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its device was renamed, and the next tunnel has the old name."""
    keeper.at_end.append(os.getpid)
    keeper.hold(DEVICE)
    keeper.start({})
    with kept.made() as second:
        for _ in range(200):  # more than may wait to be accepted
            started = time.monotonic()
            second.hold(DEVICE)
            assert time.monotonic() - started < 5
        second.at_end.append(os.getpid)
        second.start({})  # without the name, which the first one keeps
        assert is_held()
    assert caplog.text + capfd.readouterr().err == ""


def test_a_flood_of_connections_to_the_name_costs_no_core_and_holds_up_no_request(
    keeper: Keeper,
) -> None:
    keeper.via = via("echo here", None)
    keeper.hold(DEVICE)
    keeper.start({})
    before, until = cpu(process(keeper)), time.monotonic() + 2
    while time.monotonic() < until:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.setblocking(False)
            sock.connect_ex(NAME)
    assert cpu(process(keeper)) - before < 0.5
    assert dialled(keeper) == b"here\n"


def test_a_keeper_that_does_not_end_is_waited_for_no_longer_than_it_may_take(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper.at_end.append(os.getpid)
    keeper.hold(DEVICE)
    keeper.start({})
    os.kill(process(keeper), signal.SIGSTOP)
    monkeypatch.setattr(module, "AT_END", 0)
    with kept.made() as second:
        started = time.monotonic()
        second.hold(DEVICE)
        assert 0.9 < time.monotonic() - started < 10
        second.at_end.append(os.getpid)
        second.start({})
    os.kill(process(keeper), signal.SIGCONT)


@as_root
@other_users
def test_a_name_that_another_user_has_taken_holds_nobody_up(keeper: Keeper) -> None:
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind(NAME)
        os.seteuid(65534)  # of the moment when it listens
        try:
            taken.listen(0)
        finally:
            os.seteuid(0)
        for _ in range(3):  # then there is no room for another connection
            started = time.monotonic()
            keeper.hold(DEVICE)
            assert time.monotonic() - started < 5
