"""Sockets that a program gives to an endpoint, and what else that program may do with them."""

from __future__ import annotations

import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest
from embedded import run
from pending_rig import Harness, is_open
from shaking import K, marked_nonce, terms
from tunnel import CLIENT, Bench

import ttun
from ttun import handshake, tcp
from ttun.cipher import TO_SERVER
from ttun.flag import Flag
from ttun.peer import Host
from ttun.pending import Pending

Ends = tuple[socket.socket, socket.socket]


@pytest.fixture
def given() -> Iterator[ttun.GivenSockets]:
    made = ttun.GivenSockets()
    yield made
    made.close()


@pytest.fixture
def waiting(given: ttun.GivenSockets) -> Iterator[Pending]:
    made = Pending(Flag())
    made.listen(Host(given, lambda: handshake.server(K, terms()), lambda _: False, False))
    yield made
    made.close()


@pytest.fixture
def ends() -> Iterator[Ends]:
    ours, theirs = socket.socketpair()
    theirs.settimeout(5)
    with ours, theirs:
        yield ours, theirs


@pytest.mark.hosts
def test_a_client_with_other_servers_goes_on_without_the_socket_that_it_was_given(
    plain: Bench,
) -> None:
    program = """
        import socket
        ours, theirs = socket.socketpair()
        servers = [ttun.GivenSocket(ours, "a pair"), "192.0.2.1"]
        client = ttun.Client(b"secret", server=servers)
        client.start()
        theirs.close()
        until(lambda: client.wait(0) or client.status().peer)
        print("peer:", client.status().peer)
        client.stop()
    """
    later = threading.Timer(5, plain.server)  # it is refused until then, so the pair is next
    later.start()
    try:
        said = run(plain, CLIENT, program)
    finally:
        later.join()
    assert "connection over a pair ended (it cannot be reopened); going on without it" in said
    assert "peer: 192.0.2.1:20203" in said


@pytest.mark.hosts
def test_a_program_that_closes_what_it_gave_closes_nothing(plain: Bench) -> None:
    """The session went on with the number, which by then was that of another connection."""
    program = """
        import socket
        one, other = socket.socketpair()
        given = ttun.GivenSockets()
        server = ttun.Server(b"secret", listen=given, device="ttun1")
        client = ttun.Client(b"secret", server=ttun.GivenSocket(other), device="ttun2")
        with server, client:
            given.give(one, "the client")
            until(lambda: client.status().peer and server.status().peer)
            one.close()
            other.close()
            later = [socket.socketpair() for _ in range(8)]
            time.sleep(6)  # with a PING every 2.5 s
            for sock in sum(map(list, later), []):
                sock.setblocking(False)
                try:
                    print("strayed:", sock.recv(1000))
                except BlockingIOError:
                    pass
            for end in (server, client):
                print("silent for less than 5 s:", end.status().silent_for < 5)
    """
    said = run(plain, CLIENT, program)
    assert "strayed" not in said
    assert said.count("silent for less than 5 s: True") == 2


def test_a_socket_that_the_program_closes_too_is_not_lost(
    given: ttun.GivenSockets, waiting: Pending, ends: Ends
) -> None:
    """It was found by its number, which a closed one has no more: the server once ended."""
    ours, theirs = ends
    assert given.give(ours, "x")
    waiting.turn(0.1)
    assert ours.fileno() == -1, "as after detach()"
    ours.close()
    theirs.sendall(bytes(16))
    for _ in range(3):
        waiting.turn(0.1)
    assert len(theirs.recv(16)) == 16


def test_a_socket_that_was_closed_meanwhile_costs_nobody_a_place(
    given: ttun.GivenSockets, waiting: Pending, ends: Ends, caplog: pytest.LogCaptureFixture
) -> None:
    """That is no shortage, and another connection was once dropped for it."""
    ours, theirs = ends
    assert given.give(ours, "x")
    waiting.turn(0.1)
    one, other = socket.socketpair()
    with one, other:
        assert given.give(one, "y")
    for _ in range(3):
        waiting.turn(0.1)
    assert "cannot accept a connection: Bad file descriptor" in caplog.text
    assert is_open(theirs)


def test_what_a_forked_child_gives_stays_in_the_child_and_its_parent_goes_on(
    given: ttun.GivenSockets, waiting: Pending, ends: Ends
) -> None:
    """The byte that announces it reaches the parent, which once found nothing and ended."""
    ours, theirs = ends
    for start in (lambda: None, given.start):
        start()
        child = os.fork()
        if child == 0:
            os._exit(given.give(ours, "x"))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (start != given.start)
        waiting.turn(0.2)
    assert given.give(ours, "x")
    theirs.sendall(marked_nonce(TO_SERVER))
    for _ in range(5):
        waiting.turn(0.2)
    assert len(theirs.recv(16)) == 16


def test_no_peer_sends_this_process_a_signal(given: ttun.GivenSockets, ends: Ends) -> None:
    """A program that embeds ttun may have SIGPIPE's default action, and would end."""
    received: list[int] = []
    before = signal.signal(signal.SIGPIPE, lambda number, _: received.append(number))
    harness = Harness()
    try:
        sock = harness.connect(bytes(16))
        sock.shutdown(socket.SHUT_WR)  # a reset after it makes a broken pipe of what we send
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
        time.sleep(0.1)
        harness.turns()
        ours, theirs = ends
        theirs.close()
        attempt = harness.pending.add(ours, "x", tcp.kind, handshake.client(K, terms()))
        harness.turns()
        assert not harness.pending.is_pending(attempt)
        assert not harness.pending._half_open
        given._readable.close()  # as in the middle of its close()
        one, other = socket.socketpair()
        with one, other:
            assert not given.give(one, "x")
    finally:
        harness.close()
        signal.signal(signal.SIGPIPE, before)
    assert not received
