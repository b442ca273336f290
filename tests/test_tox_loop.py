"""The loop that owns toxcore: its calls, its waits and its end. toxcore is on no network here."""

from __future__ import annotations

import math
import os
import time

import pytest

from ttun.tox.forwarder import Forwarder
from ttun.tox.instance import Tox
from ttun.tox.link import Link
from ttun.tox.loop import Loop
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
    link = Link(loop, mux, 7, "a friend whom toxcore does not know")
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
