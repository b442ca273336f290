"""What is known of the terminal: its width, and whether it shows colors."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest

SCRIPT = """
from ttun.commands.terminal import colored, is_terminal, width
print(is_terminal(), width(), colored("ok", "green"), colored("FAIL", "red"))
"""
PLAIN = {name: text for name, text in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}


def on_a_terminal(columns: int, **environment: str) -> str:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
    environment = {**PLAIN, "TERM": "xterm", **environment}
    try:
        subprocess.run([sys.executable, "-c", SCRIPT], env=environment, stdout=theirs, check=True)
        return os.read(ours, 4096).decode().strip()
    finally:
        os.close(ours)
        os.close(theirs)


def test_a_terminal_shows_colors_and_has_its_width() -> None:
    assert on_a_terminal(120) == "True 120 \033[32mok\033[0m \033[31mFAIL\033[0m"
    assert on_a_terminal(0, NO_COLOR="") == "True 80 \033[32mok\033[0m \033[31mFAIL\033[0m"


@pytest.mark.parametrize("unwanted", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_a_terminal_without_colors_shows_plain_text(unwanted: dict[str, str]) -> None:
    assert on_a_terminal(100, **unwanted) == "True 100 ok FAIL"


def test_a_pipe_gets_plain_text_of_80_columns() -> None:
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=PLAIN, stdout=subprocess.PIPE, check=True)
    assert done.stdout == b"False 80 ok FAIL\n"
