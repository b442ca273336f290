"""What this machine says of processes, and what it is made to say: names, time, log records."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from ttun import privileges

IS_NOBODY_HERE = len(Path("/proc/self/uid_map").read_text().splitlines()) == 1 and (
    int(Path("/proc/self/uid_map").read_text().split()[2]) > privileges.NOBODY
)


def threads(pid: int) -> Iterator[dict[str, str]]:
    """/proc/PID/task/*/status."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        lines = (task / "status").read_text().splitlines()
        yield dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def cpu(pid: int) -> float:
    """CPU seconds of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Clock:
    """The time module, as control.py uses it."""

    ahead = 0.0
    sleep = staticmethod(time.sleep)

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead


def running(argument: str) -> list[int]:
    """The processes that have an argument on their command line, zombies not."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if argument.encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            pass  # it is gone by now
    return found


@contextlib.contextmanager
def names(directory: Path, **hosts: list[str]) -> Iterator[None]:
    """Give hosts addresses, in place of this machine's /etc/hosts, where only the tests see it."""
    text = [f"{address} {name}" for name, addresses in hosts.items() for address in addresses]
    (directory / "hosts").write_text("\n".join(["127.0.0.1 localhost", *text, ""]))
    subprocess.run(["mount", "--bind", directory / "hosts", "/etc/hosts"], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "/etc/hosts"], check=True)


def opened(*paths: str | Path) -> str:
    """Shell lines that let every user reach these directories, in this mount namespace.

    A directory above one of them that is closed to others gets a cover with nothing else in it.
    """
    closed: dict[Path, list[Path]] = {}
    for path in map(Path, paths):
        for above in list(path.parents)[-2::-1]:
            if not above.stat().st_mode & stat.S_IXOTH:
                closed.setdefault(above, []).append(path)
                break
    lines = []
    for above, inside in closed.items():
        kept = [(shlex.quote(f"/mnt/opened{path}"), shlex.quote(str(path))) for path in inside]
        lines += [f"mkdir -p {keep}; mount --bind {path} {keep}" for keep, path in kept]
        lines += [f"mount -t tmpfs -o mode=755 none {shlex.quote(str(above))}"]
        lines += [f"mkdir -p {path}; mount --bind {keep} {path}" for keep, path in kept]
    return "\n".join(lines)


def record(text: str, level: int = logging.INFO) -> logging.LogRecord:
    return logging.LogRecord("ttun", level, "", 0, text, None, None)
