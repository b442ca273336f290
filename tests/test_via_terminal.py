"""A client of --via in a terminal: the command may ask there until the first handshake."""

from __future__ import annotations

import contextlib
import os
import pty
import signal

import pytest
from carried import MARK, SOCAT, TO_SERVER, needs_socat, serve
from machine import running
from tunnel import CLIENT, PROGRAM, Bench, eventually

pytestmark = [pytest.mark.hosts, needs_socat]


class Terminal:
    """A shell's terminal with a client in its foreground."""

    def __init__(self, bench: Bench, command: str, *options: str) -> None:
        self.shown = b""
        words = [*PROGRAM, "client", "-k", "secret", "--via", command, *bench.options, *options]
        words = bench.pair.command(CLIENT, words)
        self.pid, self.terminal = pty.fork()  # killed with the namespace if the test fails
        if self.pid == 0:
            os.execvp(words[0], words)
        os.set_blocking(self.terminal, False)

    def says(self, text: str) -> None:
        def read() -> bool:
            with contextlib.suppress(OSError):  # nothing yet, or nothing more
                self.shown += os.read(self.terminal, 65536)
            return text.encode() in self.shown

        eventually(read, f"{text!r} in {self.shown!r}")

    def types(self, text: bytes) -> None:
        os.write(self.terminal, text)

    def code(self) -> int:
        """Its exit code, once it has ended."""
        status = eventually(lambda: os.waitpid(self.pid, os.WNOHANG)[0] and [0], "it ended", 10)
        return status[0]


ASK = (
    "stty -echo </dev/tty; printf 'password? ' >/dev/tty; "
    "read word </dev/tty; stty echo </dev/tty; "
)


def test_the_command_has_the_terminal_until_the_first_handshake(plain: Bench) -> None:
    serve(plain)
    shell = Terminal(plain, f'{ASK} [ "$word" = xyzzy ] && exec {SOCAT}', "-s", TO_SERVER)
    shell.says("password? ")
    assert os.tcgetpgrp(shell.terminal) != shell.pid
    shell.types(b"xyzzy\n")
    shell.says("authenticated")
    eventually(lambda: os.tcgetpgrp(shell.terminal) == shell.pid, "it has the terminal back")
    assert b"xyzzy" not in shell.shown
    shell.types(b"\x03")
    shell.says("SIGINT: stopping")
    assert shell.code() == 0


def test_a_command_that_fails_gives_the_terminal_back(plain: Bench) -> None:
    shell = Terminal(plain, f"{ASK} exit 1")
    for times in (1, 2):
        eventually(lambda: os.tcgetpgrp(shell.terminal) != shell.pid, "it has the terminal")
        shell.types(b"wrong\n")
        eventually(lambda: os.tcgetpgrp(shell.terminal) == shell.pid, f"not any more ({times})")
    shell.types(b"\x03")
    assert shell.code() == 0


def test_ctrl_c_at_the_prompt_ends_the_program(plain: Bench) -> None:
    shell = Terminal(plain, f"{ASK} exec {SOCAT}", "-s", TO_SERVER)
    shell.says("password? ")
    shell.types(b"\x03")
    shell.says("SIGINT: stopping")
    assert shell.code() == 0


def test_later_commands_have_no_terminal(plain: Bench) -> None:
    """There a question would stop them, or take what is typed into a shell."""
    serve(plain)
    look = "(: </dev/tty) 2>/dev/null && echo terminal >&2 || echo none >&2"
    shell = Terminal(plain, f"{look}; exec {SOCAT}", "-s", TO_SERVER)
    shell.says("--via: terminal")
    shell.says("authenticated")
    for pid in running(MARK):
        os.kill(pid, signal.SIGTERM)
    shell.says("--via: none")
    os.kill(shell.pid, signal.SIGTERM)
    assert shell.code() == 0
