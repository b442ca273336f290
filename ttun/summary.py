"""Rate-limited logging of events that others can cause: the first few, then a summary."""

from __future__ import annotations

import logging

log = logging.getLogger("ttun")

MOST, PERIOD = 10, 10.0  # lines, seconds


class Allowance:
    """How many lines may be logged: a burst, then one in so many seconds.

    Times are those of time.monotonic().
    """

    def __init__(self, burst: int, after: float) -> None:
        """Allow a burst. after: seconds until another line is allowed."""
        self._burst, self._after = burst, after
        self._left, self._at = float(burst), 0.0

    def room(self, now: float) -> int:
        """Return how many lines are allowed."""
        self._left = min(self._burst, self._left + (now - self._at) / self._after)
        self._at = now
        return int(self._left)

    def use(self, lines: int) -> None:
        """Count lines that room() allowed."""
        self._left -= lines

    def take(self, now: float) -> bool:
        """Return whether a line is allowed, and count it."""
        allowed = self.room(now) >= 1
        self.use(allowed)
        return allowed


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
        if self.count(now):
            log.log(self._level, message, *arguments)

    def count(self, now: float) -> bool:
        """Count an event; return whether to log it."""
        self.tick(now)
        if self._events == 0:
            self._start = now
        self._events += 1
        return self._events <= MOST

    def tick(self, now: float, *, end: bool = False) -> bool:
        """Log the summary after the period; end: now. Return whether a period has ended."""
        if now < self._start + PERIOD and not end:
            return False
        if self._events > MOST:
            seconds = max(1, round(now - self._start))
            text = self._more + " in the last %d s"
            log.log(self._level, text, self._events - MOST, seconds)
        self._events = 0
        return True


class Sessions(Summary):
    """Log the lines of sessions, which a peer with the key may begin and end in a loop.

    Of more than MOST sessions in PERIOD seconds, log only the number. If one of these is still
    there when the period ends, it is no loop: its lines follow.
    """

    def __init__(self) -> None:
        """Before the first session."""
        super().__init__("%d more sessions", logging.INFO)
        self._logged = True
        self._kept: list[tuple[int, str]] | None = None  # lines of the current session, if any

    def begin(self, now: float) -> None:
        """A session begins."""
        self._logged = self.count(now)
        self._kept = []

    def say(self, level: int, message: str, *arguments: object) -> None:
        """Log a line of the current or the last session, or keep it."""
        if self._logged:
            log.log(level, message, *arguments)
        elif self._kept is not None:
            self._kept.append((level, message % arguments))

    def end(self) -> None:
        """It has ended."""
        self._kept = None

    def tick(self, now: float, *, end: bool = False) -> bool:
        """Log the summary after the period, then the lines of a session that is still there."""
        ended = super().tick(now, end=end)
        if ended and self._kept is not None:
            self._logged = True
            for level, line in self._kept:
                log.log(level, "%s", line)
            self._kept = []
        return ended
