"""The loop that owns toxcore: its calls, its waits and its end. toxcore is on no network here."""

from __future__ import annotations

import math
import os
import socket
import time

import pytest

from ttun.summary import Summary
from ttun.tox.forwarder import Forwarder
from ttun.tox.instance import Tox
from ttun.tox.link import Link
from ttun.tox.loop import Loop, _internet_socket
from ttun.tox.protocol import Growth, Multiplexer

pytestmark = pytest.mark.tox


def test_a_call_after_the_end_touches_no_file_that_came_after_it() -> None:
    """A look-up may come back late, and woke what had the number of its descriptor by then."""
    loop = Loop(Tox(udp_ports=None))
    waker = loop._writable
    loop.start(Forwarder(loop))
    loop.stop()
    readable, writable = os.pipe()
    os.set_blocking(readable, False)
    try:
        os.dup2(writable, waker)  # if nobody else has it: now it is ours
        loop.call(lambda: None)
        with pytest.raises(BlockingIOError):
            os.read(readable, 1)
    finally:
        for descriptor in {readable, writable, waker}:
            os.close(descriptor)


def test_a_full_queue_is_waited_for() -> None:
    """toxcore has room again after a millisecond or two; 15,000 rounds a second were seen."""
    loop = Loop(Tox(udp_ports=None))
    mux = Multiplexer(server=True, first_id=0, growth=Growth())
    link = Link(loop, mux, 7, "a friend whom toxcore does not know", "UDP", bad=Summary("%d"))
    full, again = link.fill(time.monotonic())
    assert full
    assert again == math.inf, "the loop comes again when toxcore's interval is over"
    loop.start(Forwarder(loop))
    loop.stop()


def test_an_owner_that_fails_at_the_end_does_not_leave_others_waiting() -> None:
    loop = Loop(Tox(udp_ports=None))

    class Failing(Forwarder):
        def on_stop(self) -> None:
            raise ValueError("at the end")

    loop.start(Failing(loop))
    loop.stop()
    assert loop.over.is_set()
    assert isinstance(loop.error, ValueError)


def test_the_search_for_toxcores_sockets_leaves_those_of_others_as_they_are() -> None:
    """With a default timeout it made them non-blocking, which ended a tunnel's own session."""
    before = socket.getdefaulttimeout()
    loop = Loop(Tox(udp_ports=None))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs = listener.accept()[0]
    with ours, theirs, socket.socket(type=socket.SOCK_DGRAM) as datagrams:
        kinds = [_internet_socket(sock.fileno()) for sock in (ours, theirs, datagrams)]
        assert kinds == [socket.SOCK_STREAM, socket.SOCK_STREAM, socket.SOCK_DGRAM]
        assert _internet_socket(loop._readable) is None, "a pipe"
        socket.setdefaulttimeout(5)
        try:
            loop._search()
        finally:
            socket.setdefaulttimeout(before)
        assert [os.get_blocking(sock.fileno()) for sock in (ours, theirs)] == [True, True]
    loop.start(Forwarder(loop))
    loop.stop()
