"""Rate-limited logging of events that anyone can cause: the first few, then a summary."""

from __future__ import annotations

import logging

log = logging.getLogger("ttun")

MOST, PERIOD = 10, 10.0  # lines, seconds


class Summary:
    """Log one kind of event. Of more than MOST in PERIOD seconds, log only the number.

    Times are those of time.monotonic().
    """

    def __init__(self, more: str) -> None:
        """more: format of the summary, e.g. ``%d more failed``."""
        self._more = more
        self._start = float("-inf")
        self._events = 0

    @property
    def due(self) -> float:
        """When tick() logs a summary; infinity if there is none."""
        return self._start + PERIOD if self._events > MOST else float("inf")

    def log(self, now: float, message: str, *arguments: object) -> None:
        """Log or count an event."""
        self.tick(now)
        if self._events == 0:
            self._start = now
        self._events += 1
        if self._events <= MOST:
            log.info(message, *arguments)

    def tick(self, now: float, *, end: bool = False) -> None:
        """Log the summary after the period; end: now."""
        if now < self._start + PERIOD and not end:
            return
        if self._events > MOST:
            seconds = max(1, round(now - self._start))
            log.info(self._more + " in the last %d s", self._events - MOST, seconds)
        self._events = 0
