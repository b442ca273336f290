"""Rekeying of an x1 session: against the independent peer, between two ttun ends under load, and
protocol violations.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import threading
import time
import weakref

import pytest
from peer import PING, PONG, REKEY, SWITCH, X1Peer
from shaking import LOW_ORDER, OURS, ROLES, K, shake, terms
from socket_device import SocketDevice
from tunnel import eventually
from x1_rig import PACKET, rigged

from ttun import control, handshake
from ttun.session import Session
from ttun.settings import Limits

FEW, MANY = [0, 1], [0, 1, 2, 3]
AT_ONCE = Limits(seconds=0.01)


def test_our_server_goes_on_with_fresh_keys() -> None:
    with rigged("server") as rig:
        for _ in range(3):
            rig.carries()
            rig.peer.begin_rekey()
            rig.carries()  # still under the old keys, in both directions
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
            rig.carries_up()  # the other direction is still under the old key
            rig.peer.switch()
            time.sleep(0.1 * number)  # with that, this packet counts and the next rekey begins
            rig.carries_down()
            time.sleep(0.1 * number)
            # A packet before the new key is in use does not count for it.
            eventually(lambda n=number: rig.session.control.rekeys == n + 1, "it has gone on")


def test_our_client_rekeys_when_it_is_due_not_at_the_next_check_of_the_timers() -> None:
    """The timers are checked each second; an interval of 0.1 s is kept all the same."""
    with rigged("client", Limits(seconds=0.1)) as rig:
        began = time.monotonic()
        for number in range(3):
            rig.carries()
            rig.peer.answer_rekey(rig.peer.receive_control(REKEY))
            rig.peer.switched()
            rig.peer.switch()
            eventually(lambda n=number: rig.session.control.rekeys == n + 1, "it has gone on")
        took = time.monotonic() - began
    assert 0.2 < took < control.LOOK_AT_CLOCK * 2, "three checks of the timers take longer"


def test_the_key_of_a_rekey_that_was_not_completed_is_wiped_with_the_session() -> None:
    """The endpoint keeps the session, for its counters."""
    with rigged("client", limits=AT_ONCE) as rig:
        rig.carries()
        assert rig.session.control is not None
        pair = weakref.ref(eventually(lambda: rig.session.control._pair, "a rekey"))
        rig.end()
        assert pair() is None


def test_without_packets_no_key_is_changed() -> None:
    with rigged("client", AT_ONCE) as rig:
        rig.peer.send(PING + bytes(8))
        time.sleep(0.3)
        rig.peer.send(PING + b"!" * 8)
        while (frame := rig.peer.receive()) != PONG + b"!" * 8:
            assert frame[:1] in (PING, PONG)


BAD_REKEYS = {
    "our server: SWITCH first": ("server", "s", "unexpected SWITCH frame"),
    "our server: REKEY in the middle": ("server", "rr", "unexpected REKEY frame"),
    "our server: SWITCH twice": ("server", "rss", "unexpected SWITCH frame"),
    "our client: REKEY unasked": ("client", "r", "unexpected REKEY frame"),
    "our client: SWITCH unasked": ("client", "s", "unexpected SWITCH frame"),
    "our client: REKEY twice": ("client", "arr", "unexpected REKEY frame"),
    "our client: SWITCH before REKEY": ("client", "as", "unexpected SWITCH frame"),
}


@pytest.mark.parametrize("case", BAD_REKEYS)
def test_frames_of_a_rekey_in_a_wrong_state_end_it(case: str) -> None:
    """Letters: a awaits our REKEY, r sends REKEY, s sends SWITCH, in a role that does not fit."""
    role, steps, why = BAD_REKEYS[case]
    with rigged(role, AT_ONCE if "a" in steps else Limits()) as rig:
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
        assert rig.ended() == "the peer sent a low-order X25519 key"


@pytest.mark.parametrize("role", ROLES)
def test_a_rekey_that_stops_in_the_middle_ends_it(
    role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "REKEY_TIMEOUT", 0.3)
    monkeypatch.setattr(control, "LOOK_AT_CLOCK", 0.05)
    with rigged(role, AT_ONCE if role == "client" else Limits()) as rig:
        rig.carries()
        if role == "server":
            rig.peer.begin_rekey()
        assert rig.ended() == "the peer did not complete the rekey"


@pytest.mark.parametrize("limits", [Limits(0.1), Limits(bytes=3000)], ids=["time", "bytes"])
def test_a_client_that_never_rekeys_is_ended_by_our_server(
    limits: Limits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "LOOK_AT_CLOCK", 0.02)
    with rigged("server", limits) as rig:
        for _ in range(7):
            rig.peer.send(b"\x45" * 1000)
        assert rig.ended() == "the peer did not rekey in time"


class Both:
    """Two ttun sessions, connected to each other. limits: of the client."""

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
                limits if role == "client" else Limits(),
            )
            for role in ends
        }

    def rekeys(self) -> int:
        controls = [session.control for session in self.sessions.values()]
        return min(control.rekeys for control in controls if control)

    def end(self) -> list[str]:
        for session in self.sessions.values():
            session.end("stopped")
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
        with contextlib.suppress(OSError):  # it has ended
            while not stop.is_set():
                both.devices[role].outside.send(struct.pack(">BQ", 0x45, number) + bytes(1200))
                number += 1

    def read(role: str) -> None:
        with contextlib.suppress(OSError):
            read_numbers(role)

    def read_numbers(role: str) -> None:
        while not stop.is_set():
            (number,) = struct.unpack(">xQ", both.devices[role].outside.recv(70000)[:9])
            # A full device drops packets, like a real one; none is duplicated or reordered.
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
