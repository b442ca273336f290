"""The host of faults for a short while. ``make faults SECONDS=600 SEED=1`` is the long one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ttun.lab import netns

pytestmark = pytest.mark.hosts


@pytest.mark.slow
@pytest.mark.nft
@pytest.mark.parametrize("wire", ["v1", "x1"])
def test_a_short_while_of_faults(wire: str) -> None:
    """TTUN_TEST_SEED: another order of them."""
    script = Path(__file__).with_name("faults.py")
    done = subprocess.run(
        [sys.executable, script, "15", os.environ.get("TTUN_TEST_SEED", "1"), wire],
        env={**os.environ, **netns.environment()}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    print(done.stdout)  # pytest -rP shows it
    assert done.returncode == 0, done.stdout + done.stderr
    faults = int(done.stdout.splitlines()[1].split()[0])
    assert faults >= 5, "it got somewhere"
