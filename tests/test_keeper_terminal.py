"""The command of --via has the terminal while there has been no session, as ssh asks there."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import sys
import time
from collections.abc import Iterator

from tunnel import ROOT

ON_A_TERMINAL = """
import os, signal, sys, time
from ttun.flag import Flag
from ttun.process.keeper import Keeper, via
from ttun.process import log_writer
log_writer.install()
signal.signal(signal.SIGINT, lambda *_: print("interrupted", flush=True))
is_ours = lambda: os.tcgetpgrp(0) == os.getpgrp()
if sys.argv[2] == "background":
    reading, writing = os.pipe()
    if os.fork():
        os.wait()
        sys.exit()
    os.setpgid(0, 0)
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
keeper = Keeper()
keeper.via = via(sys.argv[1], None)
keeper.start({})
before = os.tcgetpgrp(0)
for seconds in (20, 10):
    sock, stderr = keeper.dial("host", "1", Flag())
    sock.settimeout(seconds)
    same = os.tcgetpgrp(0) == before
    print("came", sock.recv(100), "ours", is_ours(), "as before", same, flush=True)
    if sys.argv[2] == "once":
        keeper.background()
    else:
        keeper.hang_up()
    time.sleep(0.5)
    print("then ours", is_ours(), flush=True)
keeper.close()
print("end ours", is_ours(), "as before", os.tcgetpgrp(0) == before, flush=True)
"""


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, command: str, how: str) -> None:
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            os.environ["PYTHONPATH"] = str(ROOT)
            os.execv(sys.executable, [sys.executable, "-c", ON_A_TERMINAL, command, how])
        self.shown = b""

    def says(self, text: str) -> str:
        deadline = time.monotonic() + 20
        while text.encode() not in self.shown:
            left = max(0, deadline - time.monotonic())
            assert select.select([self.master], [], [], left)[0], self.shown
            try:
                self.shown += os.read(self.master, 4096)
            except OSError:
                raise AssertionError(self.shown) from None
        return self.shown.decode()

    def types(self, text: str) -> None:
        os.write(self.master, text.encode())

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        os.close(self.master)
        os.waitpid(self.pid, 0)


@contextlib.contextmanager
def terminal(command: str, how: str) -> Iterator[Terminal]:
    made = Terminal(command, how)
    try:
        yield made
    finally:
        made.close()


ASKS = "stty -echo < /dev/tty; printf 'password: ' > /dev/tty; read it < /dev/tty; echo $it; cat"


def test_a_command_has_the_terminal_until_its_end() -> None:
    """As a password of ssh is asked for there, and each time while there was no session."""
    with terminal(ASKS, "each time") as made:
        made.says("password: ")
        made.types("hunter2\n")
        text = made.says("then ours True")
        assert "came b'hunter2\\n' ours False" in text
        made.shown = made.shown.partition(b"then ours True")[2]  # it may have asked again already
        made.says("password: ")
        made.types("hunter3\n")
        assert "came b'hunter3\\n' ours False" in made.says("end ours True")


def test_after_the_first_session_a_command_has_no_terminal() -> None:
    with terminal("read it < /dev/tty; printf '%s\\n-\\n' \"$it\"; cat", "once") as made:
        time.sleep(0.5)
        made.types("hunter2\n")
        assert "came b'hunter2\\n" in made.says("then ours True")
        made.types("hunter3\n")
        # The second one has no terminal: what would ask there fails at once, and is not stopped.
        assert "came b'\\n-\\n' ours True" in made.says("end ours True")


def test_a_program_in_the_background_leaves_the_terminal_to_whoever_has_it() -> None:
    with terminal("echo here; cat", "background") as made:
        text = made.says("end ours")
        assert text.count("came b'here\\n' ours False as before True") == 2


def test_ctrl_c_while_a_command_has_the_terminal_is_meant_for_the_program() -> None:
    with terminal("printf 'password: ' > /dev/tty; exec cat < /dev/tty", "each time") as made:
        made.says("password: ")
        made.types("\x03")
        made.says("interrupted")
