"""Fault injection for a short time. ``make faults SECONDS=600 SEED=1`` is the long run."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from tunnel import ROOT

pytestmark = pytest.mark.hosts


@pytest.mark.slow
@pytest.mark.nft
@pytest.mark.parametrize("wire", ["v1", "x1"])
def test_a_short_while_of_faults(wire: str) -> None:
    """TTUN_TEST_SEED: another order of faults."""
    script = ROOT / "tests/soak/faults.py"
    done = subprocess.run(
        [sys.executable, script, "15", os.environ.get("TTUN_TEST_SEED", "1"), wire],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests/helpers"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    print(done.stdout)  # pytest -rP shows it
    assert done.returncode == 0, done.stdout + done.stderr
    faults = int(done.stdout.splitlines()[1].split()[0])
    assert faults >= 5, "it got somewhere"
