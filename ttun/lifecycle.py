"""The life cycle of an endpoint: created, opened, run on a thread and stopped, once each.

docs/library.md says what each call does in each state. stop() takes no lock, so a signal handler
may call it. All methods may be called from any thread.
"""

from __future__ import annotations

import abc
import logging
import os
import select
import threading
import time
from typing import Callable, ClassVar, TypeVar

from ttun.errors import LACKS, TtunError, reason
from ttun.flag import Flag
from ttun.version import __version__

log = logging.getLogger("ttun")

LACK_FIRST, LACK_MOST = 1.0, 4.0  # seconds until the next attempt, doubled each time
ALIVE_WITHIN = 10.0  # seconds

_running = threading.local()  # stop: the flag of the endpoint whose thread this is

_L = TypeVar("_L", bound="Lifecycle")


class Lifecycle(abc.ABC):
    """Something that is opened, and runs on a thread until it is stopped."""

    role: ClassVar[str]

    def __init__(self) -> None:
        """Raises TtunError if no descriptor is available."""
        try:
            self._stop, self._over = Flag(), Flag()
        except OSError as error:
            raise TtunError(f"cannot start: {error.strerror}") from None
        self._taken: dict[str, list[int]] = {}  # step of the life cycle: the thread that took it
        self._process = os.getpid()  # that took the last step
        self._is_open = False
        self._runner: int | None = None  # its thread
        self._error: TtunError | None = None

    def open(self) -> None:
        """Open the device and the server's port: all that needs privileges. Raises TtunError."""
        if not self._take("open"):
            raise TtunError(f"this {self.role} was already opened (create another)")
        try:
            log.info("ttun %s %s", __version__, self.role)
            self._acquire()
            # In this order: stop() sets the flag first, then checks whether it is open.
            self._is_open = True
            if self._stop.is_set() and self._take("start"):
                raise InterruptedError
        except InterruptedError:
            self._finish()
            raise TtunError("stopped while opening") from None
        except BaseException:
            self._finish()
            raise

    def start(self) -> None:
        """Start in a background thread, after open() if needed. Raises TtunError."""
        if "open" not in self._taken:
            self.open()
        if not self._is_open or not self._take("start"):
            raise TtunError(f"this {self.role} was already started (create another)")
        thread = threading.Thread(target=self._main, name=f"ttun-{self.role}", daemon=True)
        try:
            self._begin()
            thread.start()
        except BaseException as error:
            self._stop.set()
            if self._take("run"):  # else the thread is running, and does it
                self._finish()
            if isinstance(error, RuntimeError):  # no thread available
                raise TtunError(f"cannot start: {error}") from None
            raise
        self._runner = thread.ident

    def __enter__(self: _L) -> _L:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop the session and the endpoint; return when both have ended, within a second.

        No effect in a forked child: the tunnel is its parent's.
        """
        if self._process != os.getpid():
            return
        self._stop.set()
        if self._take("open") or (self._is_open and self._take("start")):
            self._finish()  # not running: no thread does it
        elif not self._interrupted_here():
            waiting = select.poll()
            # In a callback, at most until its own endpoint is to stop: two whose callbacks stop
            # each other would wait forever.
            for flag in (self._over, getattr(_running, "stop", self._over)):
                waiting.register(flag, select.POLLIN)
            waiting.poll()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the endpoint to stop, at most timeout seconds; return whether it has.

        Raises TtunError if it stopped because of an error, or in a callback without a timeout.
        """
        if timeout is None and self._runner == threading.get_ident():
            raise TtunError("wait() in a callback would wait for itself")
        over = self._over.wait(timeout)
        if over and self._error is not None:
            raise self._error.with_traceback(None)  # not with the frames of all earlier callers
        return over

    def when_over(self, call: Callable[[], object]) -> None:
        """Call `call` on another thread when the endpoint stops; at once if it has."""

        def wait_and_call() -> None:
            self._over.wait()
            call()

        threading.Thread(target=wait_and_call, name="ttun-over", daemon=True).start()

    def fileno(self) -> int:
        """Return a descriptor for select() and poll(), readable once the endpoint has stopped."""
        return self._over.fileno()

    def is_alive(self) -> bool:
        """Return whether its thread had a heartbeat within ALIVE_WITHIN seconds.

        There is one about every second; only a slow callback or a bug delays it. Return True
        while the endpoint is not running.
        """
        running = "start" in self._taken and not self._over.is_set()
        return not running or self._stop.quiet_for() < ALIVE_WITHIN

    # ---- the steps ----

    @abc.abstractmethod
    def _acquire(self) -> None:
        """Open everything that needs privileges. Raises TtunError."""

    def _begin(self) -> None:  # noqa: B027
        """Start additional threads. Raises TtunError."""

    @abc.abstractmethod
    def _run(self) -> None:
        """Wait for a peer, run its session, start over, until stop is set.

        Called again after an OSError, MemoryError or RuntimeError (a temporary shortage).
        """

    @abc.abstractmethod
    def _look(self) -> float:
        """Check the device, about every second, during any wait of the thread.

        Return the seconds to the next check. Raises TtunError if it was removed.
        """

    @abc.abstractmethod
    def _release(self) -> None:
        """Close everything that _acquire() opened."""

    # ---- its thread ----

    def _take(self, step: str) -> bool:
        """Return whether this call is the first to take a step; atomic without a lock."""
        mine = [threading.get_ident()]
        if self._taken.setdefault(step, mine) is not mine:
            return False
        self._process = os.getpid()
        return True

    def _interrupted_here(self) -> bool:
        """Return whether this is a signal handler that interrupted open(), start() or stop()."""
        # Not by _is_open, which open() may set on another thread meanwhile.
        thread = (self._taken.get("start") or self._taken["open"])[0]
        return self._runner is None and thread == threading.get_ident()

    def _main(self) -> None:
        if not self._take("run"):
            return
        self._runner = threading.get_ident()
        _running.stop = self._stop
        self._stop.on_beat = self._look
        wait = LACK_FIRST
        try:
            while not self._stop.is_set():
                began = time.monotonic()
                try:
                    self._run()
                except LACKS as error:
                    # No descriptor, thread or memory: a temporary shortage.
                    wait = LACK_FIRST if time.monotonic() - began > LACK_MOST else wait
                    log.warning("%s; retrying in %.0f s", reason(error), wait)
                    self._stop.wait(wait)
                    wait = min(2 * wait, LACK_MOST)
        except TtunError as error:
            self._error = error
        except BaseException as error:  # a bug, or one of a Dialer or Listener of the program
            self._error = TtunError(f"internal error: {type(error).__name__}: {error}")
            self._error.__cause__ = error
        finally:
            self._finish()

    def _finish(self) -> None:
        """Close everything that open() opened, and mark the endpoint as stopped."""
        self._stop.on_beat = None
        try:
            self._release()
        except Exception as error:
            log.warning("cleanup failed: %s", reason(error))
        finally:
            self._over.set()
