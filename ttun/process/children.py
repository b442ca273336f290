"""Programs that this one starts, and those that others leave to it as process 1 of a container.

Who starts a program here waits for it as with subprocess. The orphans of such a program become
children of process 1, and stay zombies until that reaps them: signals.py calls reap() for each
SIGCHLD. It must not reap a child of our own, or whoever waits for that one learns nothing. Orphans
come to the main thread, so it looks at that thread's children alone, and leaves out those that
start() has started, there or on a thread that is gone. Sources: wait(2), pid_namespaces(7).
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from collections.abc import Sequence
from typing import Any

WNOTHREAD = 0x20000000  # linux/wait.h, __WNOTHREAD; waitid() takes it from Linux 4.7 on
AGAIN = 1.0  # seconds until a child of ours, which is first in line, was waited for

_lock = threading.Lock()  # a child is known before reap() can see it
_ours: set[subprocess.Popen[bytes]] = set()


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
