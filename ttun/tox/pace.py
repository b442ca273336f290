"""How fast packets may be handed to toxcore, so that it does not mistake that for congestion.

toxcore (net_crypto.c) gives each friend a budget: 64 packets at first, then 1.2 times the rate that
was sent in the last 0.6 s, at least 4 a second, so it grows only while it is used. After a loss, or
whenever its budget for retransmissions exceeds the one for new packets by a rounding, toxcore takes
each moment with an empty budget for congestion, and lowers the rate to 0.9 times what was sent. A
sender that always goes on until toxcore refuses keeps the budget empty, so a slow rate falls to 4 a
second and the transfer stalls. (Seen: after 10 s of it, 0.1 Mbit/s of 700.)

So below 1,500 packets a second some of the budget is not used: the rate here grows a little less
than toxcore's. If toxcore refuses all the same, a lower rate for a little over a second refills its
budget and lets it forget. Above that rate each millisecond adds some packets of budget, it is never
empty for long, and toxcore alone decides.
"""

from __future__ import annotations

from collections import deque

BURST = 56.0  # packets at once after a rest, of toxcore's 64
LEAST = 4.0  # packets per second
GROWTH, BACK = 1.14, 0.88  # times the rate that was sent; toxcore's is 1.2
BACK_FOR = 1.1  # seconds; toxcore remembers congestion for one
STEP, STEPS = 0.05, 12  # seconds, and how many of them make the rate
FAST = 1500.0  # packets per second


class Pace:
    """The budget of one friend, at first BURST. All times are in seconds of one clock."""

    def __init__(self, now: float) -> None:
        self._credit = BURST
        self._counted_to = self._step_began = now
        self._steps: deque[int] = deque(maxlen=STEPS)
        self._in_step = 0
        self._back_until = now
        self._rate = 0.0
        self._fast = False

    def refill(self, now: float) -> None:
        """Add the budget of the time that has passed."""
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
        """Count a packet that toxcore took."""
        self._in_step += 1
        self._credit = max(self._credit - 1, 0.0)

    def refused(self, now: float) -> None:
        """Slow down, unless it is fast: toxcore had no budget left."""
        self._credit = 0.0
        if not self._fast:
            self._back_until = now + BACK_FOR

    def wait(self, now: float) -> float:
        """Return the seconds until one more packet may be sent."""
        return max(0.0, (1 - self._credit) / self._allowed_rate(now))

    def _allowed_rate(self, now: float) -> float:
        return max(LEAST, self._rate * (BACK if now < self._back_until else GROWTH))
