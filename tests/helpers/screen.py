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

PLAIN = {
    name: text for name, text in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")
}


def written(
    command: Sequence[str], columns: int, rows: int = 24, seconds: float = 60, **environment: str
) -> str:
    """Run a command on a terminal until it ends, or so long; return all that it wrote."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))
    process = subprocess.Popen(
        command, env={**PLAIN, "TERM": "xterm", **environment}, stdin=theirs, stdout=theirs
    )
    os.close(theirs)
    data, deadline = b"", time.monotonic() + seconds
    with contextlib.suppress(OSError):  # EIO: it has ended
        while select.select([ours], [], [], max(0.0, deadline - time.monotonic()))[0]:
            data += os.read(ours, 65536)
    process.terminate()
    process.wait(10)
    os.close(ours)
    return data.decode().replace("\r", "")


def uncolored(text: str) -> str:
    """Return a text without colors."""
    return re.sub(r"\033\[\d*m", "", text)
