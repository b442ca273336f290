"""Log lines that somebody else can cause: the first few of them, then one that sums up the rest."""

from __future__ import annotations

import logging

log = logging.getLogger("ttun")

MOST, PERIOD = 10, 10.0  # lines, seconds


class Summary:
    """Logs a kind of event. Of more than MOST within PERIOD seconds it only says how many.

    Times are those of time.monotonic().
    """

    def __init__(self, more: str) -> None:
        """more: what the summary says, with a %d for how many, as in ``%d more failed``."""
        self._more = more
        self._start = float("-inf")
        self._events = 0

    @property
    def due(self) -> float:
        """When tick() has something to say; infinity if it has not."""
        return self._start + PERIOD if self._events > MOST else float("inf")

    def log(self, now: float, message: str, *arguments: object) -> None:
        """Log an event, or only count it."""
        self.tick(now)
        if self._events == 0:
            self._start = now
        self._events += 1
        if self._events <= MOST:
            log.info(message, *arguments)

    def tick(self, now: float, *, end: bool = False) -> None:
        """Sum up once the period is over; end: in any case."""
        if now < self._start + PERIOD and not end:
            return
        if self._events > MOST:
            seconds = max(1, round(now - self._start))
            log.info(self._more + " in the last %d s", self._events - MOST, seconds)
        self._events = 0
