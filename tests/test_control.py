"""An x1 session over socketpairs: control frames, fresh keys and signs of life, against the
independent peer and between two of ours."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest
from peer import PING, PONG, REKEY, SWITCH, X1Peer, checksum
from socket_device import SocketDevice
from test_handshake import K, shake
from test_pump import FEW, MANY
from test_x1 import LOW_ORDER, OURS, ROLES, terms
from ttun._codec import lib
from tunnel import eventually

from ttun import control, handshake
from ttun.control import Limits
from ttun.session import Session

PACKET = b"\x45 a packet"
OFFLOAD = lib.TTUN_OFFLOAD_VNET | lib.TTUN_OFFLOAD_TCP | lib.TTUN_OFFLOAD_UDP
VNET = struct.Struct("=BBHHHH")


class Rig:
    """A session of ours in a role, its device, and the independent peer on the other end."""

    def __init__(
        self,
        role: str = "server",
        limits: Limits = control.DEFAULT_LIMITS,
        offload: int = 0,
        features: int = 3,
    ) -> None:
        """offload: of our device; features: what the peer says that it takes."""
        self.device = SocketDevice(offload)
        ours, theirs = socket.socketpair()
        self.peer = X1Peer(theirs, features=features)
        peer = threading.Thread(target=self.peer.shake, args=(1 - ROLES[role],))
        peer.start()
        keys = shake(OURS[role](K, terms("chacha20-poly1305")), ours)
        peer.join()
        self.session = Session(ours, self.device, keys, limits)  # type: ignore[arg-type]
        self.reason: str | None = None

    def end(self) -> str:
        if self.reason is None:
            self.session.stop()
            self.reason = self.session.wait()
        return self.reason

    def ended(self) -> str:
        self.reason = self.session.wait()
        return self.reason

    def carries_up(self) -> None:
        self.device.outside.send(PACKET)
        assert self.peer.receive_packet() == PACKET

    def carries_down(self) -> None:
        self.peer.send(PACKET)
        assert self.device.outside.recv(70000) == PACKET

    def carries(self) -> None:
        """A packet goes each way."""
        self.carries_up()
        self.carries_down()


@contextlib.contextmanager
def rigged(*arguments: object, **options: object) -> Iterator[Rig]:
    rig = Rig(*arguments, **options)  # type: ignore[arg-type]
    try:
        yield rig
    finally:
        rig.end()
        rig.peer.sock.close()


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
        assert rig.ended() == f"the peer sent a {name} frame out of place"
        assert rig.device.outside.recv(100) == PACKET, "what came before it counts"


def test_what_is_no_ip_packet_never_leaves_as_one() -> None:
    """On wire x1 it would be taken for a control frame."""
    with rigged() as rig:
        for first in (0, 2, 3, 4, 5, 0x20, 0x50, 0xFF):
            rig.device.outside.send(bytes([first]) + bytes(32))
        rig.carries()
        assert rig.session.counters().unsendable == 8


# ---- whole packets ------------------------------------------------------------------------------


def tcp4(payload: int, flags: int = 0x10) -> bytes:
    """An IPv4 packet with TCP, its checksum left to the kernel."""
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


# ---- fresh keys ---------------------------------------------------------------------------------

AT_ONCE = Limits(seconds=0.01)


def test_our_server_goes_on_with_fresh_keys() -> None:
    with rigged("server") as rig:
        for _ in range(3):
            rig.carries()
            rig.peer.begin_rekey()
            rig.carries()  # still under the old keys, both ways
            rig.peer.switch()
            rig.peer.switched()
            rig.carries()
        assert rig.session.control is not None and rig.session.control.rekeys == 3


def test_our_client_goes_on_with_fresh_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "LOOK_AT_CLOCK", 0.02)
    with rigged("client", AT_ONCE) as rig:
        for number in range(3):
            rig.carries()
            rig.peer.answer_rekey(rig.peer.receive_control(REKEY))
            rig.peer.switched()
            rig.carries_up()  # the other way is still under the old key
            rig.peer.switch()
            rig.carries_down()
            assert rig.session.control is not None
            assert rig.session.control.rekeys in (number, number + 1)


def test_without_packets_no_key_is_changed() -> None:
    with rigged("client", AT_ONCE) as rig:
        rig.peer.send(PING + bytes(8))
        time.sleep(0.3)
        rig.peer.send(PING + b"!" * 8)
        while (frame := rig.peer.receive()) != PONG + b"!" * 8:
            assert frame[:1] in (PING, PONG)


BAD_REKEYS = {
    "our server: SWITCH first": ("server", "s", "SWITCH frame out of place"),
    "our server: REKEY in the middle": ("server", "rr", "out of place"),
    "our server: SWITCH twice": ("server", "rss", "SWITCH frame out of place"),
    "our client: REKEY unasked": ("client", "r", "REKEY frame out of place"),
    "our client: SWITCH unasked": ("client", "s", "SWITCH frame out of place"),
    "our client: REKEY twice": ("client", "arr", "out of place"),
    "our client: SWITCH before REKEY": ("client", "as", "SWITCH frame out of place"),
}


@pytest.mark.parametrize("case", BAD_REKEYS)
def test_frames_of_a_rekey_in_a_wrong_state_end_it(case: str) -> None:
    """Letters: a awaits our REKEY, r sends REKEY, s sends SWITCH, in a role that does not fit."""
    role, steps, why = BAD_REKEYS[case]
    with rigged(role, AT_ONCE if "a" in steps else control.DEFAULT_LIMITS) as rig:
        rig.peer.send(PACKET)
        with contextlib.suppress(OSError, EOFError):
            for step in steps:
                if step == "a":
                    rig.peer.receive_control(REKEY)
                elif step == "r" and role == "server" and steps[:2] == "rs":
                    rig.peer.begin_rekey()
                elif step == "r":
                    rig.peer.send(REKEY + X1Peer.fresh(rig.peer))
                else:
                    rig.peer.send(SWITCH)
                    if hasattr(rig.peer, "next_sending") and steps[:2] == "rs":
                        rig.peer.sending = rig.peer.next_sending
        assert why in rig.ended()


@pytest.mark.parametrize("public", LOW_ORDER, ids=range(len(LOW_ORDER)))
@pytest.mark.parametrize("role", ROLES)
def test_a_rekey_that_gives_no_secret_ends_it(role: str, public: bytes) -> None:
    with rigged(role, AT_ONCE) as rig:
        rig.peer.send(PACKET)
        if role == "client":
            rig.peer.receive_control(REKEY)
        rig.peer.send(REKEY + public)
        assert rig.ended() == "the peer sent an X25519 key that gives no secret"


@pytest.mark.parametrize("role", ROLES)
def test_a_rekey_that_stops_in_the_middle_ends_it(
    role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "REKEY_TIMEOUT", 0.3)
    monkeypatch.setattr(control, "LOOK_AT_CLOCK", 0.05)
    with rigged(role, AT_ONCE if role == "client" else control.DEFAULT_LIMITS) as rig:
        rig.carries()
        if role == "server":
            rig.peer.begin_rekey()
        assert rig.ended() == "the peer did not go on with fresh keys"


@pytest.mark.parametrize("limits", [Limits(0.1), Limits(bytes=3000)], ids=["time", "bytes"])
def test_a_client_that_never_rekeys_is_ended_by_our_server(
    limits: Limits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "LOOK_AT_CLOCK", 0.02)
    with rigged("server", limits) as rig:
        for _ in range(7):
            rig.peer.send(b"\x45" * 1000)
        assert rig.ended() == "the peer let twice the life of a key pass"


class Both:
    """Two sessions of ours that talk to each other. limits: of the client."""

    def __init__(self, limits: Limits) -> None:
        ends = dict(zip(("client", "server"), socket.socketpair()))
        keys: dict[str, handshake.Keys] = {}

        def connect(role: str) -> None:
            keys[role] = shake(OURS[role](K, terms()), ends[role])

        threads = [threading.Thread(target=connect, args=(role,)) for role in ends]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.devices = {role: SocketDevice() for role in ends}
        self.sessions = {
            role: Session(
                ends[role],
                self.devices[role],  # type: ignore[arg-type]
                keys[role],
                limits if role == "client" else control.DEFAULT_LIMITS,
            )
            for role in ends
        }

    def rekeys(self) -> int:
        controls = [session.control for session in self.sessions.values()]
        return min(control.rekeys for control in controls if control)

    def end(self) -> list[str]:
        for session in self.sessions.values():
            session.stop()
        return [session.wait() for session in self.sessions.values()]


@pytest.mark.parametrize("cores", [FEW, MANY], ids=["few-cores", "many-cores"])
def test_rekeys_under_full_load_both_ways_lose_nothing(
    cores: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores)
    both = Both(Limits(seconds=0.005))
    stop = threading.Event()
    problems: list[str] = []
    seen = dict.fromkeys(both.devices, 0)

    def write(role: str) -> None:
        number = 0
        while not stop.is_set():
            both.devices[role].outside.send(struct.pack(">BQ", 0x45, number) + bytes(1200))
            number += 1

    def read(role: str) -> None:
        while not stop.is_set():
            (number,) = struct.unpack(">xQ", both.devices[role].outside.recv(70000)[:9])
            # A device that is full drops packets, as a real one does; none comes twice or late.
            if number < seen[role]:
                problems.append(f"{number} after {seen[role]}")
            seen[role] = number

    threads = [
        threading.Thread(target=target, args=(role,), daemon=True)
        for target in (read, write)
        for role in both.devices
    ]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 60
    while both.rekeys() < 10 and time.monotonic() < deadline:
        time.sleep(0.01)
    rekeys, carried = both.rekeys(), dict(seen)
    stop.set()
    reasons = both.end()
    for device in both.devices.values():
        device.outside.close()
    assert rekeys >= 10 and not problems
    assert all(count > 1000 for count in carried.values())
    assert reasons[0] == "stopped"


def test_a_session_may_end_at_any_moment_of_a_rekey() -> None:
    for number in range(150):
        both = Both(Limits(seconds=0))
        for device in both.devices.values():
            device.outside.send(PACKET)
        time.sleep(random.Random(number).uniform(0, 0.01))
        assert both.end()[0] == "stopped"
        for device in both.devices.values():
            device.inside.close()
            device.outside.close()


# ---- signs of life ------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that takes seconds takes a tenth."""
    for name in ("PING_AFTER", "DEAD_AFTER", "LOST_AFTER", "LOOK_AT_CLOCK"):
        monkeypatch.setattr(control, name, getattr(control, name) / 10)


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
        # Not one byte is read either: nothing is acknowledged.
        started = time.monotonic()
        assert "no sign of life from the peer" in rig.ended()
        assert time.monotonic() - started + 0.1 >= control.DEAD_AFTER
        assert time.monotonic() - started < control.LOST_AFTER


def test_a_slow_link_with_a_full_queue_is_not_dead_but_not_forever(impatient: None) -> None:
    """Its kernel takes a little of what waits again and again, and no frame comes back."""
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
        assert "no sign of life from the peer" in rig.ended()
