"""The recipe of docs/status.md for node_exporter's textfile collector, as it stands there."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from tunnel import PROGRAM, ROOT, SERVER, Bench, eventually

DOC = (ROOT / "docs" / "status.md").read_text()
(SCRIPT,) = re.findall(r"```sh\n(.*?)```", DOC, re.S)
UNITS = re.findall(r"```ini\n(.*?)```", DOC, re.S)
# The directory of the recipe is one of this test while the script runs, in a namespace of its own.
COVERED = """set -e
mount --make-rprivate /
mount -t tmpfs none /var/lib
mkdir -p /var/lib/prometheus/node-exporter
mount --bind "$1" /var/lib/prometheus/node-exporter
PATH="$2:$PATH"
exec sh "$3"
"""


class Recipe:
    """The script, and what it writes."""

    def __init__(self, bench: Bench, directory: Path) -> None:
        self._bench, self._programs = bench, directory / "bin"
        self._script = directory / "ttun-metrics"
        self._script.write_text(SCRIPT)
        self.collected = directory / "collected"
        for place in (self._programs, self.collected):
            place.mkdir()
        self.ttun(f'exec {shlex.join(PROGRAM)} "$@"')

    def ttun(self, text: str) -> None:
        """Have the script find this as the program."""
        program = self._programs / "ttun"
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(0o755)

    def command(self) -> Sequence[str]:
        paths = map(str, (self.collected, self._programs, self._script))
        return ["unshare", "--mount", "sh", "-c", COVERED, "sh", *paths]

    def run(self) -> str:
        """Run it to its end; return the only file that there is then."""
        self._bench.run(SERVER, *self.command(), timeout=30)
        (file,) = self.collected.iterdir()
        assert (file.name, file.stat().st_mode & 0o777) == ("ttun.prom", 0o644)
        return file.read_text()


@pytest.fixture
def recipe(plain: Bench, tmp_path: Path) -> Recipe:
    return Recipe(plain, tmp_path)


@pytest.mark.hosts
def test_the_collector_finds_each_tunnel_and_nothing_once_it_has_ended(
    plain: Bench, recipe: Recipe
) -> None:
    assert recipe.run() == "", "no tunnel is no error, and leaves no file of before"
    server = plain.server()
    labels = 'device="ttun0",role="server"'
    assert f"\nttun_connected{{{labels}}} 0\n" in recipe.run()
    client = plain.client()
    client.says("authenticated")
    eventually(lambda: f"\nttun_connected{{{labels}}} 1\n" in recipe.run(), "it is connected")
    client.stop()
    server.stop()
    assert recipe.run() == ""


@pytest.mark.hosts
def test_the_collector_never_sees_half_a_file(plain: Bench, recipe: Recipe, nap: str) -> None:
    recipe.ttun("echo whole 1")
    assert recipe.run() == "whole 1\n"
    recipe.ttun(f"echo half; sleep {nap}")
    script = plain.pair.start(SERVER, recipe.command())
    try:
        files = recipe.collected.glob
        eventually(lambda: any(f.read_text() == "half\n" for f in files("*")), "half is written")
        assert [f.read_text() for f in files("*.prom")] == ["whole 1\n"], "what is collected"
    finally:
        script.kill()
        script.wait()


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
def test_systemd_takes_its_timer(tmp_path: Path) -> None:
    service, timer = UNITS
    service = service.replace("/usr/local/sbin/ttun-metrics", "/bin/true")
    (tmp_path / "ttun-metrics.service").write_text(service)
    (tmp_path / "ttun-metrics.timer").write_text(timer)
    found = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *map(str, tmp_path.iterdir())],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (found.returncode, found.stderr) == (0, "")


def test_each_line_that_starts_the_script_names_it() -> None:
    path = "/usr/local/sbin/ttun-metrics"
    assert f"`{path}`, mode 0755" in DOC
    assert f"ExecStart={path}\n" in UNITS[0]
    assert re.search(rf"^\* \* \* \* \* root {path}$", DOC, re.M)
