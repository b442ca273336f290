"""ttun tox in the background, and syslog as its log: on a real socket, read or not."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from pathlib import Path

import pytest
from syslog_line import line
from tunnel import PROGRAM, SERVER, Bench, eventually

from ttun.lab import netns


@pytest.mark.hosts
@pytest.mark.tox
@pytest.mark.parametrize("is_full", [False, True], ids=["read", "never read"])
def test_tox_in_the_background_logs_to_syslog_and_ends(
    plain: Bench, tmp_path: Path, is_full: bool
) -> None:
    """In a /dev of its own, as there may be no log daemon on this machine, or a real one."""
    log, pid_file = tmp_path / "log", tmp_path / "pid"
    nodes = "null zero urandom random tty"
    script = f"""
        set -e
        mount -t tmpfs none /mnt
        for node in {nodes}; do touch /mnt/$node; mount --bind /dev/$node /mnt/$node; done
        ln -s {log} /mnt/log
        mount --rbind /mnt /dev
        exec "$@"
    """
    command = ["unshare", "--mount", "sh", "-c", script, "sh", *PROGRAM, "tox", "-z", "-s", "x",
               "-C", str(tmp_path), "-F", str(pid_file)]  # fmt: skip
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as syslog:
        syslog.bind(str(log))
        syslog.settimeout(20)
        assert plain.pair.start(SERVER, command, environment=netns.environment()).wait(20) == 0
        pid = int(eventually(lambda: pid_file.exists() and pid_file.read_text(), "its process id"))
        try:
            eventually(lambda: len(os.listdir(f"/proc/{pid}/task")) > 2, "its threads run")
            time.sleep(0.5)
            if is_full:
                with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as others:
                    others.connect(str(log))
                    others.setblocking(False)
                    with contextlib.suppress(BlockingIOError):
                        while True:
                            others.send(b"a line of another program's")
            os.kill(pid, signal.SIGTERM)
            eventually(lambda: not Path(f"/proc/{pid}").exists(), "it has ended", 10)
            if not is_full:
                assert line(syslog) == f"<30>ttun[{pid}]: SIGTERM: stopping\0"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
