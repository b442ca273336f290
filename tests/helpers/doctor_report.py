"""What ``ttun doctor`` says on a host, and hosts that lack something for a while."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import forked
from tunnel import CLIENT, PROGRAM

from ttun.commands.doctor import FAIL, OK, SKIP, WARN
from ttun.lab import netns


class Report:
    """What the program said on a host, by subject."""

    def __init__(self, pair: netns.Hosts, host: str, *arguments: str, prefix: list[str]) -> None:
        if prefix or not forked.can(forked.TTUN):
            done = subprocess.run(
                pair.command(host, [*prefix, *PROGRAM, "doctor", *arguments]),
                capture_output=True, text=True, timeout=120, check=False,
                env={**os.environ, **netns.environment()},
            )  # fmt: skip
        else:
            command = ["doctor", *arguments]
            done = forked.run(forked.TTUN, command, namespace=pair.names[host])
        assert done.stderr == ""
        assert max(map(len, done.stdout.splitlines())) <= 80 and "\033" not in done.stdout
        self.code, self.text = done.returncode, done.stdout
        self.blocks: dict[str, tuple[str, str]] = {}
        subject = ""
        for line in self.text.splitlines():
            if line.startswith(" " * 21):
                mark, found = self.blocks[subject]
                is_item = line[21:].startswith(("effect: ", "fix: "))
                joint = "\n" if is_item else " "  # else it is the rest of a wrapped line
                self.blocks[subject] = mark, f"{found}{joint}{line.strip()}"
            elif line[:5].strip() in (OK, WARN, FAIL, SKIP):
                subject = line[6:20].strip()
                assert subject not in self.blocks
                self.blocks[subject] = line[:5].strip(), line[21:]

    def __getitem__(self, subject: str) -> tuple[str, str]:
        return self.blocks[subject]


def report(
    pair: netns.Hosts, *arguments: str, host: str = CLIENT, prefix: list[str] | None = None
) -> Report:
    return Report(pair, host, *arguments, prefix=prefix or [])


@contextmanager
def changed(
    pair: netns.Hosts, do: list[str], undo: list[str], host: str = CLIENT
) -> Iterator[None]:
    subprocess.run(pair.command(host, do), check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(pair.command(host, undo), check=True, capture_output=True)
