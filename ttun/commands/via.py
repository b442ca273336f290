"""``ttun client --via COMMAND``: the connection is what a command reads and writes.

1. Each dial has the keeper start the command (process/keeper.py): as which user, in which process
   group, with which terminal is its affair. The command has one end of a socketpair, the session
   the other.
2. A thread copies the command's stderr into the log, within bounds, until the connection is closed.
3. Then the keeper ends the command with all its processes.

Sources: ssh_config(5), ProxyCommand.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import select
import socket
import threading
import time
from collections.abc import Sequence

from ttun import privileges, tcp, transport
from ttun.commands.stdio import Carrier
from ttun.errors import TtunError, UsageError, printable
from ttun.flag import Flag
from ttun.process import keeper
from ttun.process.process_group import CHUNK, MOST_BYTES
from ttun.summary import Allowance
from ttun.transport import Candidate

log = logging.getLogger("ttun")

PATIENCE = 60.0  # seconds for a log-in, with a password to type, and a handshake
LAST = 0.2  # seconds that the command has to say why it ended, or to end by itself
LINES, LINE_AFTER = 40, 3.0  # lines of stderr in the log: so many, then one in 3 seconds
PAUSE = 0.001  # seconds after a large read: a flood costs no core, and holds nobody up


class Dialer(transport.Dialer):
    """Reaches a server through a command."""

    patience = PATIENCE

    def __init__(
        self, server: str | None, command: str, user: str | None, starter: keeper.Keeper
    ) -> None:
        """Tell the keeper, before it starts, what it will start. Raises UsageError.

        server: HOST:PORT, what %h and %p of the command stand for. user: the value of --user.
        """
        if not command.strip():
            raise UsageError("--via: the command is empty")
        address = None if server is None else tcp.parse_address(server, listening=False)
        self.name = "command" if address is None else str(address)
        self._address = ("", "") if address is None else (address.host, str(address.port))
        if not keeper.FORMS["host"].fullmatch(self._address[0]):
            raise UsageError(f"-s {self.name}: --via takes a host of letters, digits and .:_%-")
        for found in set(re.findall("%.?", command)) - {"%%"}:
            if found not in ("%h", "%p"):
                raise UsageError(f"--via: {found!r} is none of %h, %p and %%")
            if address is None:
                raise UsageError(f"--via: {found} is of the server: name it with -s")
        starter.via = keeper.via(command, privileges.find_user(user))
        self._keeper = starter
        self._over: Flag | None = None  # of the last connection
        self._thread: threading.Thread | None = None
        self._lines = _Lines()

    def candidates(self, stop: Flag) -> Sequence[Candidate]:
        """Return the only one."""
        return [Candidate(self.name, None, self._dial)]

    def kind(self, sock: socket.socket) -> str:
        """Return "command"."""
        return "command"

    def close(self) -> None:
        """Have the command end."""
        if self._over is not None and self._thread is not None:
            self._over.set()
            self._thread.join(5 * LAST)

    def _dial(self, stop: Flag) -> socket.socket:
        self.close()
        over = Flag()
        with tcp.naming("cannot start --via"):
            try:
                sock, output = self._keeper.dial(*self._address, stop)
            except BrokenPipeError as error:  # for good: a service manager may start us again
                raise TtunError(f"cannot start --via: {error.strerror} (restart ttun)") from None
        thread = threading.Thread(
            target=self._follow, args=(output, over), name="ttun-via", daemon=True
        )
        try:
            thread.start()
        except BaseException:
            os.close(output)
            sock.close()
            self._keeper.hang_up()
            raise
        self._over, self._thread = over, thread
        return Carrier(sock, over.set)

    def _follow(self, output: int, over: Flag) -> None:
        """Copy what the command writes to stderr until the connection is closed, then end it."""
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
            self._keeper.hang_up()

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


class _Lines:
    """What a command writes, as lines of the log: LINES of them, then one in LINE_AFTER seconds."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self._allowance = Allowance(LINES, LINE_AFTER)
        self._rest = b""  # what has come of the next line
        self._left_out = 0

    def take(self, data: bytes, now: float) -> None:
        """Log the lines that data ends."""
        *lines, rest = (self._rest + data).split(b"\n", self._allowance.room(now))
        if lines:
            self._sum_up()
        for line in lines:
            log.info("--via: %s", printable(os.fsdecode(line[:MOST_BYTES].rstrip(b"\r"))))
        self._allowance.use(len(lines))
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
