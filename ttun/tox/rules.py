"""Which targets a server connects to: a file of ``host:port`` lines.

``*`` is any host, port 0 any port, ``#`` begins a comment; ``@`` may stand for ``:``. The host is
compared with what the client asks for, not with what it resolves to.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ttun.errors import TtunError, UsageError
from ttun.process import files

log = logging.getLogger("ttun")

MAX_SIZE = 1 << 20  # bytes of a file of rules
MAX_HOST = 255  # as long as a name can be; a request for it has to fit a packet


class Rule(NamedTuple):
    """A host, or ``*``, and a port, or 0."""

    host: str
    port: int


def parse_target(text: str, least_port: int = 1) -> Rule:
    """Read HOST:PORT, HOST@PORT or [IPv6]:PORT. Raises UsageError."""
    host, separator, port = text.replace("@", ":").rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise UsageError(f"{text!r}: put an IPv6 address in brackets, as in [2001:db8::1]:22")
    if len(host) > MAX_HOST:
        raise UsageError(f"the host {host[:20]!r}... has more than {MAX_HOST} characters")
    if not separator or not host or not (port.isascii() and port.isdigit()):
        raise UsageError(f"{text!r}: a target is HOST:PORT, as in 127.0.0.1:22")
    if len(port) > 5 or not least_port <= int(port) <= 65535:
        raise UsageError(f"{text!r}: the port is a number from {least_port} to 65535")
    return Rule(host, int(port))


def load(path: Path) -> list[Rule]:
    """Return the rules in a file; lines that are none are logged. Raises TtunError."""
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


def allowed(rules: Sequence[Rule], host: str, port: int) -> bool:
    """Return whether a rule allows a target."""
    return any(rule.host in ("*", host) and rule.port in (0, port) for rule in rules)
