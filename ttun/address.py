"""Parse and format HOST:PORT; an IPv6 address is written in brackets (RFC 3986)."""

from __future__ import annotations

from typing import NamedTuple

from ttun.errors import UsageError

MAX_HOST = 255  # characters, the longest DNS name (RFC 1035)


class Address(NamedTuple):
    """A host (name, IPv4 or IPv6 address; empty: all addresses of this machine) and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        """Return it in command-line syntax."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_host_port(
    text: str, default: int | None, least: int = 1, *, any_host: bool = False
) -> Address:
    """Parse HOST:PORT or [IPv6]:PORT. Raises UsageError.

    default: the port to use when none is given; None makes it mandatory. least: the lowest valid
    port. any_host: accept :PORT too.
    """
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or not host:
            raise UsageError(f"{text!r}: write IPv6 addresses as [2001:db8::1]:PORT")
    else:
        host, colon, port = text.partition(":")
        rest = colon + port
        if ":" in port or "]" in host:
            raise UsageError(f"{text!r}: put IPv6 addresses in brackets, as in [2001:db8::1]:PORT")
    if not host and not any_host:
        raise UsageError(f"{text!r}: the host is missing")
    if len(host) > MAX_HOST:
        raise UsageError(f"host {host[:20]!r}... has more than {MAX_HOST} characters")
    if not rest and default is None:
        raise UsageError(f"{text!r}: the port is missing (use HOST:PORT)")
    number = parse_port(rest[1:], least) if rest else default
    if number is None or rest[:1] not in ("", ":"):
        raise UsageError(f"{text!r}: the port must be a number from {least} to 65535")
    return Address(host, number)


def parse_port(text: str, least: int = 1) -> int | None:
    """Return the port number, or None if the text is not a valid port."""
    if not (text.isascii() and text.isdigit() and len(text) <= 5):
        return None
    return int(text) if least <= int(text) <= 65535 else None
