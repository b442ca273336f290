"""Shortages of descriptors and threads in a running program."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tunnel import End


@contextlib.contextmanager
def lacking(process: int, kind: str, limit: int) -> Iterator[None]:
    """Lower a limit of a running program temporarily, as its own user."""
    pid = str(process)
    status = (Path("/proc") / pid / "status").read_text()
    uid, gid = (re.search(rf"{which}:\s+(\d+)", status)[1] for which in ("Uid", "Gid"))  # type: ignore[index]
    who = ["setpriv", "--reuid", uid, "--regid", gid, "--clear-groups"] if os.getuid() == 0 else []
    who = [] if uid == "0" else who

    def prlimit(soft: str) -> None:
        subprocess.run([*who, "prlimit", "--pid", pid, f"--{kind}={soft}:"], check=True)

    before = subprocess.run(
        [*who, "prlimit", "--pid", pid, f"--{kind}", "-o", "SOFT", "--noheadings"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    prlimit(str(limit))
    try:
        yield
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):  # it has ended
            prlimit(before)


def no_descriptors(
    end: End, more: int = 0, process: int | None = None
) -> contextlib.AbstractContextManager[None]:
    """Allow so many more descriptors: the limit is on their numbers (getrlimit(2)).

    process: its keeper, say, in place of the end itself.
    """
    assert end.status(), "it has started"
    end.usage()  # waits until that of the question is closed
    process = process or end.process.pid
    taken = {int(name) for name in os.listdir(f"/proc/{process}/fd")}
    free = (number for number in itertools.count() if number not in taken)
    return lacking(process, "nofile", next(itertools.islice(free, more, None)))


def no_threads(end: End) -> contextlib.AbstractContextManager[None]:
    """RLIMIT_NPROC counts the user's threads on the whole machine: one exists already."""
    assert end.status(), "it has started, and has become its own user"
    return lacking(end.process.pid, "nproc", 1)


def lives(end: End) -> bool:
    return end.process.poll() is None and "internal error" not in end.log()
