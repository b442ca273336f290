"""What a command writes on a terminal of some size."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Sequence

from ttun.commands import show

CLEAR = show.CLEAR.encode()
PLAIN = {
    name: text for name, text in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")
}


def written(
    command: Sequence[str], columns: int, rows: int = 24, until: int = 0, **environment: str
) -> str:
    """Run a command on a terminal; return all that it wrote.

    until: to the end of so many pictures, where a command clears the screen before each.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))
    process = subprocess.Popen(
        command, env={**PLAIN, "TERM": "xterm", **environment}, stdin=theirs, stdout=theirs
    )
    os.close(theirs)
    data, deadline = b"", time.monotonic() + 60
    with contextlib.suppress(OSError):  # EIO: it has ended
        while not until or data.count(CLEAR) <= until:
            assert select.select([ours], [], [], max(0.0, deadline - time.monotonic()))[0], data
            data += os.read(ours, 65536)
    process.terminate()
    process.wait(10)
    os.close(ours)
    return data.decode().replace("\r", "")


def uncolored(text: str) -> str:
    """Return a text without colors."""
    return re.sub(r"\033\[\d*m", "", text)
