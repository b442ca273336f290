"""Random connections through Tox for a short while. ``make soak SECONDS=1200`` is the long one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from tunnel import ROOT


@pytest.mark.hosts
@pytest.mark.tox
@pytest.mark.slow
def test_random_connections_leave_nothing_behind() -> None:
    """TTUN_TEST_SEED: others of them."""
    script = ROOT / "tests/soak/toxsoak.py"
    done = subprocess.run(
        [sys.executable, script, "20", os.environ.get("TTUN_TEST_SEED", "1")],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests/helpers"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    print(done.stdout)  # pytest -rP shows it
    assert done.returncode == 0, done.stdout + done.stderr
