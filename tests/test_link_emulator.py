"""The emulated link has the rate, delay, loss, queue and order that it should, also if changed."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import statistics
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest
from tunnel import CLIENT, SERVER, eventually, in_namespace

from ttun.errors import TtunError, UsageError
from ttun.lab import link_emulator, netns
from ttun.lab.demo import end
from ttun.lab.link_emulator import DOWN, UP, Link, LinkedHosts

pytestmark = pytest.mark.hosts

ADDRESS = netns.IPV4[SERVER]
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33  # asm-generic/socket.h
BODY = 1000  # bytes of a datagram; its frame has 42 more


def traffic(pair: LinkedHosts, *arguments: str) -> Any:
    """What the client's host measured; pytest shows why it could not."""
    command = pair.command(CLIENT, netns.python("ttun.lab.traffic", *arguments))
    done = subprocess.run(
        command, env={**os.environ, **netns.environment()}, stdout=subprocess.PIPE, check=True
    )
    return json.loads(done.stdout)


def pings(pair: LinkedHosts, times: int) -> list[float]:
    """The round trips of those that were answered, in ms."""
    found = traffic(pair, "ping", ADDRESS, str(times))
    return [seconds * 1000 for seconds in found if seconds is not None]


@contextlib.contextmanager
def serving(pair: LinkedHosts, module: str = "ttun.lab.link_traffic") -> Iterator[None]:
    process = pair.start(
        SERVER, netns.python(module, "serve", ADDRESS, "5001"),
        environment=netns.environment(), stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield
        process.stdout.close()
    finally:
        end(process)


def goodput(pair: LinkedHosts, action: str, seconds: float = 0.7) -> float:
    """What one stream carries, in Mbit/s."""
    command = netns.python("ttun.lab.link_traffic", action, ADDRESS, "5001", "1", str(seconds))
    process = pair.start(
        CLIENT, command, environment=netns.environment(), stdout=subprocess.PIPE
    )  # fmt: skip
    shown, _ = process.communicate(timeout=60)
    return float(shown) / 1e6


class Datagrams:
    """Numbered datagrams from the client to the server."""

    def __init__(self, pair: LinkedHosts) -> None:
        kind = (socket.AF_INET, socket.SOCK_DGRAM)
        self.receiver = in_namespace(pair.names[SERVER], lambda: socket.socket(*kind))
        self.sender = in_namespace(pair.names[CLIENT], lambda: socket.socket(*kind))
        try:
            self.receiver.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)
            self.sender.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 64 << 20)
        except PermissionError:
            pytest.skip("root of a user namespace may not have sockets that lose nothing")
        self.receiver.bind((ADDRESS, 0))
        self.sender.connect(self.receiver.getsockname())
        self.sent = 0

    def __enter__(self) -> Datagrams:
        return self

    def __exit__(self, *_: object) -> None:
        self.receiver.close()
        self.sender.close()

    def send(self, number: int) -> None:
        for _ in range(number):
            self.sender.send(self.sent.to_bytes(8, "big") + bytes(BODY - 8))
            self.sent += 1

    def arrived(self, silence: float = 1.0) -> list[int]:
        """The numbers of what arrives until nothing more does."""
        found = []
        while select.select([self.receiver], [], [], silence)[0]:
            found.append(int.from_bytes(self.receiver.recv(2000)[:8], "big"))
        return found


def test_each_direction_has_its_rate_and_both_change() -> None:
    with LinkedHosts(Link(rate=20, rate_up=5)) as pair, serving(pair):
        assert 6 < goodput(pair, "down") <= 20
        assert 1.5 < goodput(pair, "up") <= 5
        pair.change(rate=2, rate_up=30)
        assert 0.5 < goodput(pair, "down") <= 2
        assert 9 < goodput(pair, "up") <= 30


def test_half_of_the_round_trip_is_each_way_and_changes() -> None:
    with LinkedHosts(Link(rtt=30)) as pair:
        assert 30 <= min(pings(pair, 10)) < 45
        pair.change(rtt=90)
        assert 90 <= min(pings(pair, 5)) < 105
        pair.change(rtt=0)
        assert min(pings(pair, 10)) < 15


def test_so_many_are_lost() -> None:
    with LinkedHosts(Link(loss=30, queue=1000)) as pair, Datagrams(pair) as datagrams:
        datagrams.send(2000)
        assert 1200 < len(datagrams.arrived()) < 1600
        lost = pair.counters()[UP].lost
        assert 400 < lost < 800
        pair.change(loss=0)
        datagrams.send(500)
        assert len(datagrams.arrived()) == 500
        assert pair.counters()[UP].lost == lost


def test_what_would_wait_for_longer_than_the_queue_is_dropped() -> None:
    with LinkedHosts(Link(rate=10, queue=100)) as pair, Datagrams(pair) as datagrams:
        datagrams.send(400)  # 333 ms
        first = len(datagrams.arrived())
        assert 110 <= first < 250, "100 ms of them, and what left meanwhile"
        assert 400 - first <= pair.counters()[UP].dropped < 420 - first, "and some of the kernel's"
        pair.change(queue=1000)
        datagrams.send(400)
        assert len(datagrams.arrived()) == 400


def test_what_waits_in_the_queue_leaves_at_the_new_rate() -> None:
    with LinkedHosts(Link(rate=1, queue=10_000)) as pair, Datagrams(pair) as datagrams:
        datagrams.send(600)  # 5 s
        eventually(lambda: pair.counters()[UP].waiting > 500_000, "they wait")
        pair.change(rate=100)
        started = time.monotonic()
        assert len(datagrams.arrived()) == 600
        assert time.monotonic() - started < 4


def test_order_is_kept_when_the_delay_shrinks() -> None:
    with LinkedHosts(Link(rtt=600)) as pair, Datagrams(pair) as datagrams:
        datagrams.send(100)
        pair.change(rtt=0)
        datagrams.send(100)
        assert datagrams.arrived() == list(range(200))


def test_a_cut_link_lets_nothing_through_until_it_is_joined() -> None:
    with LinkedHosts(Link(rtt=10)) as pair, Datagrams(pair) as datagrams:
        with pair.cut():
            datagrams.send(50)
            pair.change(rtt=20)
            assert datagrams.arrived(0.5) == []
        assert pair.counters()[UP].lost >= 50
        datagrams.send(50)
        assert len(datagrams.arrived()) == 50
        assert len(pings(pair, 3)) == 3


def test_bytes_stay_as_they_are_while_the_ring_goes_round() -> None:
    with LinkedHosts(Link(rate=900, rtt=2)) as pair, serving(pair, "ttun.lab.traffic"):
        for action in ("send", "receive"):
            assert traffic(pair, action, ADDRESS, "5001", str(100 << 20))["whole"]


def test_a_full_ring_drops_and_goes_on() -> None:
    """30 s in flight, at a rate of which the ring has room for less than one."""
    link = Link(rate=10_000, rtt=60_000, queue=60_000)
    with LinkedHosts(link) as pair, Datagrams(pair) as datagrams:
        deadline = time.monotonic() + 30
        while pair.counters()[UP].dropped == 0:
            assert time.monotonic() < deadline
            datagrams.send(1000)
        pair.change(rtt=0)
        assert pair.counters()[DOWN].dropped == 0


def test_a_round_trip_is_steady() -> None:
    """What the relay adds by waking up late is less than a tenth of a short link's delay."""
    with LinkedHosts(Link(rtt=40)) as pair:
        assert statistics.median(pings(pair, 50)) < 60


@pytest.mark.parametrize("fields", [
    {"rate": 0}, {"rate": float("nan")}, {"rate_up": -1}, {"rtt": -1}, {"rtt": 1e9}, {"loss": 101},
    {"queue": float("inf")},
])  # fmt: skip
def test_a_value_out_of_range_is_one_line(fields: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="is out of range"):
        Link(**fields)


def relay(pair: netns.Namespaces, *arguments: str, given: str = "") -> tuple[int, str, str]:
    names = (pair.names[SERVER], "one", pair.names[CLIENT], "two")
    done = subprocess.run(
        [link_emulator._compiled(), *(names if arguments[:1] != ("none",) else ()),
         *(argument for argument in arguments if argument != "none")],
        input=given, capture_output=True, text=True, check=False, timeout=20,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("words", [
    "none", "none a b c", "speed 5", "rate", "rate 0", "rate 5/", "rate 5/0", "rate 5/5/5",
    "rate nan", "rtt -1", "rtt 1e9", "loss 101", "loss x", "queue 10ms", "seed 1.5e10", "cut",
])  # fmt: skip
def test_bad_usage_of_the_relay_is_one_line(pair: netns.Hosts, words: str) -> None:
    code, said, error = relay(pair, *words.split())
    assert (code, said) == (2, "")
    assert error.startswith("link_emulator: ")
    assert error.count("\n") == 1


def test_a_namespace_or_device_that_is_not_there_is_one_line(pair: netns.Hosts) -> None:
    program = link_emulator._compiled()
    for names in (("no-such", "one", "no-such", "two"), (pair.names[SERVER], "lo", "x", "y")):
        done = subprocess.run([program, *names], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1


def test_each_command_has_an_answer_and_a_bad_one_changes_nothing(pair: netns.Hosts) -> None:
    commands = "rate 5\nrate 0\n\nrtt 10 20\ncounters\ncut\njoin\nhelp\n"
    code, said, _ = relay(pair, given=commands)
    assert code == 0, "the end of its input is its end"
    answers = said.splitlines()
    assert answers[:2] == ["ready", "ok"]
    assert answers[2].startswith("rate: 0.01")
    assert answers[3] == answers[4] == "a command is a name and a value"
    assert len(answers[5].split()) == 10
    assert answers[6:8] == ["ok", "ok"]
    assert answers[8].startswith("unknown")
    assert relay(pair, given="x" * 10_000)[0] == 0, "too long for a command"


def test_a_relay_that_is_gone_is_one_line() -> None:
    with LinkedHosts(Link()) as pair:
        emulator = pair._emulator
        assert isinstance(emulator, link_emulator._Relay)
        assert emulator._process is not None
        emulator._process.kill()
        emulator._process.wait()
        with pytest.raises(TtunError, match="the link emulator exited"):
            pair.change(rtt=5)


def test_without_a_compiler_and_netem_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(TtunError, match=r"C compiler \(apt install gcc\)"):
        link_emulator.choose("relay")
    monkeypatch.setattr(link_emulator, "_has_netem", lambda: False)
    with pytest.raises(TtunError, match="a C compiler or netem"):
        link_emulator.choose("auto")
    with pytest.raises(TtunError, match="modprobe sch_netem"):
        link_emulator.choose("netem")
    with pytest.raises(UsageError, match="auto, relay or netem"):
        link_emulator.choose("tbf")
