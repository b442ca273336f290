"""Report on stderr what a measurement does now, and about how long the rest takes.

On a terminal this is one line, rewritten each second and removed at the end. Elsewhere each part is
a line of its own. stdout has only the results.

The time left is the plan (how many seconds each step should take) at first. The more of the plan is
done, the more the time left follows the measured pace.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time

STDERR = 2
INTERVAL = 1.0  # seconds between two updates of the time left
ERASE = "\r\033[K"  # console_codes(4)


class Progress:
    """A context manager. planned: seconds that all steps together should take."""

    def __init__(self, planned: float) -> None:
        """Write nothing yet."""
        self._planned = max(planned, 0.001)
        self._before = 0.0  # planned seconds of the steps that are done
        self._step = 0.0  # planned seconds of this one
        self._text = ""
        self._part = ""
        self._started = self._end = time.monotonic()
        self._is_live = os.isatty(STDERR) and os.environ.get("TERM") != "dumb"
        self._lock = threading.Lock()  # over the line and what it shows
        self._is_over = threading.Event()

    def __enter__(self) -> Progress:
        """Start to count."""
        self._started = time.monotonic()
        if self._is_live:
            with contextlib.suppress(RuntimeError):  # no more threads: it is updated less often
                threading.Thread(target=self._update, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the line."""
        with self._lock:
            self._is_over.set()
            if self._is_live:
                _write(ERASE)

    def begin(self, part: str, before: float) -> None:
        """Say that a part begins. before: planned seconds of all that comes before it."""
        self._part, self._before, self._step = part, before, 0.0
        if not self._is_live:
            print(f"... {part}", file=sys.stderr, flush=True)
        self._show(part)

    def step(self, what: str, seconds: float) -> None:
        """Say what the part does now. seconds: how long that should take."""
        self._before += self._step
        self._step = seconds
        self._show(f"{self._part}: {what}")

    def note(self, text: str) -> None:
        """Print a line that stays."""
        with self._lock:
            if self._is_live:
                _write(f"{ERASE}{text}\n")
            else:
                print(f"... {text}", file=sys.stderr, flush=True)

    def _show(self, text: str) -> None:
        now = time.monotonic()
        with self._lock:
            self._text = text
            self._end = now + seconds_left(self._planned, self._before, now - self._started)
            self._draw(now)

    def _update(self) -> None:
        while not self._is_over.wait(INTERVAL):
            with self._lock:
                self._draw(time.monotonic())

    def _draw(self, now: float) -> None:
        if self._is_live and self._text and not self._is_over.is_set():
            line = f"{duration(self._end - now)} left | {self._text}"
            _write(ERASE + line[: _columns() - 1])


def seconds_left(planned: float, done: float, took: float) -> float:
    """Return how long the rest of a plan takes. done: planned seconds that took so many."""
    part = min(1.0, done / planned)
    pace = took / done if done else 1.0
    return planned * (1 - part) * (part * pace + 1 - part)


def duration(seconds: float) -> str:
    """Return a time as a person estimates it."""
    if seconds >= 100:
        return f"about {seconds / 60:.0f} min"
    return f"about {max(1, round(seconds))} s"


def _columns() -> int:
    with contextlib.suppress(OSError):
        return os.get_terminal_size(STDERR).columns or 80
    return 80


def _write(text: str) -> None:
    """Write at once: sys.stderr takes whole lines."""
    with contextlib.suppress(OSError):
        os.write(STDERR, text.encode(errors="replace"))
