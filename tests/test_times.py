"""Timeouts that are too long to wait for: the times of docs/protocol.md, to the second.

The clock of the control thread is simulated, and so is the time since the last frame.
"""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
from machine import Clock
from peer import PING, PONG, REKEY
from ttun._codec import lib
from tunnel import eventually
from x1_rig import Rig, rigged

from ttun import control


class Codec:
    """The codec, with a simulated time since the peer's last frame."""

    silence = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(lib, name)

    def ttun_session_silence(self, session: object) -> int:
        return int(self.silence * 1000)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(control, "time", clock)
    monkeypatch.setattr(control, "LOOK_AT_CLOCK", 0.02)
    return clock


@pytest.fixture
def codec(monkeypatch: pytest.MonkeyPatch) -> Codec:
    codec = Codec()
    monkeypatch.setattr(control, "lib", codec)
    return codec


def frames_until_it_has_looked(rig: Rig) -> set[bytes]:
    """The types of all frames sent up to an answer after a timer check."""
    kinds = set()
    for _ in range(3):
        ping = os.urandom(8)
        rig.peer.send(PING + ping)
        while (frame := rig.peer.receive()) != PONG + ping:
            kinds.add(frame[:1])
        time.sleep(0.05)
    return kinds


def pass_time(rig: Rig, clock: Clock, until: float, codec: Codec | None = None) -> None:
    """Let it pass in steps: one of 2 s is that of an end which was stopped. codec: silent too."""
    ours = rig.session.control
    assert ours is not None
    while clock.ahead < until:
        clock.ahead = min(clock.ahead + 1.5, until)
        if codec is not None:
            codec.silence = clock.ahead
        now = clock.monotonic()
        eventually(lambda now=now: ours._looked_at >= now, "it has looked")


def is_in_use(rig: Rig) -> bool:
    """Whether the key is in use."""
    assert rig.session.control is not None
    return rig.session.control._used_since is not None


def ended(rig: Rig) -> str:
    """Why it ended, without being stopped."""
    eventually(lambda: rig.session.is_over, "it is over", 10)
    return rig.ended()


def test_a_client_begins_a_rekey_after_two_minutes(clock: Clock) -> None:
    with rigged("client") as rig:
        rig.carries()
        eventually(lambda: is_in_use(rig), "the key is in use")
        clock.ahead = 118
        assert REKEY not in frames_until_it_has_looked(rig)
        clock.ahead = 121
        rig.peer.receive_control(REKEY)


def test_a_server_lets_four_minutes_pass(clock: Clock) -> None:
    with rigged("server") as rig:
        rig.carries()
        eventually(lambda: is_in_use(rig), "the key is in use")
        clock.ahead = 238
        frames_until_it_has_looked(rig)
        clock.ahead = 241
        assert ended(rig) == "the peer did not rekey in time"


@pytest.mark.parametrize(("role", "since"), [("client", 100), ("server", 150)])
def test_a_client_counts_from_the_look_before_and_a_server_from_this_one(
    role: str, since: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traffic began somewhere between: so the client is the first to find the key old."""
    monkeypatch.setattr(control, "LOOK_AT_CLOCK", 1000)
    with rigged(role) as rig:
        assert rig.session.control is not None
        rig.session.control._looked_at = 100
        rig.carries()
        rig.session.control._check_key(150)
        assert rig.session.control._used_since == since


@pytest.mark.parametrize("role", ["client", "server"])
def test_the_peer_has_a_minute_to_go_on_with_a_rekey(role: str, clock: Clock) -> None:
    with rigged(role) as rig:
        rig.carries()
        if role == "client":
            eventually(lambda: is_in_use(rig), "the key is in use")
            clock.ahead = 121
            rig.peer.receive_control(REKEY)
        else:
            rig.peer.begin_rekey()
        clock.ahead += 58
        frames_until_it_has_looked(rig)
        clock.ahead += 3
        assert ended(rig) == "the peer did not complete the rekey"


def test_a_ping_follows_two_and_a_half_seconds_of_silence(clock: Clock, codec: Codec) -> None:
    with rigged() as rig:
        rig.peer.receive_control(PING)  # one is sent at the start
        clock.ahead = codec.silence = 2.2
        assert PING not in frames_until_it_has_looked(rig)
        clock.ahead = codec.silence = 3
        rig.peer.receive_control(PING)
        assert PING not in frames_until_it_has_looked(rig), "the next one is due later"
        clock.ahead, codec.silence = 9, 0
        assert PING not in frames_until_it_has_looked(rig), "the peer is heard"


def test_a_peer_that_takes_nothing_is_gone_after_sixteen_seconds(
    clock: Clock, codec: Codec
) -> None:
    with rigged() as rig:
        pass_time(rig, clock, 15, codec)
        time.sleep(0.3)
        assert not rig.session.is_over
        clock.ahead = codec.silence = 16.2
        assert ended(rig) == "peer timed out: last received 16 s ago"


def test_a_peer_that_takes_data_and_sends_nothing_is_gone_after_a_minute(
    clock: Clock, codec: Codec
) -> None:
    with rigged() as rig:
        ours = rig.session.control
        assert ours is not None
        pass_time(rig, clock, 58)
        sent = clock.monotonic()

        def has_seen() -> bool:
            rig.carries_up()
            return ours._progress_at >= sent

        eventually(has_seen, "it has seen that")
        codec.silence = 59
        time.sleep(0.3)
        assert not rig.session.is_over
        codec.silence = 60.2
        assert ended(rig) == "peer timed out: last received 60 s ago"
        assert clock.monotonic() - ours._progress_at < control.DEAD_AFTER, "not for another reason"
