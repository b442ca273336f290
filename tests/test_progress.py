"""Progress is one line on a terminal and says how long the rest takes; a pipe gets plain lines."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest
from pictures import Screen
from tunnel import ROOT

from ttun.lab.progress import Progress, duration, seconds_left

PROGRAM = """
import time
from ttun.lab.progress import Progress
with Progress(100.0) as progress:
    progress.begin("round 1 of 2: a", 0)
    progress.step("one stream up", 50)
    time.sleep(1.5)
    progress.note("left out: x")
    progress.begin("round 2 of 2: " + 300 * "b", 50)
print("table")
"""


def on_terminal(**environment: str) -> str:
    """What the program above writes on a terminal."""
    ours, theirs = pty.openpty()
    own = {name: text for name, text in os.environ.items() if name != "TERM"}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs,
        env={**own, **environment},
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    try:
        while data := os.read(ours, 65536):
            shown += data
    except OSError:  # EIO: it has ended
        pass
    finally:
        os.close(ours)
    assert process.wait(30) == 0
    return shown.decode()


def test_on_a_terminal_it_is_one_line_that_is_rewritten_and_removed() -> None:
    shown = on_terminal(TERM="xterm")
    screen = Screen(80)
    for text in shown.splitlines(keepends=True):
        screen.feed(text)
    assert ["".join(span.text for span in line) for line in screen.lines()] == [
        "left out: x", "table",
    ]  # fmt: skip
    steps = shown.split("\r\033[K")
    assert "about 2 min left | round 1 of 2: a: one stream up" in steps
    assert sum(": one stream up" in step for step in steps) >= 2, "and again each second"
    assert max(map(len, steps)) < 80


def test_a_terminal_that_cannot_erase_gets_plain_lines() -> None:
    assert on_terminal(TERM="dumb").replace("\r", "").splitlines()[:2] == [
        "... round 1 of 2: a", "... left out: x",
    ]  # fmt: skip


def test_in_a_pipe_each_part_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(10) as progress:
        progress.begin("first", 0)
        progress.step("a step", 5)
        progress.note("a note")
        progress.begin("second", 5)
    assert capsys.readouterr() == ("", "... first\n... a note\n... second\n")


def test_the_time_left_is_the_plan_at_first_and_then_the_measured_pace() -> None:
    assert seconds_left(100, 0, 0) == 100
    assert seconds_left(100, 5, 20) < 110, "little is done: the plan counts"
    assert 50 < seconds_left(100, 50, 100) < 100, "twice as slow as planned"
    assert 18 < seconds_left(100, 90, 180) < 20, "much is done: the pace counts"
    assert seconds_left(100, 120, 120) == 0, "never less than nothing"


def test_a_time_is_rounded_as_an_estimate_is() -> None:
    assert [duration(s) for s in (-3, 0.4, 42.4, 100, 3600)] == [
        "about 1 s", "about 1 s", "about 42 s", "about 2 min", "about 60 min",
    ]  # fmt: skip
