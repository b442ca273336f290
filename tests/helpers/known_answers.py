"""Test vectors of protocol v1, checked against Go ttun: see vectors/wire-v1.json."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

SESSIONS = json.loads((Path(__file__).parents[1] / "vectors" / "wire-v1.json").read_text())[
    "sessions"
]


def frames(session: dict, direction: str) -> list[dict]:
    """The frames of one direction in their order, counted from 0."""
    chosen = [frame for frame in session["frames"] if frame["direction"] == direction]
    chosen.sort(key=lambda frame: frame["counter"])
    assert [frame["counter"] for frame in chosen] == list(range(len(chosen)))
    return chosen


def plaintext(frame: dict) -> bytes:
    """What is in a frame: given, or by the rule that the file states for the long ones."""
    if "plaintext" in frame:
        return bytes.fromhex(frame["plaintext"])
    seed = re.search(r"SEED = (\S+)", frame["plaintext_rule"])[1]
    size, data, block = frame["plaintext_len"], b"", 0
    while len(data) < size:
        data += hashlib.sha256(f"{seed}/{block}".encode()).digest()
        block += 1
    return data[:size]
