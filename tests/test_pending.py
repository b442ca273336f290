"""Pending handshakes: who is served first, and who makes way when there is no room."""

from __future__ import annotations

import resource
import socket
import struct
import time
from collections.abc import Iterator

import pytest
from test_handshake import K
from test_x1 import terms

from ttun import handshake, handshakes
from ttun.handshakes import Handshakes, Host, Pending
from ttun.stop import StopFlag
from ttun.x1 import TO_SERVER, AnsweredNonces, marked_nonce

FEW = 4


class House:
    """Handshakes with a real listener that has room for a few."""

    def __init__(self, silent: bool = False) -> None:
        self.answered = AnsweredNonces(100)
        ours = terms(wire="x1" if silent else "auto")
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.setblocking(False)
        self.pending = Handshakes(StopFlag())
        self.pending.listen(
            Host(
                self.listener,
                lambda: handshake.server(K, ours, self.answered),
                lambda nonce: handshake.knows_key(K, ours, nonce, self.answered),
                silent,
            )
        )
        self.socks: list[socket.socket] = []

    def connect(self, data: bytes = b"") -> socket.socket:
        sock = socket.create_connection(self.listener.getsockname(), 5)
        self.socks.append(sock)
        if data:
            sock.sendall(data)
        return sock

    def turns(self, seconds: float = 0.05) -> None:
        """Look after it for so long."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.pending.turn(0.01)

    def close(self) -> None:
        self.pending.close()
        self.listener.close()
        for sock in self.socks:
            sock.close()


@pytest.fixture
def house(monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    monkeypatch.setattr(handshakes, "MOST", FEW)
    monkeypatch.setattr(handshakes, "MOST_PER_NETWORK", FEW)
    monkeypatch.setattr(Handshakes, "_most", lambda _: FEW)
    monkeypatch.setattr(handshakes, "SHARE", 1)
    made = House()
    yield made
    made.close()


def is_open(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        return sock.recv(100) != b""
    except BlockingIOError:
        return True
    except ConnectionError:
        return False


def test_who_can_be_read_is_served_before_another_is_accepted(house: House) -> None:
    """The one that had connected first was taken for silent with its bytes unread."""
    first = house.connect()
    for _ in range(FEW - 1):
        house.connect()
    house.turns(0.2)
    house.connect()  # both happen before the next turn
    first.sendall(bytes(16))
    house.turns()
    first.settimeout(5)
    assert len(first.recv(16)) == 16
    assert sum(map(is_open, house.socks)) == FEW


def test_the_oldest_silent_connection_makes_way(house: House) -> None:
    talkers = [house.connect(b"1") for _ in range(FEW - 2)]
    silent = house.connect()
    house.turns(0.05)
    younger = house.connect()
    house.turns(0.2)
    newcomer = house.connect()
    house.turns()
    assert not is_open(silent)
    assert all(map(is_open, [*talkers, younger, newcomer]))


def test_a_connection_is_silent_only_after_a_while() -> None:
    with socket.socket() as sock:
        peer = Pending(sock, "x", "x", since=100.0, deadline=110.0)
        assert peer.worth(100.0 + handshakes.SILENT_AFTER / 2) > peer.worth(101.0)
        peer.spoke = True
        assert peer.worth(101.0) > Pending(sock, "x", "x", 100.0, 110.0).worth(101.0)


def test_of_those_that_wait_the_ones_that_showed_the_key_stay(house: House) -> None:
    house.pending.hold()
    client = house.connect(marked_nonce(K, TO_SERVER))
    house.turns()
    for _ in range(3 * FEW):
        house.connect(bytes(16))
        house.turns(0.02)
    assert is_open(client)
    house.pending.release()
    house.turns()
    client.settimeout(5)
    assert len(client.recv(16)) == 16


def test_a_client_that_showed_the_key_is_not_pushed_out_by_those_that_did_not(house: House) -> None:
    client = house.connect(marked_nonce(K, TO_SERVER))
    house.turns()
    for _ in range(3 * FEW):
        house.connect(bytes(16))
        house.turns(0.02)
    client.settimeout(5)
    assert len(client.recv(16)) == 16
    assert is_open(client)


def test_a_client_that_leaves_while_it_waits_is_let_go_of(house: House) -> None:
    house.pending.hold()
    waiting = [house.connect(), house.connect(bytes(16)), house.connect(b"12")]
    house.turns()
    assert len(house.pending._pending) == 3
    for sock in waiting:
        sock.close()
    house.turns()
    assert not house.pending._pending


def test_nobody_is_held_for_longer_than_a_client_would_wait(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer whose host is gone says nothing any more, not even that it leaves."""
    monkeypatch.setattr(handshakes, "HELD_TIMEOUT", 0.3)
    house.pending.hold()
    waiting = [house.connect(), house.connect(bytes(16)), house.connect(b"12")]
    house.turns(0.1)
    assert all(map(is_open, waiting))
    house.turns(1)
    assert not any(map(is_open, waiting))


def test_a_session_leaves_those_alone_that_no_answer_was_sent_to(house: House) -> None:
    """One that was answered is dropped, as it cannot be served; the others wait."""
    answered, silent, halfway = house.connect(bytes(16)), house.connect(), house.connect(b"12")
    house.turns()
    house.pending.hold()
    answered.settimeout(5)
    assert len(answered.recv(16)) == 16
    assert answered.recv(1) == b""
    house.turns()
    assert is_open(silent)
    assert is_open(halfway)
    house.pending.release()
    halfway.sendall(bytes(14))
    house.turns()
    halfway.settimeout(5)
    assert len(halfway.recv(16)) == 16


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("size", [0, 1, 16, 17])
def test_a_stranger_who_ends_and_then_resets_costs_no_time(size: int, held: bool) -> None:
    """The socket stays in error, which recv() does not tell: that kept a core busy for a minute."""
    house = House(silent=True)
    try:
        if held:
            house.pending.hold()
        sock = house.connect(bytes(size))
        house.turns()
        sock.shutdown(socket.SHUT_WR)
        house.turns()
        assert len(house.pending._pending) == 1, "its end is no reason for ours"
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
        house.turns()
        assert not house.pending._pending
    finally:
        house.close()


def test_the_limit_on_descriptors_bounds_the_crowd() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        for limit, most in ((100, 90), (30, 25), (1, 1)):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
            assert 1 <= handshakes._room(0) <= most
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
