"""The targets that a server allows: a file of ``host:port`` lines.

``*`` matches any host, port 0 any port; ``#`` starts a comment; ``@`` may replace ``:``. The host
is compared with the one that the client requests, not with the address that it resolves to.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from ttun.address import Address, parse_host_port
from ttun.errors import TtunError, UsageError
from ttun.process import files

log = logging.getLogger("ttun")

MAX_SIZE = 1 << 20  # bytes in a file of rules


def parse_target(text: str, least_port: int = 1) -> Address:
    """Read HOST:PORT, HOST@PORT or [IPv6]:PORT. Raises UsageError."""
    target = parse_host_port(text.replace("@", ":"), None, least_port)
    check_host(target.host)
    return target


def check_host(host: str) -> None:
    """Raise UsageError for an argument that was not UTF-8: its surrogates cannot be encoded."""
    try:
        host.encode()
    except UnicodeError:
        raise UsageError(f"the host {host[:20]} is not valid UTF-8") from None


def load(path: Path) -> list[Address]:
    """Return the rules in a file; invalid lines are logged and skipped. Raises TtunError."""
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
                log.warning("%s, line %d ignored: %s", path, number, error)
    log.info("%d rules in %s%s", len(rules), path, "" if rules else ": all targets are refused")
    return rules


def allowed(rules: Sequence[Address], host: str, port: int) -> bool:
    """Return whether a rule allows a target."""
    return any(rule.host in ("*", host) and rule.port in (0, port) for rule in rules)
