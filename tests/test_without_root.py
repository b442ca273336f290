"""``make test`` without user namespaces: it passes, and lists the skipped tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tunnel import ROOT

from ttun.lab import netns

TESTS = """
import pytest

def test_with_files_of_its_own(tmp_path):
    assert tmp_path.is_relative_to(BASE), tmp_path

@pytest.mark.hosts
def test_with_a_device():
    raise AssertionError("it takes root")
"""
# Root without the two capabilities that such a user has not.
NO_RIGHTS = ["setpriv", "--bounding-set", "-net_admin,-sys_admin"]


def test_what_takes_no_root_runs_where_no_namespace_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "test_both.py").write_text(TESTS.replace("BASE", repr(str(tmp_path))))
    paths = os.pathsep.join(
        str(ROOT / name) for name in ("", "tests", "tests/helpers", "packaging")
    )
    done = subprocess.run(
        [*(NO_RIGHTS if os.geteuid() == 0 else []), sys.executable, "-m", "pytest",
         "-p", "conftest", "-p", "no:cacheprovider", "-rs", tmp_path],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "PYTHONPATH": paths, "TMPDIR": str(tmp_path), netns.INSIDE: "1",
             "PYTEST_DEBUG_TEMPROOT": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "1 passed, 1 skipped" in done.stdout
    assert "NOT RUN: all end-to-end tests: this needs root" in done.stdout
