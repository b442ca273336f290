"""How fast toxcore is fed, against a model of its congestion control (net_crypto.c, 0.2.18)."""

from __future__ import annotations

from collections import deque

import pytest

from ttun.tox.link import BURST, FAST, LEAST, Pace

MOST = 10_000.0  # packets per second: what the model's network carries


class Budget:
    """What toxcore allows a friend, by the millisecond; every packet arrives."""

    def __init__(self) -> None:
        self.rate = self.rate_again = LEAST
        self.left = 64
        self.again = 64  # for sending packets again
        self.congested_at = -10_000
        self._set = self._set_again = 0
        self._rest = self._rest_again = 0.0
        self._steps: deque[int] = deque([0] * 12, 12)
        self._in_step = 0

    def iterate(self, now: int) -> None:
        if now % 51 == 0:
            self._steps.append(self._in_step)
            self._in_step = 0
            sent = sum(self._steps) / 0.6
            calm = self.congested_at + 1000 < now
            self.rate = min(max(LEAST, sent * (1.2 if calm else 0.9)), MOST)
            self.rate_again = max(self.rate, sent * 1.2)
        if int(1000 / self.rate + 0.5) + self._set <= now:
            grown = self.rate * (now - self._set) / 1000 + self._rest
            self._set, self._rest = now, grown % 1
            self.left = min(self.left + int(grown), int(grown) * 4 + 64)
        if int(1000 / self.rate_again + 0.5) + self._set_again <= now:
            grown = self.rate_again * (now - self._set_again) / 1000 + self._rest_again
            self._set_again, self._rest_again = now, grown % 1
            self.again = int(grown)
        self.again = max(self.again, self.left)
        if self.again and not self.left:  # nothing sent again, nothing left: "0 < 0" fails
            self.congested_at = now

    def take(self) -> bool:
        if not self.left:
            return False
        self.left -= 1
        self.again -= 1
        self._in_step += 1
        return True


def feed(paced: bool, milliseconds: int) -> list[float]:
    """Feed as much as may be for so long, a loss in the third second; the rate in each second."""
    budget, pace, rates = Budget(), Pace(0.0), []
    for now in range(milliseconds):
        budget.iterate(now)
        if now == 2500:
            budget.congested_at = now
        pace.refill(now / 1000)
        while not paced or pace.take():
            if not budget.take():
                pace.refused(now / 1000)
                break
            pace.sent()
        if now % 1000 == 999:
            rates.append(budget.rate)
    return rates


def test_who_sends_until_it_is_refused_comes_to_a_stand() -> None:
    """The reason for all this; if toxcore's model did not do it, the next test said nothing."""
    assert min(feed(paced=False, milliseconds=30_000)[-5:]) < 20


def test_who_leaves_some_of_the_budget_gets_fast() -> None:
    assert feed(paced=True, milliseconds=30_000)[-1] > FAST


def test_a_burst_after_a_rest_and_then_a_few_a_second() -> None:
    pace = Pace(100.0)
    taken = 0
    while pace.take():
        pace.sent()
        taken += 1
    assert taken == BURST
    assert 0 < pace.wait(100.0) <= 1 / LEAST
    pace.refill(100.0 + pace.wait(100.0) + 0.001)
    assert pace.take()


def test_a_long_rest_gives_no_more_than_a_burst() -> None:
    pace = Pace(0.0)
    pace.refill(1e6)
    taken = 0
    while pace.take():
        pace.sent()
        taken += 1
    assert taken == BURST


@pytest.mark.parametrize("rate", [5, 50, 500])
def test_a_steady_trickle_is_never_held_up(rate: int) -> None:
    pace = Pace(0.0)
    for number in range(rate * 10):
        pace.refill(number / rate)
        assert pace.take() or rate > BURST * 2
        pace.sent()
