"""Pending handshakes: what a turn of the loop does and how long it takes, and what a server that
accepts x1 only does with strangers."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from peer import X1Peer
from pending_rig import Harness, is_open, no_descriptors
from shaking import K, marked_nonce, terms

from ttun import handshake, pending, summary, tcp
from ttun.cipher import TO_SERVER
from ttun.flag import Flag
from ttun.peer import HalfOpen
from ttun.pending import Pending
from ttun.server import Server


@pytest.fixture
def harness() -> Iterator[Harness]:
    made = Harness()
    yield made
    made.close()


def lasts(waiting: Pending, seconds: float = 0.3) -> bool:
    """Whether a turn waits so long: there is nothing to do."""
    began = time.monotonic()
    waiting.turn(seconds)
    return time.monotonic() - began >= 0.8 * seconds


def test_a_client_that_has_sent_its_nonce_only_waits() -> None:
    waiting = Pending(Flag())
    ours, theirs = socket.socketpair()
    with theirs, contextlib.closing(waiting):
        waiting.add(ours, "peer", tcp.kind, handshake.client(K, terms()))
        waiting.turn(0.3)
        assert len(theirs.recv(100)) == 16
        assert lasts(waiting)


def test_a_flag_that_a_forked_process_sets_stops_this_one(harness: Harness) -> None:
    """They share its descriptor, which stays readable: a loop that ignored it would spin."""
    child = os.fork()
    if child == 0:
        harness.stop.set()
        os._exit(0)
    os.waitpid(child, 0)
    harness.turns()
    assert harness.stop.is_set()


def test_a_descriptor_that_is_gone_is_reported_once() -> None:
    waiting = Pending(Flag())
    reading, writing = os.pipe()
    waiting.watch(reading)
    assert lasts(waiting)
    os.close(writing)
    assert not lasts(waiting, 10)
    assert lasts(waiting)
    waiting.close()
    os.close(reading)


def test_a_session_whose_threads_see_the_reset_later_is_not_waited_for_a_second() -> None:
    """The kernel wakes the endpoint and the threads of the session at once."""

    class Late:
        control = SimpleNamespace()

        def __init__(self, sock: socket.socket) -> None:
            self.fileno, self.over_at = sock.fileno, time.monotonic() + 0.03

        @property
        def is_over(self) -> bool:
            return time.monotonic() >= self.over_at

    server = Server(b"secret")
    server._watch = SimpleNamespace(lost_local=None, watch_connection=lambda _: None)  # type: ignore[assignment]
    ours, theirs = socket.socketpair()
    with ours:
        theirs.close()
        late = Late(ours)
        server._attend(late, ours)  # type: ignore[arg-type]
        assert time.monotonic() - late.over_at < 0.5


def test_a_nonce_may_come_in_parts(harness: Harness) -> None:
    client = harness.connect(bytes(15))
    harness.turns()
    client.sendall(bytes(1))
    harness.turns()
    client.settimeout(5)
    assert len(client.recv(100)) == 16


def test_a_nonce_that_comes_in_parts_shows_the_key_as_well(harness: Harness) -> None:
    harness.pending.hold()
    nonce = marked_nonce(TO_SERVER)
    client = harness.connect(nonce[:15])
    harness.turns()
    client.sendall(nonce[15:])
    harness.turns()
    assert [peer.knows_key for peer in harness.pending._half_open.values()] == [True]
    assert lasts(harness.pending)


def test_it_tells_whether_one_waits_that_shows_the_key(harness: Harness) -> None:
    harness.pending.hold()
    harness.connect(bytes(16))
    harness.turns()
    assert not harness.pending.key_waits
    client = harness.connect(marked_nonce(TO_SERVER))
    harness.turns()
    assert harness.pending.key_waits
    client.close()
    harness.turns()
    assert not harness.pending.key_waits


def test_a_turn_returns_the_peer_that_proved_the_key(harness: Harness) -> None:
    client = X1Peer(harness.connect())
    shaking = threading.Thread(target=client.shake, args=(0,))
    shaking.start()
    end, peer = time.monotonic() + 20, None
    while peer is None and time.monotonic() < end:
        peer = harness.pending.turn(0.05)
    shaking.join()
    assert peer is not None and peer.keys.wire == "x1"
    with peer.sock:
        assert is_open(client.sock) and not harness.pending._half_open


def test_who_is_let_in_has_all_the_time_of_a_handshake(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long it has waited."""
    monkeypatch.setattr(pending, "HELD_TIMEOUT", 0.5)
    harness.pending.hold()
    client = harness.connect(bytes(16))
    harness.turns(0.3)
    harness.pending.release()
    harness.turns(0.6)
    assert is_open(client) or len(client.recv(16)) == 16
    assert len(harness.pending._half_open) == 1


def test_the_log_says_what_it_left_out_also_during_a_session(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """But not at once: sessions in a loop must not begin the counting anew."""
    caplog.set_level("INFO", "ttun")
    for _ in range(40):
        harness.connect().close()
        harness.turns(0.01)
    harness.pending.hold()
    harness.turns(0.01)
    assert "more connected" not in caplog.text
    monkeypatch.setattr(summary, "PERIOD", 0.0)
    harness.turns(0.01)
    assert "more connected" in caplog.text and "more handshakes failed" in caplog.text


def test_without_proc_some_descriptors_are_taken_for_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_proc(_: str) -> list[str]:
        raise OSError

    monkeypatch.setattr(pending.os, "listdir", no_proc)
    monkeypatch.setattr(pending.resource, "getrlimit", lambda _: (100, 100))
    assert pending._descriptor_limit(0) == 100 - 24 - pending.RESERVE
    monkeypatch.setattr(pending.resource, "getrlimit", lambda _: (20, 20))
    assert pending._descriptor_limit(0) == 1


# ---- a server that accepts x1 only ----


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Harness]:
    monkeypatch.setattr(pending, "UNRECOGNIZED_TIMEOUT", (0.5, 0.6))
    made = Harness(silent=True)
    yield made
    made.close()


def test_it_reads_what_a_stranger_sends_and_does_not_spin_at_its_end(silent: Harness) -> None:
    stranger = silent.connect(bytes(100))
    silent.turns()
    stranger.shutdown(socket.SHUT_WR)
    silent.turns()
    assert lasts(silent.pending)
    assert is_open(stranger)
    silent.turns(0.6)
    assert not is_open(stranger)


def test_who_shows_the_key_may_wait_longer_than_strangers(silent: Harness) -> None:
    silent.pending.hold()
    client, stranger = silent.connect(marked_nonce(TO_SERVER)), silent.connect(bytes(16))
    silent.turns(1)
    assert is_open(client) and not is_open(stranger)
    silent.pending.release()
    silent.turns(1)
    client.settimeout(5)
    assert len(client.recv(16)) == 16
    assert is_open(client), "a handshake takes longer, too"


def test_who_showed_the_key_and_then_breaks_off_is_closed_at_once(silent: Harness) -> None:
    client = silent.connect(marked_nonce(TO_SERVER))
    silent.turns()
    client.settimeout(5)
    assert len(client.recv(16)) == 16
    client.sendall(b"\0\x18" + bytes(24))
    silent.turns()
    assert not is_open(client)


def test_in_an_overload_strangers_are_dropped_first_then_the_silent(silent: Harness) -> None:
    def worth(**known: object) -> int:
        with socket.socket() as sock:
            return HalfOpen(sock, "x", "tcp", "x", 100.0, 110.0, **known).worth(105.0)  # type: ignore[arg-type]

    order = [worth(unrecognized=True), worth(), worth(nonce=bytearray(b"1")), worth(knows_key=True)]
    assert sorted({*order}) == order


def test_a_connection_that_cannot_be_set_up_is_closed_and_told_of(
    harness: Harness, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tune(_: socket.socket) -> None:
        raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))

    monkeypatch.setattr(pending, "PAUSE", 0.05)
    with monkeypatch.context() as patched:
        patched.setattr(tcp, "tune", tune)
        first = harness.connect()
        harness.turns()
    assert not is_open(first)
    assert "cannot accept a connection: No buffer space available" in caplog.text
    second = harness.connect()
    harness.turns(0.3)
    assert is_open(second)
    assert len(harness.pending._half_open) == 1


def test_without_a_descriptor_the_oldest_pending_one_makes_way_at_once(harness: Harness) -> None:
    first = harness.connect()
    harness.turns()
    with socket.socket() as second, no_descriptors():
        second.connect(("127.0.0.1", harness.listener.port))
        harness.turns(0.3)
        assert not is_open(first)
        second.sendall(bytes(16))
        harness.turns(0.3)
        second.settimeout(5)
        assert len(second.recv(16)) == 16, "and the next is served"


def test_the_log_names_who_begins_a_handshake_and_who_fails(
    harness: Harness, silent: Harness, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    for rig, said in ((harness, "handshaking"), (silent, "failed: ")):
        name = "{}:{}".format(*rig.connect(b"GET / HTTP/1.1\r\n\r\n" * 5).getsockname())
        rig.turns(0.2)
        assert any(name in line and said in line for line in caplog.messages), said
