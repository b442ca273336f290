"""A keeper for a test, and what can be seen of one from outside."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine import IS_NOBODY_HERE
from tunnel import ROOT, children, eventually

from ttun.errors import TtunError
from ttun.flag import Flag
from ttun.process.keeper import Keeper

other_users = pytest.mark.skipif(not IS_NOBODY_HERE, reason="no other user in this user namespace")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")

NO_ROOT = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups",
           "--inh-caps", "-all,+net_admin", "--ambient-caps", "+net_admin"]  # fmt: skip


@contextlib.contextmanager
def made() -> Iterator[Keeper]:
    keeper = Keeper()
    try:
        yield keeper
    finally:
        keeper.close()


class Failing:
    """Hooks that cannot start."""

    def start(self) -> None:
        raise TtunError("there is no thread")

    def close(self) -> None:
        pass


def process(made: Keeper) -> int:
    assert made._process is not None
    return made._process.pid


def keeper_of(pid: int) -> int:
    """The keeper of a program."""

    def found() -> list[int]:
        lines = {child: Path(f"/proc/{child}/cmdline").read_bytes() for child in children(pid)}
        return [child for child, line in lines.items() if b"process.keeper" in line]

    return eventually(found, f"a keeper of {pid}")[0]


def is_gone(pid: int) -> bool:
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True


def descriptors(pid: int) -> list[str]:
    found = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(os.readlink(path))
    return found


def received(sock: socket.socket) -> bytes:
    """All that comes, to its end."""
    sock.settimeout(20)
    data = b""
    while part := sock.recv(4096):
        data += part
    return data


def dialled(made: Keeper, host: str = "", port: str = "") -> bytes:
    """What a command of --via writes, to its end."""
    sock, stderr = made.dial(host, port, Flag())
    os.close(stderr)
    with sock:
        return received(sock)


def runs_for_all(python: str) -> bool:
    """Whether a Python can be started by a user that is not root: root's own cannot."""
    start = (
        "import subprocess, sys, cffi, nacl; subprocess.run([sys.executable, '-c', ''], check=True)"
    )
    done = subprocess.run(
        [*NO_ROOT, python, "-c", start], capture_output=True, env=paths(), check=False
    )
    return done.returncode == 0


def paths() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
