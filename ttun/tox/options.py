"""The command line of ``ttun tox``, compatible with that of Tuntox.

Without -L, -W, -D or -p it runs as a server. Option values are parsed as getopt does: joined to the
letter or in the next argument, even if that starts with a dash.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ttun.address import MAX_HOST, Address, parse_port
from ttun.errors import UsageError
from ttun.process.argv import join_each
from ttun.tox import identity, toxcore
from ttun.tox.instance import Proxy
from ttun.tox.rules import check_host, parse_target
from ttun.version import __version__

SECRET_VARIABLE = "TUNTOX_SHARED_SECRET"
DEFAULT_DIRECTORY = Path("/etc/tuntox")
WITH_VALUE = "iLWPCsfItubFU"
FLAGS = "dqSzpV"
# Schemes of ALL_PROXY. The h asks not to look up names on this host: see nodes.load().
PROXIES = {
    **dict.fromkeys(("socks", "socks5", "socks5h"), toxcore.PROXY_SOCKS5),
    "http": toxcore.PROXY_HTTP,
}
NO_PROXIES = ("socks4", "socks4a", "https")

EPILOG = f"""\
Without -L, -W, -D or -p, ttun tox runs as a server.
Environment: {SECRET_VARIABLE}; ALL_PROXY=socks5://HOST:PORT or
http://HOST:PORT, a proxy for all Tox traffic (disables UDP)."""


class Forward(NamedTuple):
    """A port to listen on, and the target at the other end (None: chosen through SOCKS5).

    bind: None for the loopback addresses, an empty string for all addresses.
    """

    bind: str | None
    port: int
    target: tuple[str, int] | None


@dataclass
class Options:
    """A parsed command line."""

    ids: list[str]
    forwards: list[Forward]
    pipe: Address | None
    ping: bool
    directory: Path
    keep_identity: bool
    secret: bytes | None
    rules: Path | None
    id_file: Path | None
    relay_port: int | None  # None: any
    udp_ports: tuple[int, int] | None  # None: any
    nodes: Path | None
    debug: int
    quiet: bool
    syslog: bool
    daemonize: bool
    pid_file: Path | None
    user: str | None
    proxy: Proxy | None

    @property
    def client(self) -> bool:
        """Whether this is a client."""
        return bool(self.forwards or self.pipe or self.ping)


def build_parser(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the options to a parser and return it."""
    add = parser.add_argument
    add(
        "-i", dest="ids", metavar="ID", action="append", default=[],
        help="client: the server's Tox ID, or its name in ~/.config/ttun/hosts or "
        "~/.tuntox/hosts; "
        "server: Tox ID or public key of an allowed client (repeatable; default: any client)",
    )  # fmt: skip
    add(
        "-L", dest="forwards", metavar="[BIND:]PORT:HOST:PORT", action="append", default=[],
        type=_checked(parse_forward),
        help="listen on PORT and forward to HOST:PORT at the server (repeatable)",
    )  # fmt: skip
    add(
        "-W", "-P", dest="pipe", metavar="HOST:PORT", type=_checked(parse_target),
        help="forward stdin and stdout to HOST:PORT (ProxyCommand)",
    )  # fmt: skip
    add(
        "-D", dest="socks", metavar="[BIND:]PORT", action="append", default=[], nargs="?",
        type=_checked(parse_socks),
        help="SOCKS5 proxy on PORT (repeatable); without PORT, run in the background",
    )  # fmt: skip
    add("-p", dest="ping", action="store_true", help="ping the server and exit")
    add(
        "-C", dest="directory", metavar="DIR", type=Path,
        help=f"keep the identity in DIR/{identity.SAVE} (default: {DEFAULT_DIRECTORY} for a "
        "server, none for a client: it gets a new identity each time)",
    )  # fmt: skip
    add(
        "-s", dest="secret", metavar="SECRET",
        help=f"shared secret, the same on both ends (default: {SECRET_VARIABLE} in the "
        "environment, which keeps it out of the process list)",
    )  # fmt: skip
    add(
        "-f", dest="rules", metavar="FILE", type=Path,
        help="server: allow only the targets in FILE, one HOST:PORT per line (default: any target)",
    )  # fmt: skip
    add("-I", dest="id_file", metavar="FILE", type=Path, help="write the Tox ID to FILE")
    add(
        "-t", dest="relay_port", metavar="PORT", type=_checked(_relay_port),
        help="TCP relay port, 0 to disable the relay (default: random; behind a proxy 0)",
    )  # fmt: skip
    add(
        "-u", dest="udp_ports", metavar="FROM:TO", type=_checked(_udp_ports),
        help="UDP port range (default: within 33445 to 33465 for a server, random for a client)",
    )  # fmt: skip
    add(
        "-b", dest="nodes", metavar="FILE", type=Path,
        help="bootstrap nodes, in the format of nodes.tox.chat/json (default: "
        "/etc/tuntox/nodes.json, else built in)",
    )  # fmt: skip
    add(
        "-d", dest="debug", action="count", default=0,
        help="log debug messages; twice: toxcore's too",
    )  # fmt: skip
    add("-q", dest="quiet", action="store_true", help="log errors only")
    add("-S", dest="syslog", action="store_true", help="log to syslog")
    add("-z", dest="daemonize", action="store_true", help="run in the background (implies -S)")
    add("-F", dest="pid_file", metavar="FILE", type=Path, help="write the process ID to FILE")
    add(
        "-U", dest="user", metavar="USER",
        help="switch to this user after opening the local ports (default: no change)",
    )  # fmt: skip
    add("-V", action="version", version=f"ttun {__version__}", help="show the version and exit")
    return parser


def read(
    parser: argparse.ArgumentParser, arguments: Sequence[str], environment: Mapping[str, str]
) -> Options:
    """Parse a command line and its environment variables. Raises UsageError."""
    given = build_parser(parser).parse_args(join_values(arguments))
    forwards = [*given.forwards, *(each for each in given.socks if each is not None)]
    # An empty variable means no secret; an empty -s is an error.
    secret = given.secret if given.secret is not None else environment.get(SECRET_VARIABLE) or None
    options = Options(
        ids=given.ids,
        forwards=forwards,
        pipe=given.pipe,
        ping=given.ping,
        directory=given.directory or DEFAULT_DIRECTORY,
        keep_identity=given.directory is not None,
        secret=None if secret is None else identity.check_secret(os.fsencode(secret)),
        rules=given.rules,
        id_file=given.id_file,
        relay_port=given.relay_port,
        udp_ports=given.udp_ports,
        nodes=given.nodes,
        debug=given.debug,
        quiet=given.quiet,
        daemonize=given.daemonize or None in given.socks,
        syslog=given.syslog or given.daemonize or None in given.socks,
        pid_file=given.pid_file,
        user=given.user,
        proxy=parse_proxy(environment.get("ALL_PROXY") or environment.get("all_proxy")),
    )
    if options.proxy is not None and options.relay_port is None:
        options.relay_port = 0  # it would listen beside the proxy
    if options.client and len(options.ids) != 1:
        raise UsageError("a client needs one -i (the server's Tox ID or its name)")
    if options.pipe and (options.forwards or options.ping or options.daemonize):
        raise UsageError("-W cannot be combined with -L, -D, -p or -z")
    if options.ping and options.forwards:
        raise UsageError("-p cannot be combined with -L or -D")
    return options


def join_values(arguments: Sequence[str]) -> list[str]:
    """Rewrite ``-s VALUE`` as ``-sVALUE``, so that argparse accepts a value that starts with -."""
    takes_value = re.compile(f"-[{FLAGS}]*[{WITH_VALUE}]").fullmatch
    return join_each(arguments, lambda argument: takes_value(argument) is not None, "")


def find_secrets(arguments: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Yield where secrets may be: the index of an argument after ``ttun``, and an offset in it.

    These are values of -s and, as in ttun.process.argv.find_secrets, unexpected arguments.
    """
    index = 0  # of "tox"
    while (index := index + 1) < len(arguments):
        argument = arguments[index]
        if found := re.fullmatch(f"-[{FLAGS}]*([{WITH_VALUE}])(.*)", argument, re.DOTALL):
            first = found.start(2)
            if not found[2]:  # it is the next argument
                index, first = index + 1, 0
            if found[1] == "s" and index < len(arguments):
                yield index, first
        elif re.fullmatch(f"-[{FLAGS}]*D", argument):
            index += not "".join(arguments[index + 1 : index + 2]).startswith("-")
        elif not re.fullmatch(f"-[{FLAGS}]+|-[{FLAGS}]*D.*|-h|--help", argument, re.DOTALL):
            yield index, int(argument.startswith("-"))


def parse_forward(text: str) -> Forward:
    """Parse [BIND:]PORT:HOST:PORT; ``@`` may replace ``:``. Raises UsageError."""
    fields = _fields(text)
    if len(fields) not in (3, 4):
        raise UsageError(f"{text!r} is not a valid forward (use PORT:HOST:PORT)")
    bind = None if len(fields) == 3 else _bind(fields[0])
    host = fields[-2]
    if not 0 < len(host) <= MAX_HOST:
        raise UsageError(f"{text[:40]!r}: the target host must have 1 to {MAX_HOST} characters")
    check_host(host)
    return Forward(bind, _port(fields[-3], 0, text), (host, _port(fields[-1], 1, text)))


def parse_socks(text: str) -> Forward:
    """Parse [BIND:]PORT. Raises UsageError."""
    fields = _fields(text)
    port = parse_port(fields[-1], 0)
    if len(fields) not in (1, 2) or port is None:
        # The text is not shown: after -D without a port it may be a secret.
        raise UsageError("not a valid SOCKS5 port (use PORT or BIND:PORT)")
    return Forward(None if len(fields) == 1 else _bind(fields[0]), port, None)


def parse_proxy(text: str | None) -> Proxy | None:
    """Parse the value of ALL_PROXY, as curl(1) and desktops write it. Raises UsageError."""
    if not text or not text.strip():
        return None
    scheme, separator, rest = text.strip().partition("://")
    scheme = scheme.lower()
    if scheme in NO_PROXIES:
        raise UsageError(f"ALL_PROXY: {scheme} is not supported (use socks5 or http)")
    if not separator or scheme not in PROXIES:
        raise UsageError("ALL_PROXY: use socks5://HOST:PORT or http://HOST:PORT")
    server = rest.split("/", 1)[0].strip()
    if "@" in server:
        raise UsageError("ALL_PROXY: toxcore does not support proxy authentication")
    try:
        host, port = parse_target(server)
    except UsageError as error:
        raise UsageError(f"ALL_PROXY: {error}") from None
    return Proxy(PROXIES[scheme], host, port)


def _relay_port(text: str) -> int:
    return _port(text, 0, text)


def _udp_ports(text: str) -> tuple[int, int]:
    first, separator, last = text.partition(":")
    ports = _port(first, 1, text), _port(last if separator else first, 1, text)
    return min(ports), max(ports)


def _fields(text: str) -> list[str]:
    """Split at colons outside of brackets."""
    fields = re.findall(r"(?:^|:)(\[[^\]]*\]|[^:\[\]]*)", text.replace("@", ":"))
    return [field[1:-1] if field.startswith("[") else field for field in fields]


def _bind(text: str) -> str:
    return "" if text == "*" else text


def _port(text: str, least: int, whole: str) -> int:
    port = parse_port(text, least)
    if port is None:
        raise UsageError(f"{whole!r}: the port must be a number from {least} to 65535")
    return port


class _checked:
    """An argparse type whose UsageError becomes the error message."""

    def __init__(self, parse: object) -> None:
        self._parse = parse

    def __call__(self, text: str) -> object:
        try:
            return self._parse(text)  # type: ignore[operator]
        except UsageError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
