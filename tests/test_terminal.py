"""What is known of the terminal: its size, and whether it shows colors."""

from __future__ import annotations

import subprocess
import sys

import pytest
from screen import PLAIN, uncolored, written
from tunnel import PROGRAM

SCRIPT = """
from ttun.commands.terminal import colored, height, is_terminal, width
print(is_terminal(), width(), height(), colored("ok", "green"), colored("FAIL", "red"))
"""
COMMAND = [sys.executable, "-c", SCRIPT]
COMMANDS = ["", "server", "client", "demo", "bench", "bench codec", "bench tunnel", "bench link",
            "show", "genkey", "doctor", "tox"]  # fmt: skip


def test_a_terminal_shows_colors_and_has_its_size() -> None:
    colors = "\033[32mok\033[0m \033[31mFAIL\033[0m\n"
    assert written(COMMAND, 120, 50) == f"True 120 50 {colors}"
    assert written(COMMAND, 0, 0, NO_COLOR="") == f"True 80 24 {colors}"


@pytest.mark.parametrize("unwanted", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_a_terminal_without_colors_shows_plain_text(unwanted: dict[str, str]) -> None:
    assert written(COMMAND, 100, 30, **unwanted) == "True 100 30 ok FAIL\n"


def test_a_pipe_gets_plain_text_of_80_columns() -> None:
    done = subprocess.run(COMMAND, env=PLAIN, stdout=subprocess.PIPE, check=True)
    assert done.stdout == b"False 80 24 ok FAIL\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_80_columns_and_two_screens(command: str) -> None:
    lines = written([*PROGRAM, *command.split(), "-h"], 80).splitlines()
    assert lines[0].startswith("usage: ttun")
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 2 * 24


def test_help_shows_the_form_of_an_option_that_users_type() -> None:
    lines = written([*PROGRAM, "client", "-h"], 80).splitlines()
    assert "  -s, --server HOST:PORT  the server " in "\n".join(lines)
    assert any(line.startswith("  --mtu BYTES ") for line in lines)
    assert not any(line.startswith("  -mtu") for line in lines), "accepted, and not advertised"


def test_an_error_is_one_line_and_a_terminal_gets_it_broken_between_words() -> None:
    command = [*PROGRAM, "server", "-k", "a key", "--dev", "a b"]
    piped = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False).stderr
    assert piped.count("\n") == 1
    assert len(piped) > 160
    shown = written(["sh", "-c", 'exec "$@" 2>&1', "sh", *command], 80)
    assert [line[-1:].isspace() for line in shown.splitlines()] == [False] * 3
    assert max(map(len, shown.splitlines())) <= 80
    assert shown.split() == piped.split()


def can_wrap(line: str) -> bool:
    """Return whether a line is neither one long word nor has a path, which may be long."""
    return len(line.split()) > 1 and "/" not in line


def test_doctor_wraps_and_colors_its_report() -> None:
    plain = written([*PROGRAM, "doctor", "127.0.0.1:1"], 80, NO_COLOR="1")
    assert "\033" not in plain
    assert max(map(len, plain.splitlines())) <= 80
    narrow = uncolored(written([*PROGRAM, "doctor", "127.0.0.1:1"], 50))
    assert max(len(line) for line in narrow.splitlines()[:-1] if can_wrap(line)) <= 50
    assert narrow.split() == plain.split(), "not a word is lost"
    colored = written([*PROGRAM, "doctor", "127.0.0.1:1"], 80)
    assert "\033[31mFAIL\033[0m  server " in colored
    assert uncolored(colored) == plain
