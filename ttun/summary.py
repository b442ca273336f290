"""Rate-limited logging of events that anyone can cause: the first few, then a summary."""

from __future__ import annotations

import logging

log = logging.getLogger("ttun")

MOST, PERIOD = 10, 10.0  # lines, seconds


class Summary:
    """Log one kind of event. Of more than MOST in PERIOD seconds, log only the number.

    Times are those of time.monotonic().
    """

    def __init__(self, more: str, level: int = logging.WARNING) -> None:
        """more: format of the summary, e.g. ``%d more failed``. level: of all its lines."""
        self._more, self._level = more, level
        self._start = float("-inf")
        self._events = 0

    def log(self, now: float, message: str, *arguments: object) -> None:
        """Log or count an event."""
        self.tick(now)
        if self._events == 0:
            self._start = now
        self._events += 1
        if self._events <= MOST:
            log.log(self._level, message, *arguments)

    def tick(self, now: float, *, end: bool = False) -> None:
        """Log the summary after the period; end: now."""
        if now < self._start + PERIOD and not end:
            return
        if self._events > MOST:
            seconds = max(1, round(now - self._start))
            text = self._more + " in the last %d s"
            log.log(self._level, text, self._events - MOST, seconds)
        self._events = 0
