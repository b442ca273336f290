"""The answer of a status socket: its fields, and the checks of an answer from an untrusted process.

Of strings only the length is checked. Whatever prints one has to escape it, as printable() does.
"""

from __future__ import annotations

import json
import os
from typing import Any, Callable

from ttun.session import Counters

FORMAT = 1  # of the JSON; docs/status.md says when it changes
MOST_CHARACTERS = 512  # of a string
Tunnel = dict[str, Any]
Check = Callable[[object], bool]


class Malformed(Exception):
    """An answer is not valid. The message says why and quotes nothing from the answer."""


def parse(line: bytes) -> Tunnel:
    """Return the fields of an answer, as status.as_dict() made them. Raises Malformed."""
    try:
        found = json.loads(line.decode(), parse_int=_integer, parse_constant=_no_constant)
    except (ValueError, RecursionError):  # invalid UTF-8 and invalid JSON are ValueErrors
        raise Malformed("not JSON, or nested too deeply") from None
    if not isinstance(found, dict):
        raise Malformed("not a JSON object")
    for name, check in FIELDS.items():
        if name not in found and name not in NEW:
            raise Malformed(f"{name} is missing")
        if not check(found.get(name)):
            raise Malformed(f"{name} has the wrong type or is out of range")
    for name in OF_A_PEER:
        if found["peer"] is not None and found[name] is None:
            raise Malformed(f"a peer without {name}")
    for name in ("counters", "totals"):
        found[name] = {field: found[name][field] for field in Counters._fields}
    return {**{name: found.get(name) for name in FIELDS}, "format": FORMAT}


def own_netns() -> int | None:
    """Return this process's network namespace, an inode number; None without /proc."""
    try:
        return os.stat("/proc/self/ns/net").st_ino  # namespaces(7)
    except OSError:
        return None


def _integer(digits: str) -> int:
    if len(digits) > 20:  # 64 bits; longer ones take time to parse
        raise ValueError
    return int(digits)


def _no_constant(_: str) -> float:
    raise ValueError  # NaN and Infinity are not JSON


def _text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= MOST_CHARACTERS


def _texts(value: object) -> bool:
    return value is None or (isinstance(value, list) and all(map(_text, value)))


def _count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 64  # True is an int too


def _seconds(value: object) -> bool:
    return (type(value) is int or type(value) is float) and 0 <= value < 1e12


def _share(value: object) -> bool:
    return _seconds(value) and value <= 1  # type: ignore[operator]


def _counters(value: object) -> bool:
    return isinstance(value, dict) and all(_count(value.get(name)) for name in Counters._fields)


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _one_of(*values: object) -> Check:
    return lambda value: value in values


FIELDS: dict[str, Check] = {
    "role": _one_of("server", "client"),
    "device": _or_none(_text),
    "peer": _or_none(_text),
    "transport": _or_none(_text),
    "wire": _one_of("v1", "x1", None),
    "cipher": _or_none(_text),
    "round_trip": _or_none(_seconds),
    "rekeys": _or_none(_count),
    "congestion_control": _or_none(_text),
    "retransmitted": _or_none(_share),
    "connected_for": _or_none(_seconds),
    "silent_for": _or_none(_seconds),
    "sessions": _count,
    "counters": _counters,
    "totals": _counters,
    "missing": _texts,
    "uptime": _or_none(_seconds),
    "endpoint": _or_none(_text),
    "failed_attempts": _or_none(_count),
    "last_failure": _or_none(_text),
    "last_failure_ago": _or_none(_seconds),
    "mtu": _or_none(_count),
    "local4": _or_none(_text),
    "peer4": _or_none(_text),
    "local6": _or_none(_text),
    "peer6": _or_none(_text),
    "pid": _or_none(_count),
    "netns": _or_none(_count),
    "format": _one_of(FORMAT, None),
}
# Tunnels of earlier versions do not send the ones after "totals", and these.
NEW = {"congestion_control", "retransmitted", *list(FIELDS)[list(FIELDS).index("missing") :]}
OF_A_PEER = ("transport", "wire", "cipher", "connected_for")
