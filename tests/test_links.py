"""Links that change under a tunnel: bandwidth, delay, loss, outages, a queue of seconds. The
session survives all of it, and reaches the rate of the link again.

TTUN_TEST_LONG=1 also runs the longest tests.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tunnel import CLIENT, SERVER, SERVER_ADDRESS, TUNNEL4, Bench, eventually, in_namespace

from ttun import control
from ttun.lab import netns
from ttun.lab.link_emulator import UP, Link, LinkedHosts

pytestmark = [pytest.mark.hosts, pytest.mark.slow]

ADDRESS, PORT = TUNNEL4[SERVER], "5001"
DATAGRAM = 1000  # bytes; its frame has 42 more
BOTH_WIRES = pytest.mark.parametrize("wire", ["x1", "v1"])
long = pytest.mark.skipif(not os.environ.get("TTUN_TEST_LONG"), reason="TTUN_TEST_LONG=1 runs it")


class Far(Bench):
    """Both ends of a tunnel, over a link that can change."""

    pair: LinkedHosts

    def connect(self) -> None:
        self.server_end, self.client_end = self.tunnel()
        self.answers()
        self.helper(SERVER, *netns.python("ttun.lab.link_traffic", "serve", ADDRESS, PORT))

    @contextlib.contextmanager
    def stream(self, action: str) -> Iterator[None]:
        """A stream through the tunnel, in the background."""
        command = netns.python("ttun.lab.link_traffic", action, ADDRESS, PORT, "1", "300")
        process = self.pair.start(CLIENT, command, environment=netns.environment(),
                                  stdout=subprocess.DEVNULL)  # fmt: skip
        try:
            self.carries(action)
            yield
            assert process.poll() is None, "the stream broke"
        finally:
            process.kill()
            process.wait()

    def carried(self, action: str) -> int:
        """Bytes received."""
        end = self.server_end if action == "up" else self.client_end
        return int(end.status()["counters"]["downlink_bytes"])

    def carries(self, action: str, seconds: float = 30) -> None:
        """Wait for more bytes of a stream."""
        before = self.carried(action)
        eventually(lambda: self.carried(action) > before + 20_000, "more arrives", seconds)

    def goodput(self, action: str, seconds: float = 1.5) -> float:
        """The rate of one stream through the tunnel, Mbit/s."""
        command = netns.python("ttun.lab.link_traffic", action, ADDRESS, PORT, "1", str(seconds))
        return float(self.run(CLIENT, *command)) / 1e6

    def pings(self, times: int = 20) -> list[float]:
        """Round-trip times through the tunnel in ms, without lost pings."""
        command = netns.python("ttun.lab.link_traffic", "ping", ADDRESS, str(times), "0.05")
        found = json.loads(self.run(CLIENT, *command))
        return [seconds * 1000 for seconds in found if seconds is not None]

    def is_one_session(self) -> None:
        for end in (self.server_end, self.client_end):
            status = end.status()
            assert (status["sessions"], status["peer"] is not None) == (1, True), end.log()


@contextlib.contextmanager
def far(directory: Path, link: Link, wire: str = "x1") -> Iterator[Far]:
    with LinkedHosts(link) as pair:
        made = Far(pair, directory, wire, [])
        for host in (SERVER, CLIENT):  # no packets of the kernel's own: idle ends are idle
            made.run(
                host, "sh", "-c", "echo 0 > /proc/sys/net/ipv6/conf/default/router_solicitations"
            )
        try:
            made.connect()
            yield made
        finally:
            made.close()


@pytest.fixture
def linked(tmp_path: Path) -> Iterator[Far]:
    with far(tmp_path, Link(rate=20, rtt=40)) as made:
        yield made


def bbr(linked: Far) -> str:
    """The kernel's line about the server's connection, under bbr."""
    line = linked.run(SERVER, "ss", "-tinH", "state", "established", "( sport = :20203 )")
    if " bbr " not in line:
        pytest.skip("no bbr in this kernel")
    return line


def gain(linked: Far) -> float:
    """Its pacing gain: 2.89 in startup, at most 1.25 later."""
    found = re.search(r"pacing_gain:([\d.]+)", bbr(linked))
    return 0 if found is None else float(found[1])


@pytest.mark.alone
def test_bbr_leaves_its_start_up_and_a_ping_does_not_wait_for_a_download(linked: Far) -> None:
    """Without help it stays there, with a queue of two round trips (csrc/connection.c).

    A ping beside the download usually takes 50 ms; 100 where the start-up goes on, 140 behind the
    queue of a congestion control that fills it.
    """

    bbr(linked)
    with linked.stream("down"):
        eventually(lambda: gain(linked) < 2, "start-up is over", 30)
        time.sleep(1)
        assert statistics.median(linked.pings(40)) < 95
    linked.is_one_session()


@pytest.mark.alone
def test_a_startup_is_paced_at_the_rate_of_its_window(tmp_path: Path) -> None:
    """At 2.89 times the bandwidth, cubic inside ends its slow start early (csrc/bbr.h)."""

    def window_time() -> float:
        """Round trips in which a window is sent; 1 if not in startup, or with little in flight."""
        line = bbr(linked)
        found = re.search(r"pacing_gain:2.*pacing_rate (\d+)bps", line)
        window, size, rtt = (
            float(re.search(rf"\b{name}:([\d.]+)", line)[1])  # type: ignore[index]
            for name in ("cwnd", "mss", "minrtt")
        )
        return window * size * 8 / float(found[1]) / rtt * 1000 if found and window > 300 else 1

    with far(tmp_path, Link(rate=100, rtt=100)) as linked:
        bbr(linked)
        with linked.stream("down"):
            eventually(lambda: window_time() < 0.6, "a higher pace", 10)
        linked.is_one_session()


@pytest.mark.alone
def test_a_startup_ends_where_the_queue_is_short(tmp_path: Path) -> None:
    """Usually 4 percent are lost. If it goes on (csrc/bbr.h), a third, and the rate is lower."""
    with far(tmp_path, Link(rate=100, rtt=100, queue=10)) as linked:
        bbr(linked)
        with linked.stream("down"):
            time.sleep(6)
            assert linked.server_end.status()["retransmitted"] < 0.15
        linked.is_one_session()


@pytest.mark.alone
def test_a_download_after_light_traffic_has_bbr_start_up_again(tmp_path: Path) -> None:
    """Where segments are lost, it then has a fraction of the link (csrc/bbr.h), mostly."""
    with far(tmp_path, Link(rate=50, rtt=40, loss=2)) as linked:
        bbr(linked)
        with linked.stream("down"):
            eventually(lambda: gain(linked) < 2, "the first start-up is over", 30)
            time.sleep(1)

        def starts_up() -> bool:
            linked.goodput("up", 1.5)
            with linked.stream("down"):
                gains = [gain(linked) for _ in range(20)]
                return max(gains) > 2

        eventually(starts_up, "start-up again", 60)
        linked.is_one_session()


@pytest.mark.alone
def test_bbr_need_not_stop_a_download_to_measure_the_minimum_round_trip(tmp_path: Path) -> None:
    """It would every ten seconds, with a window of four packets for 0.24 s (csrc/bbr.h)."""
    seen = []
    with far(tmp_path, Link(rate=10, rtt=40)) as linked, linked.stream("down"):
        end = time.monotonic() + 34
        while time.monotonic() < end:
            seen.append(" cwnd:4 " in bbr(linked))
            time.sleep(0.1)
        stops = sum(now and not before for before, now in zip(seen, seen[1:]))
        assert stops <= 1, "three without the pauses"
        linked.is_one_session()


@pytest.mark.alone
def test_an_upload_over_a_slow_link_makes_a_short_queue(tmp_path: Path) -> None:
    """Usually 3.8 kB wait; 6.2 kB with bbr alone (csrc/bbr.h), 20 ms more."""
    with far(tmp_path, Link(rate=10, rate_up=1, rtt=30)) as linked, linked.stream("up"):
        bbr(linked)

        def is_short() -> bool:
            waiting = []
            for _ in range(100):
                waiting.append(linked.pair.counters()[UP].waiting)
                time.sleep(0.05)
            return 0 < statistics.mean(waiting) < 5000

        eventually(is_short, "a short queue", 25)
        linked.is_one_session()


def test_a_link_that_stands_still_and_loses_nothing(tmp_path: Path) -> None:
    """The smoothed round-trip time is three seconds then: no reason to pause that long."""
    with far(tmp_path, Link(rate=20, rtt=40, queue=400)) as linked, linked.stream("down"):
        relay = getattr(linked.pair._emulator, "_process", None)
        if relay is None:
            pytest.skip("netem cannot stand still")
        time.sleep(1)
        relay.send_signal(signal.SIGSTOP)
        time.sleep(6)  # bbr's minimum stays valid for two seconds
        relay.send_signal(signal.SIGCONT)
        time.sleep(0.4)
        linked.carries("down", 1)
        linked.is_one_session()


def test_a_rate_of_a_tenth_and_the_whole_one_again(linked: Far) -> None:
    with linked.stream("down"):
        linked.pair.change(rate=2)
        time.sleep(3)
        linked.carries("down")
        assert len(linked.pings()) >= 10
        linked.pair.change(rate=20)
        linked.carries("down")
    assert linked.goodput("down") > 2
    linked.is_one_session()


def test_a_delay_that_doubles(linked: Far) -> None:
    with linked.stream("up"):
        linked.pair.change(rtt=80)
        linked.carries("up")
    time.sleep(0.5)
    assert 80 <= min(linked.pings()) < 400
    assert linked.goodput("up") > 2
    linked.is_one_session()


def test_a_while_of_loss(linked: Far) -> None:
    """One in twenty, each way."""
    with linked.stream("down"):
        linked.pair.change(loss=5)
        for _ in range(3):
            time.sleep(1)
            linked.carries("down")
        assert len(linked.pings()) >= 10
        linked.pair.change(loss=0)
        linked.carries("down")
    assert linked.goodput("down") > 2
    linked.is_one_session()


@pytest.mark.parametrize(
    ("wire", "seconds"),
    [("x1", 2), ("x1", 10), pytest.param("v1", 2, marks=long), pytest.param("v1", 10, marks=long)],
)
def test_a_while_of_nothing_at_all_under_load(tmp_path: Path, wire: str, seconds: int) -> None:
    with far(tmp_path, Link(rate=20, rtt=40), wire) as linked:
        with linked.stream("down"):
            with linked.pair.cut():
                time.sleep(seconds)
            linked.carries("down")
        assert linked.goodput("down") > 2
        linked.is_one_session()


def test_ten_seconds_of_nothing_at_all_between_two_idle_ends(linked: Far) -> None:
    """The outage begins just before each end sends a PING."""
    about_to_ask = control.PING_AFTER - 0.3
    eventually(lambda: linked.client_end.status()["silent_for"] > about_to_ask, "it is silent")
    with linked.pair.cut():
        time.sleep(10)
    linked.answers()
    assert len(linked.pings()) >= 10
    linked.is_one_session()


def test_less_up_than_down(tmp_path: Path) -> None:
    with far(tmp_path, Link(rate=10, rate_up=1, rtt=30)) as linked:
        assert linked.goodput("down") > 1
        assert 0.1 < linked.goodput("up", 3) <= 1
        with linked.stream("up"):
            assert len(linked.pings(40)) >= 20
        linked.is_one_session()


def test_a_satellite(tmp_path: Path) -> None:
    with far(tmp_path, Link(rate=20, rtt=600, queue=300)) as linked:
        assert 600 <= statistics.median(linked.pings()) < 900
        with linked.stream("down"):
            linked.pair.change(loss=1)
            linked.carries("down")
        linked.is_one_session()


@contextlib.contextmanager
def full_queue(pair: LinkedHosts, seconds: float) -> Iterator[None]:
    """Keep the uplink queue filled with so many seconds of other traffic."""
    over = threading.Event()
    wanted = seconds * pair.link_now.up * 1e6 / 8

    def fill() -> None:
        with in_namespace(
            pair.names[CLIENT], lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        ) as sock:
            while not over.wait(0.02):
                missing = int(wanted - pair.counters()[UP].waiting) // DATAGRAM
                for _ in range(min(missing, 200)):
                    sock.sendto(bytes(DATAGRAM), (SERVER_ADDRESS, 9))

    thread = threading.Thread(target=fill)
    thread.start()
    try:
        eventually(lambda: pair.counters()[UP].waiting > 0.9 * wanted, "a full queue")
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("load", ["idle", pytest.param("up", marks=long)])
def test_a_queue_of_ten_seconds_on_a_slow_link_is_no_death(tmp_path: Path, load: str) -> None:
    """When idle, the queue begins just after each end has received a frame."""
    with far(tmp_path, Link(rate=1, rtt=40, queue=14_000)) as linked, contextlib.ExitStack() as on:
        if load == "up":
            on.enter_context(linked.stream("up"))
        else:
            for heard in (False, True):
                eventually(
                    lambda heard=heard: (linked.server_end.status()["silent_for"] < 0.5) == heard,
                    "it has just heard from the other end",
                )
        with full_queue(linked.pair, 12):
            time.sleep(20)
        linked.is_one_session()


@long
@BOTH_WIRES
def test_twenty_seconds_of_nothing_at_all(tmp_path: Path, wire: str) -> None:
    """The session may end; the tunnel recovers."""
    with far(tmp_path, Link(rate=20, rtt=40), wire) as linked, linked.stream("down"):
        with linked.pair.cut():
            time.sleep(20)
        linked.carries("down", 60)


@long
def test_a_minute_of_loss(linked: Far) -> None:
    with linked.stream("down"):
        linked.pair.change(loss=5)
        for _ in range(60):
            time.sleep(1)
            linked.carries("down")
    linked.is_one_session()
