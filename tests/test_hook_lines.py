"""What --up and --down write to stderr is in the log, within limits."""

from __future__ import annotations

import logging
import re
import time
from pathlib import Path

import pytest
from tunnel import eventually

from ttun.commands import hooks
from ttun.commands.hooks import Hooks


@pytest.fixture(autouse=True)
def says(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "ttun")
    return caplog


def facts(peer: str) -> dict[str, str | None]:
    return {"peer": peer}


def test_a_flood_of_lines_is_cut_and_holds_nobody_up(
    monkeypatch: pytest.MonkeyPatch, says: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hooks, "TIMEOUT", 2.0)
    made = Hooks("yes a line >&2", "cat /dev/zero >&2")
    made.start()
    used = time.process_time()
    made.up(facts("first"))
    made.down(facts("first"))
    eventually(lambda: says.text.count("terminated all its processes") == 2, "both have ended")
    assert time.process_time() - used < 2, "a core is not busy with it"
    made.close()
    assert says.text.count("a line") == hooks.process_group.MOST_LINES
    assert re.search(r"--up: and \d+ more lines", says.text)
    assert len(says.text) < 20_000


def test_what_it_says_on_stderr_is_in_the_log_without_control_characters(
    says: pytest.LogCaptureFixture,
) -> None:
    made = Hooks("printf 'a\\033[31mb\\377\\nno end' >&2; /nonsense", None)
    made.start()
    made.up(facts("first"))
    eventually(lambda: "--up: exit code 127" in says.messages, "it is over")
    made.close()
    assert r"--up: a\x1b[31mb\xff" in says.messages
    assert "/nonsense: not found" in says.text


def test_sessions_in_a_loop_do_not_fill_the_log_and_the_rest_is_counted(
    said: Path, says: pytest.LogCaptureFixture
) -> None:
    made = Hooks("seq 15 >&2", f"seq 15 >&2; echo down >> {said}")
    made.start()
    for number in range(12):
        made.up(facts(str(number)))
        made.down(facts(str(number)))
    eventually(lambda: said.exists() and said.read_text().count("\n") == 12, "all have run")
    assert len(re.findall(r"--(?:up|down): \d+\n", says.text)) < 100
    eventually(lambda: "--up, --down: and" in says.text, "the rest is counted meanwhile")
    made.close()
    shown = len(re.findall(r"--(?:up|down): \d+\n", says.text))
    counted = sum(map(int, re.findall(r"--up, --down: and (\d+) more lines", says.text)))
    assert shown + counted == 12 * 30
