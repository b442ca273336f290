"""An online friend: its tunnels and streams, and the rate at which packets are sent to it.

1. receive() passes a packet to the multiplexer. Events for a stream go to that stream; events for
   the role are returned.
2. fill() hands packets to toxcore: first the control queue, then the streams in turn.
"""

from __future__ import annotations

import functools
import logging
import math
import socket
import struct
import time
from collections import deque
from typing import Callable

from ttun.errors import ProtocolError
from ttun.summary import Summary
from ttun.tox import protocol
from ttun.tox.loop import Loop
from ttun.tox.protocol import TUNNEL_EVENTS, Event, Multiplexer, Tunnel
from ttun.tox.stream import Stream, Streams

BURST = 56.0  # packets at once after a pause; toxcore allows 64
LEAST = 4.0  # packets per second
GROWTH, BACK = 1.14, 0.88  # factors on the measured send rate; toxcore's growth is 1.2
BACK_FOR = 1.1  # seconds; toxcore remembers congestion for one
STEP, STEPS = 0.05, 12  # seconds per step, and steps in the measurement
FAST = 1500.0  # packets per second


class Pace:
    """Limits the send rate so that toxcore's congestion control does not throttle it.

    toxcore (net_crypto.c) gives each friend a budget: 64 packets at first, then 1.2 times the
    rate sent over the last 0.6 s, at least 4 a second, so it grows only while it is used. After a
    loss, or whenever a rounding error puts its retransmission budget above the budget for new
    packets, toxcore takes an empty budget for congestion and lowers the rate to 0.9 times what was
    sent. A sender that always sends until toxcore refuses keeps the budget empty: a slow rate
    falls to 4 packets a second and the transfer stalls (observed: 0.1 instead of 700 Mbit/s).

    Below 1500 packets a second this class therefore leaves some of the budget unused: its rate
    grows more slowly than toxcore's. If toxcore refuses a packet anyway, a lower rate for a little
    over a second refills the budget until toxcore forgets the congestion. Above 1500, each
    millisecond adds some budget, so it is never empty for long, and toxcore alone sets the rate.

    It starts with a budget of BURST. All times are in seconds of one clock.
    """

    def __init__(self, now: float) -> None:
        self._credit = BURST
        self._counted_to = self._step_began = now
        self._steps: deque[int] = deque(maxlen=STEPS)
        self._in_step = 0
        self._back_until = now
        self._rate = 0.0
        self._fast = False

    def refill(self, now: float) -> None:
        """Add the budget for the time that has passed."""
        while now - self._step_began >= STEP:
            self._steps.append(self._in_step)
            self._in_step = 0
            self._step_began += STEP
            if now - self._step_began > 2 * STEP * STEPS:
                self._steps.clear()
                self._step_began = now
        self._rate = (sum(self._steps) + self._in_step) / (STEP * STEPS)
        self._fast = self._rate >= FAST
        credit = self._credit + self._allowed_rate(now) * (now - self._counted_to)
        self._credit = min(credit, max(BURST, self._rate * STEP))
        self._counted_to = now

    def take(self) -> bool:
        """Return whether one more packet may be sent."""
        return self._fast or self._credit >= 1

    def sent(self) -> None:
        """Count a packet that toxcore accepted."""
        self._in_step += 1
        self._credit = max(self._credit - 1, 0.0)

    def refused(self, now: float) -> None:
        """Slow down, unless the rate is fast: toxcore had no budget left."""
        self._credit = 0.0
        if not self._fast:
            self._back_until = now + BACK_FOR

    def wait(self, now: float) -> float:
        """Return the seconds until one more packet may be sent."""
        return max(0.0, (1 - self._credit) / self._allowed_rate(now))

    def _allowed_rate(self, now: float) -> float:
        return max(LEAST, self._rate * (BACK if now < self._back_until else GROWTH))


log = logging.getLogger("ttun")

CLOCK = struct.Struct(">d")  # seconds of our clock: what a PING carries
MAX_ROUND_TRIP = 60.0  # seconds
UNKNOWN_WAY = "an unknown transport"
COMPLAINTS = 5  # warnings about a link's bad packets; further ones go to the debug log


class Link:
    """An online friend. way: the transport to it, for the log. bad: counts all bad packets."""

    def __init__(
        self, loop: Loop, mux: Multiplexer, friend: int, name: str, way: str, *, bad: Summary
    ) -> None:
        self.mux, self.friend, self.name, self.way = mux, friend, name, way
        self.streams = Streams(loop, mux)
        self.heard = self.pinged = time.monotonic()
        self._toxcore_send = functools.partial(loop.tox.send, friend)
        self._pace = Pace(self.heard)
        self._bad, self._complaints = bad, 0

    def receive(self, data: bytes) -> Event | None:
        """Handle a packet; return an event for the role, or None."""
        self.heard = time.monotonic()
        try:
            event = self.mux.receive(data)
        except ProtocolError as error:
            self._complaints += 1
            text = "peer %s: bad packet dropped: %s"
            if self._complaints <= COMPLAINTS:
                self._bad.log(self.heard, text, self.name, error)
            else:
                log.debug(text, self.name, error)
            return None
        if isinstance(event, TUNNEL_EVENTS):
            stream = event.tunnel.owner
            if isinstance(stream, Stream):
                stream.handle(event)
            return None
        if isinstance(event, protocol.Pong):
            seconds = _round_trip(event.data)
            if seconds is None:
                return None
            self.mux.round_trip = seconds
        return event

    def join(
        self,
        sock: socket.socket,
        tunnel: Tunnel | None,
        on_reset: Callable[[], None] | None = None,
    ) -> None:
        """Forward between a socket and a tunnel. If that is None, the request is void: close."""
        if tunnel is None:
            sock.close()
        else:
            Stream(self.streams, sock, tunnel, on_reset)

    def ping(self, now: float) -> None:
        """Send a PING to measure the round trip."""
        self.pinged = now
        self.mux.ping(CLOCK.pack(now))

    def fill(self, now: float) -> tuple[bool, float]:
        """Send what may be sent; return whether toxcore is full, and when to call again."""
        self._pace.refill(now)
        if self._send_all():
            return False, math.inf
        if self._pace.take():  # the pace allowed it, so toxcore refused
            self._pace.refused(now)
            return True, math.inf
        return False, now + self._pace.wait(now)

    def _send_all(self) -> bool:
        """Send; return whether nothing is left to send."""
        control, pace, toxcore_send = self.mux.control, self._pace, self._toxcore_send

        def send(data: bytes) -> bool:
            if not pace.take() or not toxcore_send(data):
                return False
            pace.sent()
            return True

        while True:
            while control:
                if not send(control[0]):
                    return False
                control.popleft()
            if not self.streams.sending:
                return True
            if not self.streams.take_turn(send):
                return False

    def drop(self) -> None:
        """Reset all streams."""
        counts = len(self.mux.tunnels), len(self.streams.all)
        log.debug("peer %s: closing %d tunnels, %d connections", self.name, *counts)
        for stream in list(self.streams.all):
            stream.reset()


def _round_trip(data: bytes) -> float | None:
    """Return the seconds since a PING, or None if ping() cannot have sent this data."""
    if len(data) != CLOCK.size:
        return None
    seconds = time.monotonic() - float(CLOCK.unpack(data)[0])
    return seconds if 0 <= seconds <= MAX_ROUND_TRIP else None
