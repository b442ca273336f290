"""Signals, from the first instruction of the program to the last.

 1. While the program loads, end_while_loading(): SIGTERM, SIGINT and SIGHUP end it with one line
    instead of a traceback. Signals that the parent process blocked are unblocked.
 2. While a tunnel starts, end_while_starting(): the same from C, which also works during a call
    that cannot be interrupted, such as getaddrinfo(). Other commands get Python's handlers back.
 3. While it runs, Signals: the main thread waits for signals and stops the tunnel in order.
 4. During exit they are ignored, so that a second signal does not replace exit code 0.

A signal that was ignored at the start stays ignored, as nohup(1) and background jobs of shell
scripts expect, except SIGTERM. As process 1 of a container the main thread also
reaps orphans (process_group.py). Sources: signal(7), nohup(1), pid_namespaces(7).
"""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import signal
import sys
import time
from types import FrameType

from ttun.process import program_name

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# They stop a running tunnel in the same way: their default action would skip --down.
ENDING_LATER = (signal.SIGQUIT, signal.SIGALRM, signal.SIGUSR2, signal.SIGXCPU)
LONG_RUNNING = ("server", "client", "tox")  # commands that end with exit code 0 on a signal


def end_while_loading() -> None:
    """Let a signal end the program at once, with a line; before anything else is imported."""
    for number in ENDING:
        if _is_taken(number):
            signal.signal(number, _end)
    if _is_long_running():
        # It asks for a status line later, and must not kill until then.
        signal.signal(signal.SIGUSR1, _note)
    if signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else a hook's exit code is lost
    _unblock()


def end_while_starting(command: str) -> None:
    """Do the same from C for long-running commands; restore Python's handlers for the others."""
    if command in LONG_RUNNING:
        # Signals needs it later, when this user may be unable to read the file.
        from ttun._codec import lib
        from ttun.process import process_group  # noqa: F401

        for number in ENDING:
            if _is_taken(number):
                lib.ttun_end_on_signal(number)
        return
    for number in ENDING:
        if signal.getsignal(number) is _end:
            usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, usual)


class Signals:
    """Signals, and wake-ups from other threads, for the main thread to wait for.

    The handlers do nothing: the interpreter writes a signal's number to a pipe, which is safe at
    any moment, and the main thread sleeps until the pipe is readable.
    """

    def __init__(self, *numbers: int) -> None:
        """Handle these signals; on the main thread."""
        self._readable, self._writable = os.pipe()
        os.set_blocking(self._writable, False)
        signal.set_wakeup_fd(self._writable, warn_on_full_buffer=False)
        self._numbers = [number for number in numbers if _is_taken(number)]
        self._is_first = os.getpid() == 1
        for number in self._numbers:
            signal.signal(number, _note)
        if self._is_first:
            signal.signal(signal.SIGCHLD, _note)
        _unblock()
        atexit.register(self._ignore)

    def wake(self) -> None:
        """Make wait() return 0; from any thread."""
        with contextlib.suppress(BlockingIOError):  # the pipe is full: it wakes up anyway
            os.write(self._writable, b"\0")

    def wait(self, seconds: float | None = None) -> int | None:
        """Return a signal's number, 0 for wake(), or None after so many seconds."""
        deadline = float("inf") if seconds is None else time.monotonic() + seconds
        waiting = select.poll()
        waiting.register(self._readable, select.POLLIN)
        while True:
            due = deadline
            if self._is_first:
                due = min(due, time.monotonic() + self._reap())
            left = max(0.0, due - time.monotonic())
            if waiting.poll(None if due == float("inf") else left * 1000):
                number = os.read(self._readable, 1)[0]
                if number != signal.SIGCHLD:
                    return number
            elif due == deadline:
                return None

    def _reap(self) -> float:
        """Reap orphans; return the seconds until the next time."""
        from ttun.process import process_group

        return process_group.reap()

    def _ignore(self) -> None:
        """Ignore signals during exit, when the interpreter removes its handlers.

        Python reports a signal that is still pending then as an unraisable error: silence that.
        """
        sys.unraisablehook = lambda _: None
        for number in self._numbers:
            signal.signal(number, signal.SIG_IGN)


def _is_taken(number: int) -> bool:
    """Return whether to handle a signal; the others stay ignored."""
    return number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN


def _unblock() -> None:
    """Unblock signals that the parent process blocked: a mask is inherited through execve(2)."""
    numbers = {*ENDING, signal.SIGUSR1, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)


def _note(_: int, __: FrameType | None) -> None:
    """Do nothing: the number is in the pipe."""


def _end(number: int, _: FrameType | None) -> None:
    """Exit at once, with system calls only: modules may be half imported."""
    line = f"ttun: stopped by {signal.Signals(number).name} while starting\n"
    output = select.poll()
    output.register(2, select.POLLOUT)
    with contextlib.suppress(OSError):
        if output.poll(0):  # else a write would block
            os.write(2, line.encode())
    os._exit(0 if _is_long_running() else 128 + number)


def _is_long_running() -> bool:
    return program_name.arguments()[:1] in [[command] for command in LONG_RUNNING]
