"""When the connection pauses or slows down for bbr (csrc/bbr.h); link and kernel are simulated."""

from __future__ import annotations

import ctypes
import shutil
import struct

import pytest
from bbr_rig import (
    AGAIN,
    BBR,
    BBR3,
    DCTCP,
    MBIT,
    QUEUED,
    RTT,
    SECOND,
    SEGMENT,
    UNLIMITED,
    Bbr,
    Kernel,
    Tcp,
    compiled,
)  # fmt: skip


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    return compiled(tmp_path_factory.mktemp("bbr"))


def pauses(
    code: ctypes.CDLL,
    size: int = BBR,
    *,
    later: int | None = None,
    smoothed: int = RTT + QUEUED,
    rate: int = 20 * MBIT,
) -> list[float]:
    """The pauses in 35 s of a busy link, in seconds. The kernel measures anew after each.

    size, later: of what it tells, and from the first pause on.
    """
    told = ctypes.c_uint.in_dll(code, "info_size")
    told.value = size
    info = (ctypes.c_ubyte * 64).in_dll(code, "info")
    bbr, found = Bbr(), []
    paused_at, now, min_rtt = None, SECOND, RTT
    while now < 36 * SECOND:
        struct.pack_into("=5I", info, 0, rate, 0, min_rtt, 256, 512)
        is_drained = paused_at is not None and now > paused_at + RTT + QUEUED
        segments = 0 if is_drained else 100
        tcp = Tcp(rate, segments * SEGMENT, segments, 0, 0, smoothed, RTT)
        code.bbr_look(ctypes.byref(bbr), 3, ctypes.c_uint64(now), ctypes.byref(tcp))
        if bbr.paused and paused_at is None:
            paused_at, told.value = now, size if later is None else later
        elif paused_at is not None and not bbr.paused:
            found.append((now - paused_at) / SECOND)
            paused_at, min_rtt = None, min_rtt + 1
        now += 2000 if bbr.paused else 10_000
    return found


def test_a_pause_every_ten_seconds_takes_a_round_trip(code: ctypes.CDLL) -> None:
    found = pauses(code)
    assert len(found) == 3
    assert all(RTT / SECOND < seconds < 0.1 for seconds in found)


def test_a_round_trip_that_is_no_longer_so_long_is_no_pause(code: ctypes.CDLL) -> None:
    assert pauses(code, smoothed=3 * SECOND) == []


def test_a_slow_link_has_no_pause(code: ctypes.CDLL) -> None:
    assert pauses(code, rate=4 * MBIT) == []


@pytest.mark.parametrize("size", [BBR3, DCTCP])
def test_other_congestion_controls_have_no_pause(code: ctypes.CDLL, size: int) -> None:
    """Of BBR3's the first 20 bytes are the same. It measures every five seconds, with more."""
    assert pauses(code, size) == []


@pytest.mark.parametrize("later", [DCTCP, 0])
def test_a_pause_ends_with_bbr(code: ctypes.CDLL, later: int) -> None:
    """Another holder of the socket has chosen another congestion control. 0: it cannot be asked."""
    assert len(pauses(code, later=later)) == 1


SLOW_RTT = 30_000


def queue(
    code: ctypes.CDLL,
    size: int = BBR,
    *,
    rate: int = MBIT,
    others: int = 0,
    size_each: int = SEGMENT,
) -> tuple[list[float], float]:
    """The segments that wait, every 10 ms of a minute, and the share of it that was slowed down.

    bbr paces at 1.25 times the rate for all of it. others: segments in flight, whatever it does.
    """
    ctypes.c_uint.in_dll(code, "info_size").value = size
    info = (ctypes.c_ubyte * 64).in_dll(code, "info")
    struct.pack_into("=5I", info, 0, rate, 0, SLOW_RTT, 320, 512)
    pacing = ctypes.c_uint.in_dll(code, "pacing")
    pacing.value = UNLIMITED
    bbr, held = Bbr(), rate * SLOW_RTT / SECOND / SEGMENT
    in_flight, waiting, slowed = held, [], 0
    for now in range(SECOND, 61 * SECOND, 10_000):
        segments = others or int(in_flight)
        tcp = Tcp(rate, segments * size_each, segments, 0, 0, 3 * SLOW_RTT, SLOW_RTT)
        code.bbr_look(ctypes.byref(bbr), 3, ctypes.c_uint64(now), ctypes.byref(tcp))
        sent = min(1.25 * rate, pacing.value)
        in_flight += 0.01 * (sent - rate * min(1, in_flight / held)) / SEGMENT
        waiting.append(in_flight - held)
        slowed += sent < rate
    return waiting, slowed / len(waiting)


def test_the_queue_of_a_slow_link_is_short_and_never_empty(code: ctypes.CDLL) -> None:
    waiting, _ = queue(code)
    assert max(waiting) < 6, "bbr alone would want seven and more"
    assert min(waiting[100:]) > 1.5, "where it ends, bbr measures less"


def test_a_queue_of_others_does_not_slow_it_down_for_good(code: ctypes.CDLL) -> None:
    _, slowed = queue(code, others=20)
    assert 0.4 < slowed < 0.6


@pytest.mark.parametrize(("size", "rate"), [(BBR, 2 * MBIT), (BBR3, MBIT), (DCTCP, MBIT)])
def test_no_other_link_is_slowed_down(code: ctypes.CDLL, size: int, rate: int) -> None:
    _, slowed = queue(code, size, rate=rate)
    assert slowed == 0


def test_acknowledgements_of_a_download_are_not_slowed_down(code: ctypes.CDLL) -> None:
    """Many are in flight, but they are small."""
    _, slowed = queue(code, others=20, size_each=150)
    assert slowed == 0


def startup(code: ctypes.CDLL, looks: list[tuple[int, int]], rtt: int = RTT) -> list[int]:
    """The limits of pacing in bytes per second, after each look at a connection in startup.

    looks: (microseconds since the last one, segments in flight). The bandwidth does not grow, and
    the smoothed round trip is that of delayed acknowledgements or of a queue. rtt: the shortest.
    """
    ctypes.c_uint.in_dll(code, "info_size").value = BBR
    info = (ctypes.c_ubyte * 64).in_dll(code, "info")
    struct.pack_into("=5I", info, 0, 2 * MBIT, 0, rtt, 739, 739)
    pacing = ctypes.c_uint.in_dll(code, "pacing")
    pacing.value = UNLIMITED
    bbr, now, limits = Bbr(), SECOND, []
    for after, segments in looks:
        now += after
        tcp = Tcp(UNLIMITED, segments * SEGMENT, segments, 0, 0, rtt + QUEUED, rtt)
        code.bbr_look(ctypes.byref(bbr), 3, ctypes.c_uint64(now), ctypes.byref(tcp))
        limits.append(pacing.value)
    return limits


def test_a_startup_without_growth_is_held_below_its_rate_for_a_while(code: ctypes.CDLL) -> None:
    limits = startup(code, [(10_000, 30)] * 75)
    held = [number for number, limit in enumerate(limits) if limit < UNLIMITED]
    assert set(limits) == {UNLIMITED, 2 * MBIT * 9 // 10}
    assert 3 * (RTT + QUEUED) < held[0] * 10_000 < 5 * (RTT + QUEUED)
    assert 9 * (RTT + QUEUED) < len(held) * 10_000 < 11 * (RTT + QUEUED)


def test_a_wait_for_a_lost_segment_is_no_silence(code: ctypes.CDLL) -> None:
    """The flow inside stands still for a round trip or two: the startup is held anyway."""
    looks = ([(10_000, 30)] * 5 + [(100_000, 30)]) * 5
    held = [number for number, limit in enumerate(startup(code, looks)) if limit < UNLIMITED]
    assert held[0] < 12


@pytest.mark.parametrize(("before", "silence"), [(0, 52_000), (0, 500_000), (30, 500_000)])
def test_what_follows_a_silence_is_not_taken_for_a_startup_without_growth(
    code: ctypes.CDLL, before: int, silence: int
) -> None:
    """Its bandwidth is that of the little traffic before: it would take seconds to send."""
    looks = [(10_000, before), (silence, 30), (10_000, 30), (10_000, 30)]
    assert set(startup(code, looks, rtt=2_000)) == {UNLIMITED}


def test_a_bandwidth_that_collapsed_starts_up_again_once(code: ctypes.CDLL) -> None:
    kernel = Kernel(code)
    assert kernel.look(6 * MBIT, 4) == "", "not before a round trip"
    assert kernel.look(6 * MBIT, 2) == AGAIN
    assert ctypes.c_int.in_dll(code, "closed").value == 4
    assert kernel.bbr.measured_at == kernel.now - 10_000, "bbr's ten seconds begin anew"
    assert kernel.look(40 * MBIT, 20, gain=739) == "", "startup may take it for more than it is"
    assert kernel.look(6 * MBIT, 100) == "", "that is what the link has now"
    assert kernel.look(20 * MBIT) + kernel.look(6 * MBIT, 6) == AGAIN


@pytest.mark.parametrize(
    ("bandwidth", "unsent", "queued"),
    [(21 * MBIT, 5000, 0), (6 * MBIT, 0, 0), (6 * MBIT, 5000, 12_000)],
    ids=["more than half", "all it has to send", "a queue"],
)
def test_a_bandwidth_that_is_low_for_a_reason_is_left_alone(
    code: ctypes.CDLL, bandwidth: int, unsent: int, queued: int
) -> None:
    kernel = Kernel(code)
    assert kernel.look(bandwidth, 100, unsent=unsent, queued=queued) == ""
    for _ in range(20):  # it has to last for a round trip
        kernel.look(6 * MBIT, 3)
        assert kernel.look(bandwidth, unsent=unsent, queued=queued) == ""


@pytest.mark.parametrize(("before", "size"), [(MBIT, BBR), (40 * MBIT, BBR3), (40 * MBIT, DCTCP)])
def test_no_slow_link_and_no_other_congestion_control_starts_up_again(
    code: ctypes.CDLL, before: int, size: int
) -> None:
    assert Kernel(code, before=before, size=size).look(before // 10, 100) == ""


STARTUP: dict[str, int] = {"gain": 739, "unsent": 0, "segment_size": SEGMENT}
OUTGROWN = STARTUP | {"window": 100, "pacing_rate": MBIT}


def first_pacing_rate(window: int, rtt: int = RTT) -> int:
    """Bytes per second: 2.885 times the window in a round trip, less one percent."""
    return int(2.885 * 0.99 * window * SEGMENT * SECOND / rtt)


def test_a_startup_whose_window_has_outgrown_its_pace_starts_up_again(code: ctypes.CDLL) -> None:
    kernel = Kernel(code)
    pace, window, restarts = 2 * MBIT, 10, 0
    for _ in range(20):  # the window doubles in four looks, as far as the kernel lets it
        found = kernel.look(pace // 3, pacing_rate=pace, window=window, **STARTUP)
        assert found in ("", AGAIN)
        if found:
            pace, restarts = first_pacing_rate(window), restarts + 1
            assert kernel.bbr.measured_at == kernel.now, "bbr's ten seconds begin anew"
        assert 1.3 * pace > first_pacing_rate(window), "the packets of a window take no longer"
        window += window // 5
    assert 8 < restarts < 20
    assert kernel.look(pace // 3, 100, pacing_rate=pace, window=window * 5 // 6, **STARTUP) == ""
    kernel.look(pace // 3, unacked=0, **STARTUP)
    assert kernel.look(MBIT, **OUTGROWN) == AGAIN, "the next transfer"
    assert kernel.look(MBIT, 9, **OUTGROWN) == "", "once, if that does not raise the pace"


def test_a_window_that_has_not_outgrown_its_pace(code: ctypes.CDLL) -> None:
    told = OUTGROWN | {"pacing_rate": first_pacing_rate(100) * 5 // 6}
    assert Kernel(code).look(MBIT, 10, **told) == ""


@pytest.mark.parametrize(
    "reason",
    [
        {"gain": 320},
        {"state": 3},
        {"unacked": 7},
        {"queued": 11_000},
        {"queued": 19_999 - RTT},
        {"pacing_rate": 2**64 - 1},
    ],
    ids=[
        "not in startup",
        "a segment is lost",
        "not busy",
        "a queue",
        "a short round trip",
        "not paced",
    ],
)
def test_any_other_connection_keeps_its_pace(code: ctypes.CDLL, reason: dict[str, int]) -> None:
    assert Kernel(code).look(MBIT, 10, **OUTGROWN | reason) == ""
    assert Kernel(code).look(MBIT, 10, **OUTGROWN, state=2) == AGAIN
    assert Kernel(code).look(MBIT, 10, **OUTGROWN, queued=20_000 - RTT) == AGAIN


@pytest.mark.parametrize("size", [BBR3, DCTCP])
def test_no_other_congestion_control_changes_its_pace(code: ctypes.CDLL, size: int) -> None:
    kernel = Kernel(code, size=size)
    assert kernel.look(MBIT, 10, window=100, pacing_rate=MBIT, **STARTUP) == ""


def test_a_loss_may_be_that_of_a_full_link_and_the_pace_stays(code: ctypes.CDLL) -> None:
    kernel = Kernel(code)
    kernel.look(MBIT, state=3, **OUTGROWN)
    assert kernel.look(MBIT, 10, **OUTGROWN) == "", "until it is busy anew"
    kernel.look(MBIT, **OUTGROWN | {"unacked": 3, "state": 3})
    assert kernel.look(MBIT, **OUTGROWN) == AGAIN, "that was light traffic"


def test_a_loss_before_a_silence_does_not_matter(code: ctypes.CDLL) -> None:
    kernel = Kernel(code)
    kernel.look(MBIT, state=3, **OUTGROWN)
    kernel.now += SECOND
    assert kernel.look(MBIT, **OUTGROWN) == AGAIN
    kernel.now += SECOND
    assert kernel.look(MBIT, **OUTGROWN) == AGAIN


def test_a_slow_flow_starts_up_without_its_limit(code: ctypes.CDLL) -> None:
    """It has so little of what it had that it was slowed down, as on a slow link."""
    kernel = Kernel(code, before=10 * MBIT)
    assert kernel.look(MBIT // 2, 2) == ""
    assert kernel.pacing.value == 46_875
    assert kernel.look(MBIT // 2, 3) == AGAIN
    assert kernel.pacing.value == UNLIMITED


def test_a_limit_ends_with_bbr(code: ctypes.CDLL) -> None:
    kernel = Kernel(code, before=10 * MBIT)
    kernel.look(MBIT // 2, 2)
    assert kernel.pacing.value == 46_875
    ctypes.c_uint.in_dll(code, "info_size").value = DCTCP
    kernel.look(MBIT // 2, 10)
    assert kernel.pacing.value == UNLIMITED


def test_a_startup_that_loses_much_is_held_after_one_round_trip(code: ctypes.CDLL) -> None:
    """The queue is too short to see."""
    kernel = Kernel(code)
    lossy = STARTUP | {"unacked": 320, "state": 3}
    kernel.look(40 * MBIT, 20, lost=56, **lossy)
    assert kernel.pacing.value == UNLIMITED, "five percent, and what chance may add"
    kernel.look(50 * MBIT, 5, lost=57, **lossy)
    assert kernel.pacing.value == UNLIMITED, "the bandwidth has grown"
    kernel.look(50 * MBIT, lost=57, **lossy)
    assert kernel.pacing.value == 45 * MBIT


def test_a_startup_again_has_its_three_round_trips(code: ctypes.CDLL) -> None:
    kernel = Kernel(code)
    kernel.look(MBIT, 20, **STARTUP)
    assert kernel.look(MBIT, **OUTGROWN) == AGAIN
    kernel.look(MBIT, 16, queued=QUEUED, **OUTGROWN)
    assert kernel.pacing.value == UNLIMITED
    kernel.look(MBIT, 4, queued=QUEUED, **OUTGROWN)
    assert kernel.pacing.value < MBIT


def test_a_startup_that_was_held_is_not_given_a_pace(code: ctypes.CDLL) -> None:
    kernel = Kernel(code)
    assert kernel.look(MBIT, 30, queued=QUEUED, **OUTGROWN) == ""
    assert kernel.look(MBIT, 100, **OUTGROWN) == "", "the queue has gone because it was held"


def test_a_timeout_is_no_sign_of_a_full_link(code: ctypes.CDLL) -> None:
    """All segments in flight count as lost then."""
    kernel = Kernel(code)
    kernel.look(MBIT, 20, unacked=100, lost=100, state=4, **STARTUP)
    assert kernel.pacing.value == UNLIMITED


def test_a_startup_without_an_acknowledgement_is_left_alone(code: ctypes.CDLL) -> None:
    """Until then, the kernel gives bandwidth and gain as 0."""
    kernel = Kernel(code)
    assert kernel.look(MBIT, **OUTGROWN) == AGAIN
    assert kernel.look(0, 20, **OUTGROWN | {"gain": 0, "window": 200}) == ""
    assert kernel.pacing.value == UNLIMITED


def test_a_new_pace_ends_a_pause(code: ctypes.CDLL) -> None:
    """The ten seconds begin anew; the pause would last as long."""
    kernel = Kernel(code)
    kernel.bbr.paused = True
    assert kernel.look(MBIT, **OUTGROWN) == AGAIN
    assert not kernel.bbr.paused


def test_a_pause_ends_without_an_acknowledgement(code: ctypes.CDLL) -> None:
    """Another holder of the socket has started bbr anew."""
    kernel = Kernel(code)
    kernel.bbr.paused = True
    kernel.look(0, 1010, gain=0, unacked=0)
    assert not kernel.bbr.paused


@pytest.mark.parametrize("lack", [{"allowed": 0}, {"scratch": -1}])
def test_where_bbr_may_not_be_chosen_the_connection_keeps_it(
    code: ctypes.CDLL, lack: dict[str, int]
) -> None:
    """An administrator's route chose it, or there is no descriptor to find out."""
    kernel = Kernel(code)
    kernel.set(**lack)
    asked = "4 bbr, " if "allowed" in lack else ""
    assert kernel.look(MBIT, 100, **OUTGROWN) == asked, "once"
    kernel = Kernel(code)
    kernel.set(**lack)
    assert kernel.look(6 * MBIT, 100) == asked, "once"
    assert kernel.bbr.measured_at < 2 * SECOND
    assert ctypes.c_int.in_dll(code, "closed").value == (4 if "allowed" in lack else 0)
