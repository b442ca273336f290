"""A shell command and all the processes that it starts, to be watched and ended as one.

The command runs in a session of its own, so it and what it starts are one process group, and a
signal to that group reaches them all; only a program that calls setsid(2) itself escapes. It finds
what a program expects: the signal mask of the thread that starts it, three descriptors, nothing to
read. What it writes to stderr becomes log lines, a bounded number of them: it can neither fill the
log nor hold up who reads it.

Who starts a program here waits for it as with subprocess. As process 1 of a container this one also
gets the orphans of such programs: they stay zombies until reap() has them, which signals.py calls
for each SIGCHLD. It must not reap a child of our own, or whoever waits for that one learns nothing.
Orphans come to the main thread, so it looks at that thread's children alone, and leaves out those
that start() has started, there or on a thread that is gone.

Sources: setsid(2), kill(2), signal(7), wait(2), pid_namespaces(7).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Union

from ttun.errors import is_lack, printable
from ttun.privileges import User

TICK = 0.05  # seconds between two looks at a command
TERM_SECONDS = 1.0  # from SIGTERM to SIGKILL
KILL_SECONDS = 1.0  # more than a killed process takes to be gone, unless the kernel holds it
MOST_LINES = 20  # of a command's stderr in the log
MOST_BYTES = 400  # of a line there
CHUNK = 65536  # as much as a pipe holds

Environment = Union[Mapping[str, str], Mapping[bytes, bytes]]
WNOTHREAD = 0x20000000  # linux/wait.h, __WNOTHREAD; waitid() takes it from Linux 4.7 on
AGAIN = 1.0  # seconds until a child of ours, which is first in line, was waited for

_lock = threading.Lock()  # a child is known before reap() can see it
_ours: set[subprocess.Popen[bytes]] = set()


class ProcessGroup:
    """A command that was started, and what it started. Belongs to one thread."""

    def __init__(
        self,
        command: str,
        environment: Environment,
        say: Callable[[str], None],
        **how: Any,
    ) -> None:
        """Start a shell command. say: called with each line of its stderr. Raises OSError.

        how: what subprocess.Popen takes besides; with stderr, what it takes instead.
        """
        self._output: int | None  # None: it has ended, or nobody reads it any more
        self._output, self._process = _start(command, environment, how)
        self._say = say
        self._line = b""  # what has come of the next one
        self._said = self._taken = self._unsaid = 0  # lines, bytes, lines

    @property
    def number(self) -> int:
        """The process group's."""
        return self._process.pid

    @property
    def code(self) -> int | None:
        """The shell's exit code, negative for a signal's number; None while it runs."""
        return self._process.returncode

    def wait(self, seconds: float) -> bool:
        """Wait that long at most, take what it writes, and return whether the shell is over."""
        self.read(seconds)
        return self._process.poll() is not None

    def is_alive(self) -> bool:
        """Return whether any of its processes is there, if only as a zombie."""
        self._process.poll()  # else the shell itself is, as a zombie
        return self._signal(0)

    def read(self, seconds: float) -> None:
        """Take what it has written, waiting that long at most for something to come."""
        if self._output is None or self._is_full():
            time.sleep(seconds)  # who writes more than is shown is read slowly
            seconds = 0
        if self._output is None:
            return
        watch = select.poll()
        watch.register(self._output, select.POLLIN)
        if watch.poll(seconds * 1000):
            data = os.read(self._output, CHUNK)
            self._take(data)
            if not data:
                self.close()

    def close(self) -> None:
        """Say what is left to say, and read no more."""
        if self._output is None:
            return
        os.close(self._output)
        self._output = None
        if self._line:
            self._take(b"\n")
        if self._unsaid or self._is_full():
            self._say(f"and {self._unsaid} more lines" if self._unsaid else "and more")

    def _is_full(self) -> bool:
        return self._said >= MOST_LINES or self._taken >= MOST_LINES * MOST_BYTES

    def _take(self, data: bytes) -> None:
        self._taken += len(data)
        *lines, rest = (self._line + data).split(b"\n")
        for line in lines:
            if self._said < MOST_LINES:
                self._say(printable(os.fsdecode(line[:MOST_BYTES])))
                self._said += 1
            else:
                self._unsaid += 1
        self._line = rest[:MOST_BYTES]

    def _signal(self, number: int) -> bool:
        """Send a signal, 0 for none; return whether anybody is there."""
        try:
            os.killpg(self.number, number)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # somebody is, as another user
        return True


def end(groups: Sequence[ProcessGroup]) -> None:
    """End all processes of some groups: SIGTERM, SIGKILL a second later; 2 s at most in all."""
    left = list(groups)
    for number, seconds in ((signal.SIGTERM, TERM_SECONDS), (signal.SIGKILL, KILL_SECONDS)):
        left = [group for group in left if group._signal(number)]
        deadline = time.monotonic() + seconds
        while left and time.monotonic() < deadline:
            for group in left:
                group.read(TICK / len(left))
            left = [group for group in left if group.is_alive()]
            if (living := _living()) is not None:
                left = [group for group in left if group.number in living]
    for group in groups:
        group.close()


def _living() -> set[int] | None:
    """Return the process groups that are not zombies alone; None where /proc does not tell.

    A zombie whose parent is gone stays until process 1 looks at it, which may take seconds.
    """
    groups = set()
    try:
        for name in os.listdir("/proc"):
            if name.isdigit():
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    stat = Path("/proc", name, "stat").read_bytes()
                    state, _, group = stat.rpartition(b")")[2].split()[:3]  # proc_pid_stat(5)
                    if state not in (b"Z", b"X"):
                        groups.add(int(group))
    except (OSError, ValueError):
        return None
    return groups if os.getpgrp() in groups else None  # it may be the /proc of another namespace


def becoming(user: User | None) -> dict[str, Any]:
    """Return what subprocess.Popen takes to run a program as a user, with its groups."""
    if user is None or (user.uid, user.gid) == (os.geteuid(), os.getegid()):
        return {}
    groups = os.getgrouplist(user.name, user.gid)
    return {"user": user.uid, "group": user.gid, "extra_groups": groups}


def how_it_ended(code: int) -> str:
    """Return an exit code of subprocess.Popen in words."""
    return f"exit code {code}" if code > 0 else f"killed by signal {-code}"


def _start(
    command: str, environment: Environment, how: dict[str, Any]
) -> tuple[int | None, subprocess.Popen[bytes]]:
    """Return the end of the pipe that its stderr goes to, not blocking, and the process."""
    arguments = ["/bin/sh", "-c", command]
    if "stderr" in how:
        return None, start(arguments, env=environment, **how)
    with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
        readable, writable = os.pipe()
        ours.callback(os.close, readable)
        theirs.callback(os.close, writable)
        os.set_blocking(readable, False)
        try:
            stdin = stdout = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            theirs.callback(os.close, stdin)
        except OSError as error:
            if is_lack(error):
                raise
            # No /dev/null here: a pipe that has ended, and what else there is to write to.
            stdin, nowhere = os.pipe()
            theirs.callback(os.close, stdin)
            os.close(nowhere)
            stdout = writable
        process = start(
            arguments,
            env=environment,
            stdin=stdin,
            stdout=stdout,
            stderr=writable,
            start_new_session=True,
            **how,
        )
        ours.pop_all()
        return readable, process


def start(arguments: Sequence[str], **how: Any) -> subprocess.Popen[bytes]:
    """Start a program as subprocess.Popen does; the caller waits for it. Raises OSError."""
    with _lock:
        _forget()
        child: subprocess.Popen[bytes] = subprocess.Popen(arguments, **how)
        _ours.add(child)
    return child


def reap() -> float:
    """Reap orphans, on the main thread; return in how many seconds to look again, or infinity."""
    ended_already = os.WEXITED | os.WNOWAIT | os.WNOHANG | WNOTHREAD
    with _lock:
        _forget()
        ours = {child.pid for child in _ours}
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, ended_already)
            except OSError:  # there are no children, or the kernel is too old
                return float("inf")
            if ended is None:
                return float("inf")
            if ended.si_pid in ours:
                return AGAIN  # the kernel shows the ones behind it when this one is gone
            with contextlib.suppress(ChildProcessError):
                os.waitpid(ended.si_pid, os.WNOHANG)


def _forget() -> None:
    """Forget those that were waited for."""
    _ours.difference_update([child for child in _ours if child.returncode is not None])
