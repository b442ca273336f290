"""Programs that embed an endpoint, run on a host of the tests."""

from __future__ import annotations

import sys
import textwrap

from tunnel import Bench

HEAD = """
import logging, os, pathlib, signal, sys, threading, time
import ttun
from ttun.errors import TtunError
logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")

def refused(call):
    try:
        call()
    except TtunError:
        return True
    return False

def devices():
    return [name for name in os.listdir("/sys/class/net") if name.startswith("ttun")]

def until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "not within 20 s"
        time.sleep(0.01)
"""


def run(bench: Bench, host: str, code: str, timeout: float = 60) -> str:
    """Run a program on a host; what it printed. /sys shows the host's devices there."""
    return bench.run(host, sys.executable, "-c", HEAD + textwrap.dedent(code), timeout=timeout)
