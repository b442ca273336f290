"""Commands that run when a peer connects and when it disconnects: --up and --down.

 1. The endpoint's thread calls up() and down(), which record the event and never wait.
 2. A thread handles one session at a time: it runs --up, waits until the peer has disconnected, and
    runs --down. --down runs exactly once for each --up that ran.
 3. Sessions that begin while a command runs are queued. If more than MOST_WAITING wait, the oldest
    is skipped with both its commands; the log says how many were skipped.
 4. A command that takes too long is terminated with all its processes (process_group.py). Processes
    that a command leaves in the background are terminated when the program ends.

They run as the user of --user, without capabilities; set-user-ID programs do not change that. With
--hook-user, all of this is in the keeper (process/keeper.py), which keeps privileges.

Every wait ends: a command has TIMEOUT. When the program ends, a running --up has UP_AT_END left and
a --down DOWN_AT_END, and queued sessions are skipped. Without a process, descriptor or memory for a
command, starting it is retried until its time is over.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import functools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from ttun import proxy
from ttun.commands import key
from ttun.errors import TtunError, is_lack, printable
from ttun.privileges import User
from ttun.process import process_group
from ttun.process.keeper import Facts
from ttun.process.process_group import TICK, ProcessGroup
from ttun.summary import Allowance

log = logging.getLogger("ttun")

TIMEOUT = 60.0  # seconds of one command
UP_AT_END, DOWN_AT_END = 2.0, 5.0  # seconds of one when the program ends
AT_END = 15.0  # seconds: more than both, and killing what does not stop
RETRY, RETRY_MOST = 0.5, 8.0  # seconds until starting a command is retried, first and at most
MOST_WAITING = 16  # sessions
MOST_LEFT = 16  # commands with processes in the background
# Lines of all commands' stderr in the log, as sessions may come and go: so many, then one in 3 s.
LINES, LINE_AFTER = 60, 3.0
SECRETS = (key.VARIABLE, "TUNTOX_SHARED_SECRET")  # variables that commands do not get
PROXY = proxy.VARIABLE.encode()


@dataclass
class _Session:
    """A session: what was known when the peer connected, and when it disconnected."""

    came: Facts
    left: Facts | None = None


class Hooks:
    """Runs --up and --down. Either may be None."""

    def __init__(self, up: str | None, down: str | None, user: User | None = None) -> None:
        """Start nothing yet. user: whom they run as, if not as the user that this process is."""
        self._how = process_group.becoming(user)
        self._commands = {"up": up, "down": down}
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()  # guards the following
        self._waiting: collections.deque[_Session] = collections.deque()
        self._latest: _Session | None = None
        self._left_out = 0
        self._closed: float | None = None  # when, by time.monotonic()
        self._background: list[ProcessGroup] = []  # used by the thread only, as is what follows
        self._allowance = Allowance(LINES, LINE_AFTER)
        self._unsaid = 0  # lines

    def start(self) -> None:
        """Start the thread, after privileges are dropped: the commands inherit what it has.

        Raises TtunError if no thread can be started.
        """
        if self._commands == {"up": None, "down": None}:
            return
        thread = threading.Thread(target=self._run, name="ttun-hooks", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            raise TtunError(f"cannot run --up and --down: {error} (ulimit -u, ulimit -v)") from None
        self._thread = thread
        atexit.register(self.close)  # also when the program ends with an error

    def up(self, facts: Facts) -> None:
        """A peer connected."""
        with self._changed:
            if self._thread is None or self._closed is not None:
                return
            self._latest = _Session(facts)
            self._waiting.append(self._latest)
            if len(self._waiting) > MOST_WAITING:
                self._waiting.popleft()
                self._left_out += 1
            self._changed.notify()

    def down(self, facts: Facts) -> None:
        """It disconnected."""
        with self._changed:
            if self._latest is not None:
                self._latest.left = facts
                self._latest = None
                self._changed.notify()

    def close(self) -> None:
        """Finish or terminate the running command, within AT_END seconds."""
        if self._thread is None:
            return
        with self._changed:
            if self._closed is None:
                self._closed = time.monotonic()
            self._changed.notify()
        self._thread.join(AT_END)
        if self._thread.is_alive():
            log.warning("--up, --down: a command did not end within %.0f s", AT_END)
        atexit.unregister(self.close)

    def _run(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, ())  # commands inherit it
        while (session := self._next()) is not None:
            if self._execute("up", session.came, UP_AT_END):
                self._execute("down", self._leaving(session), DOWN_AT_END)
            elif self._commands["down"] is not None:
                log.warning("skipped --down: --up did not run")
        process_group.end(self._background)
        if self._unsaid:
            self._sum_up()

    def _next(self) -> _Session | None:
        """Wait for the next session; None when the program ends."""
        self._await(lambda: bool(self._waiting))
        with self._changed:
            if self._closed is not None:
                self._left_out += len(self._waiting)
            left_out, self._left_out = self._left_out, 0
            session = None if self._closed is not None else self._waiting.popleft()
        if left_out:
            log.warning(
                "skipped --up and --down for %d sessions: an earlier command took too long",
                left_out,
            )
        return session

    def _leaving(self, session: _Session) -> Facts:
        """Wait until a session's peer disconnects or the program ends; return the facts then."""
        self._await(lambda: session.left is not None)
        return session.left or {**session.came, "reason": "stopped"}

    def _await(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition or the program's end, and do meanwhile what is due.

        Once a second: the number of a group that has ended is reused some day, but not that soon.
        """
        while True:
            self._tend()
            with self._changed:
                if self._closed is not None or condition():
                    return
                self._changed.wait(1.0 if self._background or self._unsaid else None)

    def _tend(self) -> None:
        """Serve the processes in the background, and the log."""
        if self._unsaid and self._allowance.take(time.monotonic()):
            self._sum_up()
        for group in self._background[:]:
            group.read(0)
            if not group.is_alive():
                group.close()
                self._background.remove(group)

    def _say(self, name: str, line: str) -> None:
        """Log or count a line of a command."""
        if self._allowance.take(time.monotonic()):
            log.info("--%s: %s", name, line)
        else:
            self._unsaid += 1

    def _sum_up(self) -> None:
        log.info("--up, --down: and %d more lines", self._unsaid)
        self._unsaid = 0

    def _execute(self, name: str, facts: Facts, at_end: float) -> bool:
        """Run a command to its end; return whether it ran.

        at_end: seconds that it has left when the program ends.
        """
        command = self._commands[name]
        if command is None:
            return True
        started = time.monotonic()

        def left() -> float:
            over = started + TIMEOUT
            if self._closed is not None:
                over = min(over, max(started, self._closed) + at_end)
            return over - time.monotonic()

        group = self._start(name, command, facts, left)
        if group is None:
            return False
        try:
            self._watch(name, group, left)
        except Exception as error:  # a bug, or no memory: the next command may succeed
            log.error("--%s: internal error: %s: %s", name, type(error).__name__, error)
            with contextlib.suppress(Exception):
                process_group.end([group])
        return True

    def _start(
        self, name: str, command: str, facts: Facts, left: Callable[[], float]
    ) -> ProcessGroup | None:
        """Start a command, with retries while resources are lacking; return None on failure."""
        say = functools.partial(self._say, name)
        delay = RETRY
        while True:
            try:
                return ProcessGroup(command, _environment(facts), say, **self._how)
            except (OSError, MemoryError) as error:
                why = getattr(error, "strerror", None) or "not enough memory"
                lacking = is_lack(error)
            is_pointless = name == "up" and self._closed is not None
            if not lacking or left() < delay or is_pointless:
                log.warning("cannot run --%s: %s", name, why)
                return None
            log.warning("cannot run --%s: %s (retrying in %.1f s)", name, why, delay)
            self._pause(delay)
            delay = min(2 * delay, RETRY_MOST)

    def _pause(self, seconds: float) -> None:
        """Wait, but return when the program begins to end."""
        with self._changed:
            closed = self._closed
            self._changed.wait_for(lambda: self._closed != closed, seconds)

    def _watch(self, name: str, group: ProcessGroup, left: Callable[[], float]) -> None:
        """Wait until a command ends, or terminate it."""
        started = time.monotonic()
        log.debug("--%s: started", name)
        while not group.wait(TICK):
            self._tend()
            if left() <= 0:
                why = "timed out" if self._closed is None else "ttun is stopping"
                seconds = time.monotonic() - started
                log.warning(
                    "--%s: %s: terminated all its processes after %.0f s", name, why, seconds
                )
                process_group.end([group])
                return
        log.debug("--%s: ended after %.1f s", name, time.monotonic() - started)
        if group.code:
            log.warning("--%s: %s", name, process_group.how_it_ended(group.code))
        self._background.append(group)
        self._tend()
        if len(self._background) > MOST_LEFT:
            log.warning("--up, --down: too many background processes: terminating the oldest")
            process_group.end([self._background.pop(0)])


def _environment(facts: Facts) -> dict[bytes, bytes]:
    """Return the environment of a command: this program's without secrets, and the facts."""
    environment = dict(os.environb)
    for name in SECRETS:
        environment.pop(name.encode(), None)
    if b"@" in environment.get(PROXY, b""):  # a password is in it
        del environment[PROXY]
    for name, value in facts.items():
        environment[f"TTUN_{name.upper()}".encode()] = printable(value or "").encode()
    return environment
