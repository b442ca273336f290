"""Which targets a server connects to: a file of ``host:port`` lines.

``*`` is any host, port 0 any port, ``#`` begins a comment; ``@`` may stand for ``:``. The host is
compared with what the client asks for, not with what it resolves to.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from ttun.address import Address, parse_host_port
from ttun.errors import TtunError, UsageError
from ttun.process import files

log = logging.getLogger("ttun")

MAX_SIZE = 1 << 20  # bytes of a file of rules


def parse_target(text: str, least_port: int = 1) -> Address:
    """Read HOST:PORT, HOST@PORT or [IPv6]:PORT. Raises UsageError."""
    return parse_host_port(text.replace("@", ":"), None, least_port)


def load(path: Path) -> list[Address]:
    """Return the rules in a file; invalid lines are logged. Raises TtunError."""
    rules = []
    try:
        lines = files.read(path, MAX_SIZE).decode(errors="replace").splitlines()
    except OSError as error:
        raise TtunError(f"cannot read the rules in {path}: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        text = line.split("#", 1)[0].strip()
        if text:
            try:
                rules.append(parse_target(text, least_port=0))
            except UsageError as error:
                log.warning("%s, line %d: %s: ignored", path, number, error)
    log.info("%d rules in %s%s", len(rules), path, "" if rules else ": every target is refused")
    return rules


def allowed(rules: Sequence[Address], host: str, port: int) -> bool:
    """Return whether a rule allows a target."""
    return any(rule.host in ("*", host) and rule.port in (0, port) for rule in rules)
