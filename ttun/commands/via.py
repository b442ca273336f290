"""``ttun client --via COMMAND``: the connection is what a command reads and writes.

1. Each dial starts the command: a Starter does, which also ends it. The command's stdin and stdout
   are one end of a socketpair, and the session has the other.
2. A thread copies the command's stderr into the log, within bounds, until the connection is over.
3. Then the command ends with all its processes: SIGTERM, SIGKILL a second later.

Until the first handshake the command is in the foreground of the terminal, if we are: ssh may ask
for a password there. Later commands have no terminal, and what would ask fails with a reason.
Ctrl-C while the command has the terminal is meant for the whole program.

Sources: ssh_config(5), setpgid(2), tcsetpgrp(3), credentials(7), unix(7).
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import re
import select
import signal
import socket
import threading
import time
from collections.abc import Sequence
from typing import Protocol

from ttun import tcp, transport
from ttun.commands.hooks import environment
from ttun.commands.stdio import Carrier
from ttun.errors import UsageError, printable
from ttun.flag import Flag
from ttun.process import process_group
from ttun.process.process_group import CHUNK, KILL_SECONDS, MOST_BYTES, TERM_SECONDS, ProcessGroup
from ttun.transport import Candidate

log = logging.getLogger("ttun")

PATIENCE = 60.0  # seconds for a log-in, with a password to type, and a handshake
LAST = 0.2  # seconds that the command has to say why it ended, or to end by itself
AT_END = LAST + TERM_SECONDS + KILL_SECONDS + 1.0  # seconds: more than ending it takes
LINES, LINE_AFTER = 40, 3.0  # lines of stderr in the log: so many, then one in 3 seconds
PAUSE = 0.001  # seconds after a full read: a flood costs no core, and holds nobody up


class Starter(Protocol):
    """What starts the command, and ends it: one at a time."""

    def dial(self, host: str, port: str) -> tuple[socket.socket, int]:
        """Return the connection, and the end of the pipe that is its stderr. Raises OSError."""

    def background(self) -> None:
        """Take the terminal back, for good."""

    def hangup(self) -> None:
        """End all its processes."""


class Dialer(transport.Dialer):
    """Reaches a server through a command."""

    patience = PATIENCE

    def __init__(self, server: str | None, command: str, starter: Starter) -> None:
        """server: HOST:PORT, what %h and %p of the command stand for. Raises UsageError."""
        address = None if server is None else tcp.parse_address(server, listening=False)
        self.name = "command" if address is None else str(address)
        self._address = ("", "") if address is None else (address.host, str(address.port))
        if re.search(r"\A-|[^\w.:%-]", self._address[0]):
            raise UsageError(f"--via: {self._address[0]!r} is not a valid name of a host")
        expand(command, *self._address)
        self._starter = starter
        self._over: Flag | None = None  # of the last connection
        self._thread: threading.Thread | None = None
        self._lines = Lines()
        atexit.register(self.finish)

    def candidates(self, stop: Flag) -> Sequence[Candidate]:
        """Return the only one."""
        return [Candidate(self.name, None, self._dial)]

    def kind(self, sock: socket.socket) -> str:
        """Return "command"."""
        return "command"

    def background(self) -> None:
        """Take the terminal back from the command, for good: there was a handshake."""
        self._starter.background()

    def close(self) -> None:
        """Have the command end; finish() waits for that."""
        if self._over is not None:
            self._over.set()

    def finish(self) -> None:
        """End the command, within AT_END seconds."""
        self.close()
        if self._thread is not None:
            self._thread.join(AT_END)

    def _dial(self, stop: Flag) -> socket.socket:
        self.finish()
        over = Flag()
        try:
            sock, output = self._starter.dial(*self._address)
        except OSError as error:
            raise tcp.named("cannot start --via", error) from None
        thread = threading.Thread(
            target=self._follow, args=(output, over), name="ttun-via", daemon=True
        )
        try:
            thread.start()
        except BaseException:
            os.close(output)
            sock.close()
            self._starter.hangup()
            raise
        self._over, self._thread = over, thread
        return Carrier(sock, over.set)

    def _follow(self, output: int, over: Flag) -> None:
        """Copy what the command writes to stderr until the connection is over, then end it."""
        os.set_blocking(output, False)
        waiting = select.poll()
        waiting.register(output, select.POLLIN)
        try:
            with contextlib.suppress(InterruptedError):
                while self._copy(output):
                    over.wait_for(output, select.POLLIN, 1.0)
                over.wait()
            deadline = time.monotonic() + LAST
            while (left := deadline - time.monotonic()) > 0 and waiting.poll(1000 * left):
                if not self._copy(output):
                    break
        finally:
            self._lines.end()
            os.close(output)
            self._starter.hangup()

    def _copy(self, output: int) -> bool:
        """Log what there is to read; return whether there may be more."""
        try:
            data = os.read(output, CHUNK)
        except BlockingIOError:
            return True
        self._lines.take(data, time.monotonic())
        if len(data) > select.PIPE_BUF:
            time.sleep(PAUSE)
        return bool(data)


class Lines:
    """What a command writes, as lines of the log: LINES of them, then one in LINE_AFTER seconds."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self._room, self._at = float(LINES), 0.0
        self._rest = b""  # what has come of the next line
        self._left_out = 0

    def take(self, data: bytes, now: float) -> None:
        """Log the lines that data ends."""
        self._room = min(LINES, self._room + (now - self._at) / LINE_AFTER)
        self._at = now
        *lines, rest = (self._rest + data).split(b"\n", int(self._room))
        if lines:
            self._sum_up()
        for line in lines:
            log.info("--via: %s", printable(os.fsdecode(line[:MOST_BYTES].rstrip(b"\r"))))
        self._room -= len(lines)
        self._left_out += rest.count(b"\n")
        self._rest = rest[rest.rfind(b"\n") + 1 :][:MOST_BYTES]

    def end(self) -> None:
        """Log what is left of the last line, and how many were left out."""
        if self._rest:
            self.take(b"\n", time.monotonic())
        self._sum_up()
        self._rest = b""

    def _sum_up(self) -> None:
        if self._left_out:
            log.info("--via: and %d more lines", self._left_out)
        self._left_out = 0


class Direct:
    """Starts the command as the user that this process is, from any thread but one at a time."""

    def __init__(self, command: str) -> None:
        """Start nothing yet."""
        self._command = command
        self._group: ProcessGroup | None = None
        self._terminal: int | None = None  # while the command has it
        self._is_settled = False  # there was a handshake

    def dial(self, host: str, port: str) -> tuple[socket.socket, int]:
        """Start it. Raises OSError."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                terminal = None if self._is_settled else our_terminal()
                self._group = ProcessGroup(
                    expand(self._command, host, port), environment({}), lambda _: None,
                    theirs.fileno(), session=terminal is None,
                )  # fmt: skip
                if terminal is not None:
                    self._terminal = terminal
                    hand_over(terminal, self._group.number)
            return ours, self._group.detach()
        except BaseException:
            ours.close()
            raise

    def background(self) -> None:
        """Take the terminal back, for good."""
        self._is_settled = True
        self._take_back()

    def hangup(self) -> None:
        """End all its processes."""
        group, self._group = self._group, None
        if group is None:
            return
        group.wait(0)
        had_terminal = self._terminal is not None
        code = group.code
        process_group.end([group])
        self._take_back()
        if code:
            how = f"exit code {code}" if code > 0 else f"killed by signal {-code}"
            log.info("--via: %s", how)
        if had_terminal and code in (-signal.SIGINT, 128 + signal.SIGINT):
            os.kill(os.getpid(), signal.SIGINT)

    def _take_back(self) -> None:
        terminal, self._terminal = self._terminal, None
        if terminal is not None:
            hand_over(terminal, os.getpgrp())
            os.close(terminal)


def our_terminal() -> int | None:
    """Open the terminal that this process is in the foreground of; None if there is none."""
    with contextlib.suppress(OSError):
        terminal = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
        with contextlib.suppress(OSError):
            if os.tcgetpgrp(terminal) == os.getpgrp():
                return terminal
        os.close(terminal)
    return None


def hand_over(terminal: int, group: int) -> None:
    """Put a process group into the foreground."""
    # Else a background process that does so is stopped.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
    try:
        with contextlib.suppress(OSError):
            os.tcsetpgrp(terminal, group)
            os.killpg(group, signal.SIGCONT)  # it may have asked for the terminal before it had it
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def expand(command: str, host: str, port: str) -> str:
    """Return a command with %h, %p and %% replaced. Raises UsageError for another %."""
    known = {"%%": "%", "%h": host, "%p": port}

    def replace(found: re.Match[str]) -> str:
        if not known.get(found[0]):
            need = "a server (-s)" if found[0] in known else "another one (%h, %p or %%)"
            raise UsageError(f"--via: {found[0]!r} needs {need}")
        return known[found[0]]

    return re.sub("%.?", replace, command)
