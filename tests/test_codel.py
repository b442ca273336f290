"""CoDel: the control law of RFC 8289, and its effect on a tunnel."""

from __future__ import annotations

import contextlib
import struct
import threading
from collections.abc import Iterator
from math import inf, isqrt, sqrt
from typing import Any, NamedTuple

import pytest
from ttun._codec import ffi, lib
from tunnel import CLIENT, OTHER, SERVER, TUNNEL4, Bench

TARGET, INTERVAL = 2000, 100_000  # microseconds
STEP = 100
MOST = 10_000  # counted drops
SMALL, LARGE = 256, 257  # bytes: small packets are never dropped


class Codel:
    """A CoDel state that is updated every STEP microseconds."""

    def __init__(self) -> None:
        self.state = ffi.new("struct ttun_codel *")
        self.pace = ffi.new("struct ttun_codel_pace *", {"target": TARGET, "interval": INTERVAL})
        self.now = 0

    def drops(self, delay: int, during: int) -> list[int]:
        """The times of drops at a constant delay, in microseconds from now."""
        start, dropped = self.now, []
        while self.now < start + during:
            lib.ttun_codel_watch(self.state, self.now, delay, self.pace)
            if lib.ttun_codel_drops(self.state, LARGE):
                dropped.append(self.now - start)
            self.now += STEP
        return dropped


def law(first: int, n: int, count: int = 1) -> list[float]:
    """The times of the first n drops, from `first` on, as in section 5.5 of the RFC."""
    times = [float(first)]
    while len(times) < n:
        times.append(times[-1] + INTERVAL / sqrt(count))
        count += 1
    return times


def test_a_delay_below_the_target_drops_nothing() -> None:
    assert Codel().drops(TARGET - 1, 10 * INTERVAL) == []


def test_a_burst_that_is_over_within_an_interval_drops_nothing() -> None:
    codel = Codel()
    for _ in range(20):
        assert codel.drops(50 * TARGET, INTERVAL - STEP) == []
        assert codel.drops(0, STEP) == []


def test_a_standing_queue_drops_ever_more_often() -> None:
    dropped = Codel().drops(TARGET, 20 * INTERVAL)
    expected = law(INTERVAL, len(dropped))
    assert len(dropped) > 90
    for n, (at, ideal) in enumerate(zip(dropped, expected)):
        assert at == pytest.approx(ideal, rel=0.02, abs=(n + 1) * STEP)


def test_a_sender_who_never_slows_down_costs_no_more_than_a_drop_in_a_millisecond() -> None:
    codel = Codel()
    codel.drops(TARGET, 300 * INTERVAL)
    assert len(codel.drops(TARGET, INTERVAL)) == pytest.approx(100, abs=1)


def test_the_drops_end_with_the_queue() -> None:
    codel = Codel()
    assert codel.drops(TARGET, 5 * INTERVAL)
    assert codel.drops(TARGET - 1, STEP) == []
    assert codel.drops(TARGET, INTERVAL - STEP) == [], "an interval above the target, again"


@pytest.mark.parametrize(("rest", "resumed"), [(INTERVAL, True), (20 * INTERVAL, False)])
def test_soon_after_it_goes_on_where_it_was(rest: int, resumed: bool) -> None:
    codel = Codel()
    before = len(codel.drops(TARGET, 10 * INTERVAL))
    codel.drops(0, rest)
    first, second = codel.drops(TARGET, 3 * INTERVAL)[:2]
    count = before - 2 if resumed else 1
    assert second - first == pytest.approx(INTERVAL / sqrt(count), rel=0.05, abs=2 * STEP)


# ---- the control law, to the microsecond: a state, a time, and what it becomes ----


class State(NamedTuple):
    """struct ttun_codel of csrc/codel.h."""

    above: int = 0
    next: int = 0
    count: int = 0
    dropping: bool = False
    due: bool = False


LAYOUT = struct.Struct("@QQI??2x")


def watched(now: int, **state: Any) -> State:
    """The state after a look at `now`, with a delay above the target."""
    codel = ffi.new("struct ttun_codel *")
    memory = ffi.buffer(codel)
    assert len(memory) == LAYOUT.size
    memory[:] = LAYOUT.pack(*State(**state))
    pace = ffi.new("struct ttun_codel_pace *", {"target": TARGET, "interval": INTERVAL})
    lib.ttun_codel_watch(codel, now, TARGET, pace)
    return State(*LAYOUT.unpack(memory))


def test_each_gap_is_the_interval_by_the_root_of_the_count() -> None:
    for count in range(1, MOST + 1):
        state = {"above": 1, "next": 5000, "count": count - 1, "dropping": True}
        after = watched(5000, **state)
        assert after.due and after.count == count
        assert after.next == 5000 + INTERVAL * 16 // isqrt(256 * count)
    after = watched(5000, above=1, next=5000, count=MOST, dropping=True)
    assert after.count == MOST, "no more than a drop in a millisecond"


def test_a_drop_is_due_at_its_time_and_not_a_microsecond_earlier() -> None:
    assert watched(700).above == 700 + INTERVAL
    assert [watched(now, above=500).due for now in (499, 500)] == [False, True]
    dropping = {"above": 1, "count": 1, "dropping": True, "next": 900}
    assert [watched(now, **dropping).due for now in (899, 900)] == [False, True]


@pytest.mark.parametrize(
    ("count", "rest", "resumes"),
    [
        (10, 16 * INTERVAL - 1, 8),
        (10, 16 * INTERVAL, 1),
        (4, 0, 2),
        (3, 0, 1),
        (2, 0, 1),
        (1, 0, 1),
    ],
)
def test_an_episode_resumes_near_the_rate_of_the_last_for_sixteen_intervals(
    count: int, rest: int, resumes: int
) -> None:
    after = watched(1000 + rest, above=1, count=count, next=1000)
    assert (after.due, after.dropping, after.count) == (True, True, resumes)
    assert after.next == 1000 + rest + INTERVAL * 16 // isqrt(256 * resumes)


def test_a_small_packet_is_spared_and_the_next_large_one_is_not() -> None:
    codel = Codel()
    codel.drops(TARGET, INTERVAL)
    lib.ttun_codel_watch(codel.state, codel.now, TARGET, codel.pace)
    sizes = (SMALL, 84, LARGE, LARGE)
    assert [lib.ttun_codel_drops(codel.state, size) for size in sizes] == [0, 0, 1, 0]


def test_a_drop_that_met_no_large_packet_is_forgotten_with_the_queue() -> None:
    codel = Codel()
    codel.drops(TARGET, INTERVAL)
    for delay in (TARGET, 0):
        lib.ttun_codel_watch(codel.state, codel.now, delay, codel.pace)
    assert not lib.ttun_codel_drops(codel.state, LARGE)


@contextlib.contextmanager
def shaped(bench: Bench, rate: str) -> Iterator[None]:
    """Limit the link between the hosts, with a queue of 50 ms."""
    for host in (SERVER, CLIENT):
        bench.run(host, "tc", "qdisc", "add", "dev", bench.pair.links[host], "root",
                  "tbf", "rate", rate, "burst", "64k", "latency", "50ms")  # fmt: skip
    try:
        yield
    finally:
        for host in (SERVER, CLIENT):
            bench.run(host, "tc", "qdisc", "del", "dev", bench.pair.links[host], "root")


@pytest.mark.hosts
@pytest.mark.alone
@pytest.mark.parametrize("sender", [SERVER, CLIENT])
def test_a_full_tunnel_still_answers(bench: Bench, sender: str) -> None:
    """Eight streams whose congestion control knows losses only fill whatever queue there is.

    Usually 30 ms; without the drops x1 has more than a second.
    """
    with shaped(bench, "100mbit"):
        ends = bench.tunnel()
        receiver = OTHER[sender]
        bench.serve_traffic(receiver, TUNNEL4[receiver])
        device = bench.devices(sender)[0]
        bench.run(sender, "ip", "route", "add", TUNNEL4[receiver], "dev", device,
                  "src", TUNNEL4[sender], "congctl", "reno")  # fmt: skip
        rates: list[float] = []
        flood = threading.Thread(
            target=lambda: rates.append(
                bench.traffic(sender, "flood", TUNNEL4[receiver], "5001", "8", "6")
            )
        )
        flood.start()
        flood.join(2)
        times = bench.traffic(sender, "ping", TUNNEL4[receiver], "20", "56")
        flood.join()
        # One in ten may be late; None is one that had no answer within a second.
        assert sorted(inf if seconds is None else seconds for seconds in times)[17] < 0.3
        assert rates[0] > 50e6, "and the link is used"
        end = next(end for end in ends if end.host == sender)
        end.stop()
        assert "dropped: queue full" in end.log()
