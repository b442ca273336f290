"""The machine that figures come from: no figure means anything without it."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def describe() -> dict[str, object]:
    """Return what reports say about it."""
    return {"system": platform.platform(), "cores": cores()}


def cores() -> int:
    """Return how many processors this process may run on."""
    return len(os.sched_getaffinity(0))


def name() -> str:
    """Return processor, cores and kernel in one line, for tables and charts."""
    model = platform.machine()
    for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
        label, _, value = line.partition(":")
        if label.strip() in ("model name", "Model"):  # of x86, of ARM boards
            model = " ".join(value.split())
            break
    number = cores()
    kernel = ".".join(platform.release().split(".")[:2])
    return f"{model}, {number} core{'s' * (number != 1)}, Linux {kernel}"
