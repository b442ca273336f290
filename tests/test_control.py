"""Control frames and liveness of an x1 session, against the independent peer."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from types import SimpleNamespace

import pytest
from peer import PING, PONG, REKEY, SWITCH, checksum
from shaking import ROLES
from ttun._codec import lib
from tunnel import eventually
from x1_rig import PACKET, Rig, rigged

from ttun import control
from ttun.settings import DEFAULT_LIMITS

OFFLOAD = lib.TTUN_OFFLOAD_VNET | lib.TTUN_OFFLOAD_TCP | lib.TTUN_OFFLOAD_UDP
VNET = struct.Struct("=BBHHHH")


# ---- frames -------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
def test_packets_and_pings_go_both_ways(role: str) -> None:
    with rigged(role) as rig:
        ping = rig.peer.receive_control(PING)
        assert len(ping) == 8
        rig.peer.send(PONG + ping)
        rig.peer.send(PING + b"12345678")
        assert rig.peer.receive_control(PONG) == b"12345678"
        rig.carries()
        assert 0 < eventually(lambda: rig.session.control.rtt, "a round-trip time") < 10


def test_a_pong_that_nobody_asked_for_is_nothing() -> None:
    with rigged() as rig:
        rig.peer.send(PONG + b"12345678")
        rig.carries()
        assert rig.session.control is not None and rig.session.control.rtt is None


def test_a_ping_storm_gets_few_answers_and_packets_pass() -> None:
    with rigged() as rig:
        storm = [struct.pack(">cQ", PING, n) for n in range(20_000)]
        started = time.monotonic()
        sending = threading.Thread(target=lambda: [rig.peer.send(ping) for ping in storm])
        sending.start()
        answers = 0
        while rig.peer.receive_control(PONG) != storm[-1][1:]:
            answers += 1
        sending.join()
        most = (time.monotonic() - started) / control.STORM_PAUSE
        assert answers < min(most + 2, len(storm) / 2), "newer ones take the place of older ones"
        rig.carries()


def test_a_storm_of_any_control_frame_costs_little(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    look = control.Control._look_at_clock
    monkeypatch.setattr(
        control.Control, "_look_at_clock", lambda *each: looks.append(1) or look(*each)
    )
    with rigged("server") as rig:
        for kind in ("PONG", "REKEY"):
            looks.clear()
            started = time.monotonic()
            while time.monotonic() < started + 1:
                if kind == "PONG":
                    rig.peer.send(PONG + bytes(8))
                else:
                    rig.peer.begin_rekey()
                    rig.peer.switch()
                    rig.peer.switched()
            most = (time.monotonic() - started) / control.STORM_PAUSE
            assert len(looks) < most + 3, kind
        rig.carries()


@pytest.mark.parametrize("first", [0, 6, 7, 0x10, 0x3F, 0x70, 0xFF])
def test_unknown_types_are_ignored_and_counted(first: int) -> None:
    with rigged() as rig:
        for size in (0, 1, 100, 60000):
            rig.peer.send(bytes([first]) + bytes(size))
        rig.carries()
        assert rig.session.counters().ignored == 4


@pytest.mark.parametrize(
    ("plaintext", "name"),
    [
        (PING, "PING"),
        (PING + bytes(7), "PING"),
        (PING + bytes(9), "PING"),
        (PONG + bytes(1000), "PONG"),
        (REKEY + bytes(31), "REKEY"),
        (REKEY + bytes(33), "REKEY"),
        (SWITCH + b"\0", "SWITCH"),
        (SWITCH, "SWITCH"),
    ],
)
@pytest.mark.parametrize("role", ROLES)
def test_a_malformed_control_frame_ends_it(role: str, plaintext: bytes, name: str) -> None:
    with rigged(role) as rig:
        rig.peer.send(PACKET)
        rig.peer.send(plaintext)
        assert rig.ended() == f"the peer sent an unexpected {name} frame"
        assert rig.device.outside.recv(100) == PACKET, "what came before it counts"


def test_what_is_no_ip_packet_never_leaves_as_one() -> None:
    """In protocol x1 it would be read as a control frame."""
    with rigged() as rig:
        for first in (0, 2, 3, 4, 5, 0x20, 0x50, 0xFF):
            rig.device.outside.send(bytes([first]) + bytes(32))
        rig.carries()
        assert rig.session.counters().unsendable == 8


# ---- offloaded packets --------------------------------------------------------------------------


def tcp4(payload: int, flags: int = 0x10) -> bytes:
    """An IPv4 TCP packet with a partial checksum."""
    addresses = socket.inet_aton("10.1.1.1") + socket.inet_aton("10.1.1.2")
    header = struct.pack(">BBHHHBBH", 0x45, 0, 40 + payload, 1, 0x4000, 64, 6, 0) + addresses
    header = header[:10] + struct.pack(">H", checksum(header)) + header[12:]
    pseudo = 0xFFFF - checksum(addresses + struct.pack(">HH", 6, 20 + payload))
    tcp = struct.pack(">HHIIBBHHH", 1, 2, 3, 4, 0x50, flags, 5, pseudo, 0)
    return header + tcp + os.urandom(payload)


@pytest.mark.parametrize("payload", [1241, 20_000, 65_000])
def test_a_packet_of_the_kernels_stays_whole_both_ways(payload: int) -> None:
    with rigged(offload=OFFLOAD) as rig:
        packet = tcp4(payload)
        header = VNET.pack(1, 1, 40, 1240, 20, 16)
        rig.device.outside.send(header + packet)
        assert rig.peer.receive_packet() == b"\x01" + struct.pack(">H", 1240) + packet
        rig.peer.send(b"\x01" + struct.pack(">H", 1240) + packet)
        assert rig.device.outside.recv(70000) == header + packet
        rig.end()
        counters = rig.session.counters()
        assert (counters.uplink_bytes, counters.downlink_bytes) == (len(packet), len(packet))


def test_a_peer_without_offload_gets_segments() -> None:
    with rigged(offload=OFFLOAD, features=0) as rig:
        packet = tcp4(5000)
        rig.device.outside.send(VNET.pack(1, 1, 40, 1240, 20, 16) + packet)
        segments = [rig.peer.receive_packet() for _ in range(5)]
        assert b"".join(segment[40:] for segment in segments) == packet[40:]


@pytest.mark.parametrize("offload", [0, lib.TTUN_OFFLOAD_VNET])
def test_a_device_without_offload_takes_no_whole_packet(offload: int) -> None:
    with rigged(offload=offload) as rig:
        rig.peer.send(b"\x01" + struct.pack(">H", 1240) + tcp4(5000))
        rig.peer.send(PACKET)
        assert rig.device.outside.recv(70000).endswith(PACKET)
        rig.end()
        assert rig.session.counters().forged == 1


# ---- liveness -----------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Divide all timeouts by ten."""
    names = "PING_AFTER PING_FOR_OTHERS DEAD_AFTER DEAD_TO_OTHERS LOST_AFTER DOUBTED_FOR"
    for name in [*names.split(), "LOOK_AT_CLOCK"]:
        monkeypatch.setattr(control, name, getattr(control, name) / 10)


def test_tcp_repeats_at_least_every_two_seconds_where_the_kernel_can() -> None:
    """Else the first packet after an outage of 10 s would come 10 s later."""
    with rigged() as rig, socket.socket() as sock:
        try:
            sock.getsockopt(socket.IPPROTO_TCP, 44)  # TCP_RTO_MAX_MS, linux/tcp.h
        except OSError:
            pytest.skip("Linux before 6.15")
        agreement = rig.session.control._agreement
        control.Control(rig.session._c, sock, agreement, DEFAULT_LIMITS)
        assert sock.getsockopt(socket.IPPROTO_TCP, 44) == 2000


def test_the_silence_of_the_peer_is_told_in_seconds() -> None:
    with rigged() as rig:
        for _ in range(5):
            before = time.monotonic()
            rig.carries_down()
            after = time.monotonic()
            time.sleep(0.3)
            least = time.monotonic() - after
            silence = rig.session.silence()
            most = time.monotonic() - before
            assert least - 0.05 <= silence <= most + 0.05


def test_an_idle_peer_that_answers_pings_lives(impatient: None) -> None:
    with rigged() as rig:
        deadline = time.monotonic() + 2.5 * control.DEAD_AFTER
        pings = 0
        while time.monotonic() < deadline:
            rig.peer.send(PONG + rig.peer.receive_control(PING))
            pings += 1
        assert pings >= 3
        rig.carries()


def test_a_peer_that_says_nothing_is_gone(impatient: None) -> None:
    with rigged() as rig:
        # Nothing is read, so nothing is acknowledged.
        started = time.monotonic()
        assert "peer timed out" in rig.ended()
        assert time.monotonic() - started + 0.1 >= control.DEAD_AFTER
        assert time.monotonic() - started < control.LOST_AFTER


def test_a_peer_that_says_nothing_while_another_waits_is_gone_earlier(impatient: None) -> None:
    with rigged() as rig:
        assert rig.session.control is not None
        rig.session.control.others_wait = True
        deadline = time.monotonic() + 1.5 * control.DEAD_AFTER
        asked = []
        while time.monotonic() < deadline:  # not one that answers
            rig.peer.send(PONG + rig.peer.receive_control(PING))
            asked.append(time.monotonic())
        gaps = [after - before for before, after in zip(asked, asked[1:])]
        assert min(gaps) < 0.8 * control.PING_AFTER, "it is asked earlier too"
        started = time.monotonic()
        assert "peer timed out" in rig.ended()
        took = time.monotonic() - started
        assert control.DEAD_TO_OTHERS - 0.1 <= took < control.DEAD_AFTER


def doubt(rig: Rig) -> float:
    """Let it be idle for some pings, then doubt its peer."""
    assert rig.session.control is not None
    for _ in range(2):
        rig.peer.send(PONG + rig.peer.receive_control(PING))
    rig.session.control.doubt()
    return time.monotonic()


def test_a_peer_in_doubt_that_acknowledges_nothing_is_gone(impatient: None) -> None:
    """Even if it sends: its packets may still arrive, those to it may not."""
    with rigged() as rig:
        started = doubt(rig)
        while rig.session.control and rig.session.control.reason is None:
            rig.peer.send(b"\x45" * 40)
            time.sleep(0.05)
        took = time.monotonic() - started
        assert control.DOUBTED_FOR <= took < control.DEAD_AFTER
        assert "since the route to the peer changed" in rig.ended()


def test_a_peer_in_doubt_that_acknowledges_lives(impatient: None) -> None:
    """A ping, which comes at once, or what is before it in a full queue."""
    with rigged() as rig:
        started = doubt(rig)
        rig.peer.receive_control(PING)
        assert time.monotonic() - started < control.PING_AFTER
        time.sleep(2 * control.DOUBTED_FOR)
        rig.carries()
        rig.device.outside.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                rig.device.outside.send(b"\x45" * 60_000)
        assert rig.session.control is not None
        rig.session.control.doubt()
        deadline = time.monotonic() + 2 * control.DOUBTED_FOR
        while time.monotonic() < deadline:
            rig.peer.sock.recv(2000)
            time.sleep(0.02)
        assert rig.session.control.reason is None


@pytest.mark.parametrize(("idle", "stops", "others_wait"), [(0, 20, False), (2.4, 3.8, True)])
def test_an_end_that_was_stopped_first_reads_what_came_meanwhile(
    monkeypatch: pytest.MonkeyPatch, idle: float, stops: float, others_wait: bool
) -> None:
    """By SIGSTOP, say. When all its threads run again, this one may be the first."""
    stopped = 0.0

    class Codec:
        def __getattr__(self, name: str) -> object:
            return getattr(lib, name)

        def ttun_session_silence(self, session: object) -> float:
            return float(lib.ttun_session_silence(session) + 1000 * stopped)

    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + stopped, sleep=time.sleep)
    with rigged() as rig:
        monkeypatch.setattr(control, "time", clock)
        monkeypatch.setattr(control, "lib", Codec())
        assert rig.session.control is not None
        rig.session.control.others_wait = others_wait
        rig.carries()
        time.sleep(1.5 * control.LOOK_AT_CLOCK)  # it has seen the acknowledgement
        rig.carries_down()
        time.sleep(idle)
        stopped = stops
        time.sleep(1.5 * control.LOOK_AT_CLOCK)
        assert rig.session.control.reason is None
        rig.carries()
        for name in ("DEAD_AFTER", "DEAD_TO_OTHERS"):
            monkeypatch.setattr(control, name, 2)
        assert "peer timed out" in rig.ended(), "it did not come back"


def test_a_slow_link_with_a_full_queue_is_not_dead_but_not_forever(impatient: None) -> None:
    """Its kernel slowly acknowledges data, but no frame arrives."""
    with rigged() as rig:
        packet = b"\x45" * 60_000
        rig.device.outside.setblocking(False)
        started = time.monotonic()
        while rig.session.control and rig.session.control.reason is None:
            with contextlib.suppress(BlockingIOError):
                rig.device.outside.send(packet)
            rig.peer.sock.recv(2000)
            time.sleep(0.01)
            assert time.monotonic() - started < 10 * control.LOST_AFTER
        assert time.monotonic() - started >= control.LOST_AFTER - 0.5
        assert "peer timed out" in rig.ended()
