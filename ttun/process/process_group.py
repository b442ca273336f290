"""A shell command and all processes that it starts, watched and terminated together.

The command runs in a session of its own. It and what it starts are one process group, and a signal
to the group reaches them all; only a program that calls setsid(2) escapes. It gets the signal mask
of the thread that starts it, three standard descriptors, and an empty stdin. What it writes to
stderr becomes log lines, up to a limit: it can neither fill the log nor block the thread that reads
it.

The caller waits for a program as with subprocess. As process 1 of a container this process also
inherits the orphans of such programs. They stay zombies until reap() collects them, which
signals.py calls on each SIGCHLD. It must not reap a child of this program, or the thread that waits
for it never gets the exit code. The main thread inherits orphans, so reap() looks at the children
of that thread only, except those that start() started, there or on a thread that has ended.

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
KILL_SECONDS = 1.0  # enough for a killed process to end, unless the kernel holds it
MOST_LINES = 20  # of a command's stderr in the log
MOST_BYTES = 400  # of such a line
CHUNK = 65536  # the capacity of a pipe

Environment = Union[Mapping[str, str], Mapping[bytes, bytes]]
WNOTHREAD = 0x20000000  # linux/wait.h, __WNOTHREAD; waitid() accepts it from Linux 4.7 on
AGAIN = 1.0  # seconds to let another thread wait for its child, which is first in the queue

_lock = threading.Lock()  # so that a child is in _ours before reap() can see it
_ours: set[subprocess.Popen[bytes]] = set()


class ProcessGroup:
    """A running command and its processes. Used by one thread."""

    def __init__(
        self,
        command: str,
        environment: Environment,
        say: Callable[[str], None],
        **how: Any,
    ) -> None:
        """Start a shell command. say: called with each line of its stderr. Raises OSError.

        how: more arguments of subprocess.Popen; with stderr, they replace the pipe.
        """
        self._output: int | None  # None: it has ended, or is no longer read
        self._output, self._process = _start(command, environment, how)
        self._say = say
        self._line = b""  # the incomplete line
        self._said = self._taken = self._unsaid = 0  # lines, bytes, lines

    @property
    def number(self) -> int:
        """The process group's number."""
        return self._process.pid

    @property
    def code(self) -> int | None:
        """The shell's exit code, negative for a signal's number; None while it runs."""
        return self._process.returncode

    def wait(self, seconds: float) -> bool:
        """Wait that long at most, read its output, and return whether the shell has ended."""
        self.read(seconds)
        return self._process.poll() is not None

    def is_alive(self) -> bool:
        """Return whether any of its processes exists, if only as a zombie."""
        self._process.poll()  # else the shell itself stays a zombie
        return self._signal(0)

    def read(self, seconds: float) -> None:
        """Read what it has written; wait that long at most for output."""
        if self._output is None or self._is_full():
            time.sleep(seconds)  # what is beyond the limit is read slowly
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
        """Log the rest, and stop reading."""
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
        """Send a signal, 0 for none; return whether the group exists."""
        try:
            os.killpg(self.number, number)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # it exists, as another user
        return True


def end(groups: Sequence[ProcessGroup]) -> None:
    """Terminate all processes of some groups: SIGTERM, SIGKILL a second later; 2 s at most."""
    left = list(groups)
    for number, seconds in ((signal.SIGTERM, TERM_SECONDS), (signal.SIGKILL, KILL_SECONDS)):
        left = [group for group in left if group._signal(number)]
        deadline = time.monotonic() + seconds
        while left and time.monotonic() < deadline:
            for group in left:
                group.read(TICK / len(left))
            left = [group for group in left if group.is_alive()]
            zombies = _zombies()
            left = [group for group in left if group.number not in zombies]
    for group in groups:
        group.close()


def _zombies() -> set[int]:
    """Return the process groups of which /proc shows zombies and nothing else.

    A zombie whose parent has ended stays until process 1 reaps it, which may take seconds. A group
    that /proc hides (hidepid, ProtectProc= of systemd) is not known to be one.
    """
    shown, living = set(), set()
    with contextlib.suppress(OSError, ValueError):
        for name in os.listdir("/proc"):
            if name.isdigit():
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    stat = Path("/proc", name, "stat").read_bytes()
                    state, _, group = stat.rpartition(b")")[2].split()[:3]  # proc_pid_stat(5)
                    shown.add(int(group))
                    if state not in (b"Z", b"X"):
                        living.add(int(group))
        if os.getpgrp() in living:  # else it is the /proc of another namespace
            return shown - living
    return set()


def becoming(user: User | None) -> dict[str, Any]:
    """Return what subprocess.Popen takes to run a program as a user, with its groups.

    A process that is that user already keeps the groups that it has.
    """
    if user is None or user.uid == os.geteuid():
        return {}
    groups = os.getgrouplist(user.name, user.gid)
    return {"user": user.uid, "group": user.gid, "extra_groups": groups}


def how_it_ended(code: int) -> str:
    """Return an exit code of subprocess.Popen in words."""
    return f"exit code {code}" if code > 0 else f"killed by signal {-code}"


def _start(
    command: str, environment: Environment, how: dict[str, Any]
) -> tuple[int | None, subprocess.Popen[bytes]]:
    """Return the non-blocking end of the pipe from its stderr, and the process."""
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
            # There is no /dev/null: a closed pipe for stdin, and stderr's pipe for stdout.
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
    """Start a program like subprocess.Popen; the caller waits for it. Raises OSError."""
    with _lock:
        _forget()
        child: subprocess.Popen[bytes] = subprocess.Popen(arguments, **how)
        _ours.add(child)
    return child


def reap() -> float:
    """Reap orphans, on the main thread; return the seconds until the next call, or infinity."""
    ended_already = os.WEXITED | os.WNOWAIT | os.WNOHANG | WNOTHREAD
    with _lock:
        _forget()
        ours = {child.pid for child in _ours}
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, ended_already)
            except OSError:  # no children, or the kernel is too old
                return float("inf")
            if ended is None:
                return float("inf")
            if ended.si_pid in ours:
                return AGAIN  # the kernel shows the next ones once this one is reaped
            with contextlib.suppress(ChildProcessError):
                os.waitpid(ended.si_pid, os.WNOHANG)


def _forget() -> None:
    """Forget children that were waited for."""
    _ours.difference_update([child for child in _ours if child.returncode is not None])
