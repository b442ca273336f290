"""The command line of ``ttun tox``: tuntox's own, so that either program runs the same one.

Without -L, -W, -D or -p it is a server. Options take their values as getopt does: joined to the
letter or after it, also with a dash in front.
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
from ttun.tox.rules import parse_target
from ttun.version import __version__

SECRET_VARIABLE = "TUNTOX_SHARED_SECRET"
DEFAULT_DIRECTORY = Path("/etc/tuntox")
WITH_VALUE = "iLWPCsfItubFU"
FLAGS = "dqSzpV"
# Schemes of ALL_PROXY. A name always goes to the proxy unresolved, which is what the h stands for.
PROXIES = {
    **dict.fromkeys(("socks", "socks5", "socks5h"), toxcore.PROXY_SOCKS5),
    "http": toxcore.PROXY_HTTP,
}
NO_PROXIES = ("socks4", "socks4a", "https")

EPILOG = f"""\
Environment: {SECRET_VARIABLE}, ALL_PROXY=socks5://HOST:PORT or http://HOST:PORT (for Tox
traffic; turns UDP off). Without -L, -W, -D or -p it is a server."""


class Forward(NamedTuple):
    """A port to listen on, and the target at the other end; None: SOCKS5 says.

    bind: None is the loopback, an empty string all addresses.
    """

    bind: str | None
    port: int
    target: tuple[str, int] | None


@dataclass
class Options:
    """What a command line asks for."""

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
        "server: allow this client alone (repeatable)",
    )  # fmt: skip
    add(
        "-L", dest="forwards", metavar="[BIND:]PORT:HOST:PORT", action="append", default=[],
        type=_checked(parse_forward),
        help="listen on PORT and forward to HOST:PORT at the other end (repeatable)",
    )  # fmt: skip
    add(
        "-W", "-P", dest="pipe", metavar="HOST:PORT", type=_checked(parse_target),
        help="forward HOST:PORT to stdin and stdout: ssh's ProxyCommand",
    )  # fmt: skip
    add(
        "-D", dest="socks", metavar="[BIND:]PORT", action="append", default=[], nargs="?",
        type=_checked(parse_socks),
        help="listen on PORT for SOCKS5; without a port, run in the background",
    )  # fmt: skip
    add("-p", dest="ping", action="store_true", help="ping the server and exit")
    add(
        "-C", dest="directory", metavar="DIR", type=Path,
        help=f"keep our identity in DIR/{identity.SAVE} (server: {DEFAULT_DIRECTORY} if left out; "
        "client: a fresh one each time)",
    )  # fmt: skip
    add(
        "-s", dest="secret", metavar="SECRET",
        help=f"the shared secret, the same on both ends; {SECRET_VARIABLE} keeps it out of the "
        "process list",
    )  # fmt: skip
    add("-f", dest="rules", metavar="FILE", type=Path, help="server: only these HOST:PORT targets")
    add("-I", dest="id_file", metavar="FILE", type=Path, help="write our Tox ID into FILE")
    add(
        "-t", dest="relay_port", metavar="PORT", type=_checked(_relay_port),
        help="be a TCP relay on this port; 0: be none (default: any port)",
    )  # fmt: skip
    add(
        "-u", dest="udp_ports", metavar="FROM:TO", type=_checked(_udp_ports),
        help="UDP ports for Tox (default: for a server some of 33445 to 33465)",
    )  # fmt: skip
    add(
        "-b", dest="nodes", metavar="FILE", type=Path,
        help="bootstrap from these nodes, in the form of nodes.tox.chat/json",
    )  # fmt: skip
    add("-d", dest="debug", action="count", default=0, help="say more; twice: toxcore's log too")
    add("-q", dest="quiet", action="store_true", help="say errors only")
    add("-S", dest="syslog", action="store_true", help="log to syslog")
    add("-z", dest="daemonize", action="store_true", help="run in the background (implies -S)")
    add("-F", dest="pid_file", metavar="FILE", type=Path, help="write our process id into FILE")
    add("-U", dest="user", metavar="USER", help="become this user")
    add("-V", action="version", version=f"ttun {__version__}")
    return parser


def read(
    parser: argparse.ArgumentParser, arguments: Sequence[str], environment: Mapping[str, str]
) -> Options:
    """Read a command line and what belongs to it in the environment. Raises UsageError."""
    given = build_parser(parser).parse_args(join_values(arguments))
    forwards = [*given.forwards, *(each for each in given.socks if each is not None)]
    # Nothing in the environment is no secret; nothing behind -s is a mistake.
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
    if options.client and len(options.ids) != 1:
        raise UsageError("a client needs one -i: the server's Tox ID or its name")
    if options.pipe and (options.forwards or options.ping or options.daemonize):
        raise UsageError("-W uses stdin and stdout: not with -L, -D, -p or -z")
    if options.ping and options.forwards:
        raise UsageError("-p pings and exits: not with -L or -D")
    return options


def join_values(arguments: Sequence[str]) -> list[str]:
    """Write ``-s VALUE`` as ``-sVALUE``: argparse then takes a value with a dash in front."""
    takes_value = re.compile(f"-[{FLAGS}]*[{WITH_VALUE}]").fullmatch
    return join_each(arguments, lambda argument: takes_value(argument) is not None, "")


def find_secrets(arguments: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Yield where a secret may be behind ``ttun``: an argument's index, and its first character.

    Behind -s, and in what is neither an option nor a value, as ttun.process.argv.find_secrets does.
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
    """Read [BIND:]PORT:HOST:PORT; ``@`` may stand for ``:``. Raises UsageError."""
    fields = _fields(text)
    if len(fields) not in (3, 4):
        raise UsageError(f"{text!r}: a forward is PORT:HOST:PORT, as in 2222:127.0.0.1:22")
    bind = None if len(fields) == 3 else _bind(fields[0])
    host = fields[-2]
    if not 0 < len(host) <= MAX_HOST:
        raise UsageError(f"{text[:40]!r}: the host at the other end has 1 to {MAX_HOST} characters")
    return Forward(bind, _port(fields[-3], 0, text), (host, _port(fields[-1], 1, text)))


def parse_socks(text: str) -> Forward:
    """Read [BIND:]PORT. Raises UsageError."""
    fields = _fields(text)
    port = parse_port(fields[-1], 0)
    if len(fields) not in (1, 2) or port is None:
        # Not shown: behind a bare -D it may be anything, a secret too.
        raise UsageError("a SOCKS5 port is PORT or BIND:PORT, as in 1080")
    return Forward(None if len(fields) == 1 else _bind(fields[0]), port, None)


def parse_proxy(text: str | None) -> Proxy | None:
    """Read the value of ALL_PROXY, as curl(1) and desktops write it. Raises UsageError."""
    if not text or not text.strip():
        return None
    scheme, separator, rest = text.strip().partition("://")
    scheme = scheme.lower()
    if scheme in NO_PROXIES:
        raise UsageError(f"ALL_PROXY: toxcore knows no {scheme} proxies, only socks5 and http")
    if not separator or scheme not in PROXIES:
        raise UsageError("ALL_PROXY: it looks like socks5://HOST:PORT or http://HOST:PORT")
    server = rest.split("/", 1)[0].strip()
    if "@" in server:
        raise UsageError("ALL_PROXY: toxcore cannot show a user and a password to a proxy")
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
    """Cut at colons, but not within brackets."""
    fields = re.findall(r"(?:^|:)(\[[^\]]*\]|[^:\[\]]*)", text.replace("@", ":"))
    return [field[1:-1] if field.startswith("[") else field for field in fields]


def _bind(text: str) -> str:
    return "" if text == "*" else text


def _port(text: str, least: int, whole: str) -> int:
    port = parse_port(text, least)
    if port is None:
        raise UsageError(f"{whole!r}: a port is a number from {least} to 65535")
    return port


class _checked:
    """A type for argparse whose UsageError is the message."""

    def __init__(self, parse: object) -> None:
        self._parse = parse

    def __call__(self, text: str) -> object:
        try:
            return self._parse(text)  # type: ignore[operator]
        except UsageError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
