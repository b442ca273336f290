"""Pending handshakes: the order of service, and which are dropped at the limit."""

from __future__ import annotations

import contextlib
import resource
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest
from machine import Clock
from peer import X1Peer
from pending_rig import Harness, is_open, no_descriptors
from shaking import K, marked_nonce, shake, terms
from ttun._codec import ffi
from x1_rig import rigged

import ttun
from ttun import handshake, pending, summary, tcp
from ttun.cipher import TO_SERVER
from ttun.flag import Flag
from ttun.peer import SILENT_AFTER, HalfOpen, Peer
from ttun.pending import Pending

FEW = 4


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Iterator[Harness]:
    monkeypatch.setattr(pending, "MOST", FEW)
    monkeypatch.setattr(pending, "MOST_PER_SOURCE", FEW)
    monkeypatch.setattr(Pending, "_most_pending", lambda _: FEW)
    monkeypatch.setattr(pending, "SHARE", 1)
    made = Harness()
    yield made
    made.close()


def test_who_can_be_read_is_served_before_another_is_accepted(harness: Harness) -> None:
    """The oldest was once considered silent, with its bytes unread."""
    first = harness.connect()
    for _ in range(FEW - 1):
        harness.connect()
    harness.turns(0.2)
    harness.connect()  # both happen before the next turn
    first.sendall(bytes(16))
    harness.turns()
    first.settimeout(5)
    assert len(first.recv(16)) == 16
    assert sum(map(is_open, harness.socks)) == FEW


def test_the_oldest_silent_connection_makes_way(harness: Harness) -> None:
    talkers = [harness.connect(b"1") for _ in range(FEW - 2)]
    silent = harness.connect()
    harness.turns(0.05)
    younger = harness.connect()
    harness.turns(0.2)
    latest = harness.connect()
    harness.turns()
    assert not is_open(silent)
    assert all(map(is_open, [*talkers, younger, latest]))


def test_of_those_that_spoke_any_one_makes_way(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever opens many cannot know which."""
    monkeypatch.setattr(pending.random, "choice", lambda many: many[-1])
    talkers = [harness.connect(b"1") for _ in range(FEW)]
    harness.turns(0.1)
    harness.connect(b"1")
    harness.turns(0.1)
    assert list(map(is_open, talkers)) == [*[True] * (FEW - 1), False]


@pytest.fixture
def full_size(monkeypatch: pytest.MonkeyPatch) -> Iterator[Harness]:
    """With the full limit, descriptors for both ends of each connection, and all the time."""
    monkeypatch.setattr(pending, "TIMEOUT", 1000.0)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(2048, before[1]), before[1]))
        made = Harness()
        yield made
        made.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_one_address_has_64_connections_and_all_have_256(full_size: Harness) -> None:
    """As in SECURITY.md. The oldest silent ones are dropped."""

    def settles(left: int) -> None:
        """All were accepted, however slow this machine is, and so many are left."""
        end = time.monotonic() + 20
        while sum(map(is_open, full_size.socks)) != left and time.monotonic() < end:
            full_size.turns(2 * SILENT_AFTER)

    floods = []
    for last in range(2, 7):
        floods.append([full_size.connect(source=f"127.0.0.{last}") for _ in range(64)])
        full_size.turns(2 * SILENT_AFTER)
        settles(64 * min(last - 1, 4))
        if last == 2:
            more = [full_size.connect(source="127.0.0.2") for _ in range(6)]
            settles(64)
            assert [is_open(sock) for sock in floods[0] + more] == [False] * 6 + [True] * 64
    assert len(full_size.pending._half_open) == sum(map(is_open, full_size.socks)) == 256
    assert [sum(map(is_open, flood)) for flood in floods] == [0, 64, 64, 64, 64]


def test_a_silent_connection_makes_way_before_one_that_spoke(full_size: Harness) -> None:
    talker = full_size.connect(b"1")
    full_size.turns()
    silent = [full_size.connect() for _ in range(63)]
    full_size.turns(2 * SILENT_AFTER)
    for gone in range(1, 6):
        full_size.connect()
        full_size.turns()
        assert is_open(talker)
        assert [is_open(sock) for sock in silent[: gone + 1]] == [False] * gone + [True]


def proven() -> tuple[Peer, X1Peer]:
    """An authenticated peer of a server, and the other end of its socket."""
    ours, theirs = socket.socketpair()
    client = X1Peer(theirs)
    shaking = threading.Thread(target=client.shake, args=(0,))
    shaking.start()
    keys = shake(handshake.server(K, terms()), ours)
    shaking.join()
    return Peer(ours, "a peer", "socket", keys), client


def test_a_successor_that_another_one_replaces_is_closed_and_its_keys_are_wiped() -> None:
    """Also the one that waits when the server stops."""
    server = ttun.Server(b"secret", takeover=True)
    with rigged() as rig:
        (first, early), (second, late) = proven(), proven()
        server._new_peer(rig.session, first)
        server._new_peer(rig.session, second)
        assert early.sock.recv(1) == b""
        assert is_open(late.sock)
        assert any(secrets(second))
        server.stop()
        late.sock.settimeout(5)
        assert late.sock.recv(1) == b""
    for peer in (first, second):
        assert not any(secrets(peer))


def secrets(peer: Peer) -> bytes:
    """All the keys of its session."""
    assert peer.keys.agreement is not None
    states = [bytes(ffi.buffer(state.c)) for state in (peer.keys.sending, peer.keys.receiving)]
    return b"".join([*states, peer.keys.agreement.p])


def test_a_connection_is_silent_only_after_a_while() -> None:
    with socket.socket() as sock:
        peer = HalfOpen(sock, "x", "tcp", "x", since=100.0, deadline=110.0)
        assert peer.worth(100.0 + SILENT_AFTER / 2) > peer.worth(101.0)
        peer.nonce += b"1"
        assert peer.worth(101.0) > HalfOpen(sock, "x", "tcp", "x", 100.0, 110.0).worth(101.0)


def test_of_those_that_wait_the_ones_that_showed_the_key_stay(harness: Harness) -> None:
    harness.pending.hold()
    client = harness.connect(marked_nonce(TO_SERVER))
    harness.turns()
    for _ in range(3 * FEW):
        harness.connect(bytes(16))
        harness.turns(0.02)
    assert is_open(client)
    harness.pending.release()
    harness.turns()
    client.settimeout(5)
    assert len(client.recv(16)) == 16


def test_a_client_that_showed_the_key_is_not_pushed_out_by_those_that_did_not(
    harness: Harness,
) -> None:
    client = harness.connect(marked_nonce(TO_SERVER))
    harness.turns()
    for _ in range(3 * FEW):
        harness.connect(bytes(16))
        harness.turns(0.02)
    client.settimeout(5)
    assert len(client.recv(16)) == 16
    assert is_open(client)


def test_a_client_that_is_let_in_a_moment_before_the_next_session_waits_on(
    harness: Harness,
) -> None:
    """It uses no CPU time meanwhile, whatever it sends."""
    harness.pending.hold()
    client = harness.connect(bytes(17))
    harness.turns()
    harness.pending.release()
    harness.pending.hold()
    harness.turns()
    began = time.monotonic()
    harness.pending.turn(0.3)
    assert time.monotonic() - began >= 0.25, "there is nothing to do"
    assert is_open(client)
    harness.pending.release()
    harness.turns()
    client.settimeout(5)
    assert len(client.recv(16)) == 16


def test_a_turn_lasts_no_longer_than_the_last_beat_asked_for(harness: Harness) -> None:
    """A change of the device that a turn notices at its begin is read soon, not a second later."""
    harness.stop.on_beat = lambda: 0.01
    began = time.monotonic()
    for _ in range(20):
        harness.pending.turn()
    assert time.monotonic() - began < 10, "twenty turns of a second"


def test_a_handshake_that_lacks_memory_is_over(harness: Harness) -> None:
    def no_memory() -> handshake.Steps:
        raise MemoryError

    assert harness.pending._host is not None
    harness.pending._host = harness.pending._host._replace(begin=no_memory)
    client = harness.connect(bytes(16))
    with pytest.raises(MemoryError):
        harness.turns(5)
    assert not harness.pending._half_open
    assert not is_open(client)


def test_a_client_that_leaves_while_it_waits_is_let_go_of(harness: Harness) -> None:
    harness.pending.hold()
    waiting = [harness.connect(), harness.connect(bytes(16)), harness.connect(b"12")]
    harness.turns()
    assert len(harness.pending._half_open) == 3
    for sock in waiting:
        sock.close()
    harness.turns()
    assert not harness.pending._half_open


def test_nobody_is_held_for_longer_than_a_client_would_wait(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer whose host has vanished sends no FIN."""
    monkeypatch.setattr(pending, "HELD_TIMEOUT", 0.3)
    harness.pending.hold()
    waiting = [harness.connect(), harness.connect(bytes(16)), harness.connect(b"12")]
    harness.turns(0.1)
    assert all(map(is_open, waiting))
    harness.turns(1)
    assert not any(map(is_open, waiting))


@pytest.mark.parametrize(("held", "seconds"), [(False, 10), (True, 15)])
def test_a_handshake_has_ten_seconds_and_who_waits_for_a_session_fifteen(
    held: bool, seconds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock is set ahead."""
    clock = Clock()
    monkeypatch.setattr(pending, "time", clock)
    harness = Harness()
    try:
        if held:
            harness.pending.hold()
        silent, talker = harness.connect(), harness.connect(bytes(16))
        harness.turns()
        if not held:
            assert len(talker.recv(16)) == 16
        clock.ahead = seconds - 1
        harness.turns()
        assert is_open(silent) and is_open(talker)
        clock.ahead = seconds + 0.1
        harness.turns()
        assert not is_open(silent) and not is_open(talker)
    finally:
        harness.close()


def test_a_session_leaves_those_alone_that_no_answer_was_sent_to(harness: Harness) -> None:
    """One that was answered is dropped; the others wait."""
    answered, silent, halfway = (
        harness.connect(bytes(16)),
        harness.connect(),
        harness.connect(b"12"),
    )
    harness.turns()
    harness.pending.hold()
    answered.settimeout(5)
    assert len(answered.recv(16)) == 16
    assert answered.recv(1) == b""
    harness.turns()
    assert is_open(silent)
    assert is_open(halfway)
    harness.pending.release()
    halfway.sendall(bytes(14))
    harness.turns()
    halfway.settimeout(5)
    assert len(halfway.recv(16)) == 16


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("size", [0, 1, 16, 17])
def test_a_stranger_who_ends_and_then_resets_costs_no_time(size: int, held: bool) -> None:
    """recv() does not report the error of the socket: that once used a core for a minute."""
    harness = Harness(silent=True)
    try:
        if held:
            harness.pending.hold()
        sock = harness.connect(bytes(size))
        harness.turns()
        sock.shutdown(socket.SHUT_WR)
        harness.turns()
        assert len(harness.pending._half_open) == 1, "its end is no reason for ours"
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
        harness.turns()
        assert not harness.pending._half_open
    finally:
        harness.close()


def test_the_limit_on_descriptors_bounds_pending_handshakes() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        for limit, most in ((100, 90), (30, 25), (1, 1)):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
            assert 1 <= pending._descriptor_limit(0) <= most
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize(
    ("heard", "ending", "said"),
    [
        (b"", "close", "{}, before the server answered (does a ttun server listen there?)"),
        # As an alert of TLS: a ttun server sends its nonce whole.
        (bytes(7), "close", "{}, before the server answered (does a ttun server listen there?)"),
        (bytes(16), "close",
         "{} (probably a different pre-shared key, or with v1 a different cipher)"),
        (b"", "silence",
         "{} (no answer: different pre-shared key, or the server has another client)"),
        (bytes(16), "silence", "{}"),
    ],
)  # fmt: skip
def test_a_client_is_told_the_probable_cause(heard: bytes, ending: str, said: str) -> None:
    whys: list[str] = []
    waiting = Pending(Flag())
    waiting.on_failure = whys.append
    ours, theirs = socket.socketpair()
    with theirs, contextlib.closing(waiting):
        attempt = waiting.add(ours, "peer", tcp.kind, handshake.client(K, terms()), 0.3)
        theirs.sendall(heard)
        while waiting.is_pending(attempt):
            waiting.turn(0.1)
            if ending == "close":
                theirs.shutdown(socket.SHUT_WR)
    why = {"close": "connection closed during the handshake", "silence": "timed out after 0 s"}
    assert whys == ["handshake with peer failed: " + said.format(why[ending])]


def test_a_server_guesses_no_cause(harness: Harness) -> None:
    whys: list[str] = []
    harness.pending.on_failure = whys.append
    harness.connect(bytes(16)).shutdown(socket.SHUT_WR)
    harness.turns()
    assert [why.partition(" failed: ")[2] for why in whys] == [
        "connection closed during the handshake"
    ]


def test_a_shortage_that_lasts_is_one_line(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It was one a second, for ever: a summary begins anew after each period."""
    monkeypatch.setattr(pending, "PAUSE", 0.02)
    monkeypatch.setattr(summary, "PERIOD", 0.2)
    dialled = [socket.socket() for _ in range(2)]
    for times, sock in enumerate(dialled, 1):
        with no_descriptors():
            sock.connect(("127.0.0.1", harness.listener.port))
            harness.turns(2)
        assert caplog.text.count("cannot accept a connection: Too many open files") == times
        assert "more connections not accepted" not in caplog.text
        sock.sendall(bytes(16))
        harness.turns(0.5)
        sock.settimeout(5)
        assert len(sock.recv(16)) == 16, "it is served when that is over"
        sock.close()
        harness.turns(0.2)
