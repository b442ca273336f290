"""The grammar of the command line.

Go ttun's long options are accepted with one dash and with two. A value may begin with a dash; after
an option of one letter it may follow without a space. cli.py maps the name in ``run`` to the
function that runs the command.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from ttun.commands import options_file
from ttun.process.argv import Parser, join_each
from ttun.settings import (
    BUFFERS,
    CLIENT,
    DEFAULT_PORT,
    MAX_MTU,
    MIN_MTU,
    SERVER,
    WIRES,
    Addresses,
    Settings,
)
from ttun.version import __version__

EXAMPLES = """\
examples:
  sudo ttun server                  print the client's command and wait
  sudo ttun client -k KEY -s HOST   connect; then ping 10.1.1.1

ttun COMMAND -h lists the options of a command."""
EPILOG = """\
The key is taken from -k, else --psk-file, else TTUN_PSK in the environment,
else /etc/ttun/psk. @FILE: options from a file, one a line, with # comments.
Options of Go ttun may begin with one dash: -mtu."""


def build_parser(extend: Callable[[Parser, Parser], None] | None = None) -> Parser:
    """Return the parser of the command line. extend: adds the options of demo and bench."""
    parser = Parser(
        prog="ttun",
        description="A point-to-point tunnel over one TCP connection.",
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "--version",
        "-version",
        action="version",
        version=f"ttun {__version__}",
        help="show the version and exit",
    )
    commands = parser.add_subparsers(
        title="commands", dest="command", metavar="COMMAND", required=True
    )

    server = add_command(commands, "server", "wait for a client", EPILOG, "[OPTION...]")
    server.set_defaults(run="server")
    where = server.add_mutually_exclusive_group()
    where.add_argument(
        "-l",
        "--listen",
        action="append",
        metavar="ADDRESS",
        help="listen on :PORT (IPv4 and IPv6), 0.0.0.0:PORT or [::]:PORT; repeatable "
        f"(default: :{DEFAULT_PORT})",
    )
    where.add_argument(
        "--stdio", action="store_true", help="serve one peer on stdin and stdout instead, then end"
    )
    server.add_argument(
        "-takeover",
        "--takeover",
        action="store_true",
        help="let a new client replace the connected one",
    )
    server.add_argument(
        "--tox", action="store_true", help="listen on the Tox network: no open port"
    )
    server.add_argument(
        "--tox-dir",
        default="/etc/ttun",
        metavar="DIR",
        help="directory of the Tox identity (default: %(default)s)",
    )
    client = add_command(
        commands, "client", "connect to a server", EPILOG, "-s HOST[:PORT] [OPTION...]"
    )
    client.set_defaults(run="client")
    client.add_argument(
        "-s",
        "--server",
        action="append",
        metavar="HOST:PORT",
        help=f"the server (default port: {DEFAULT_PORT}), tox:ID or tox:NAME (repeatable: the next "
        "after a failure)",
    )
    client.add_argument(
        "--via",
        metavar="COMMAND",
        help="connect through this command (%%h, %%p: from -s)",
    )
    client.add_argument(
        "--proxy",
        metavar="URL",
        help="connect through http://[USER:PASSWORD@]HOST:PORT or socks5://... (default: "
        "TTUN_PROXY)",
    )
    client.add_argument(
        "--bind", metavar="ADDRESS", help="connect from this address, or from device %%NAME"
    )
    client.add_argument(
        "-rekey",
        "--rekey",
        type=float,
        default=Settings.limits.seconds,
        metavar="SECONDS",
        help="x1: new keys after this time (default: %(default).0f)",
    )
    server.takes_files = client.takes_files = True
    for end, ours, peers in ((server, SERVER, CLIENT), (client, CLIENT, SERVER)):
        end.add_argument(
            "--tox-nodes",
            metavar="FILE",
            help="Tox bootstrap nodes, JSON as in nodes.tox.chat/json",
        )
        _tunnel_options(end, ours, peers)

    demo = add_command(commands, "demo", "run both ends on this machine: pings and transfers")
    bench = add_command(commands, "bench", "measure performance on this machine")
    if extend is not None:
        extend(demo, bench)
    show = add_command(commands, "show", "show the status of the tunnels on this machine")
    show.set_defaults(run="show", how="text")
    show.add_argument(
        "device", nargs="?", metavar="DEVICE", help="show this tunnel only (default: all)"
    )
    how = show.add_mutually_exclusive_group()
    for name, text in (
        ("json", "print JSON"),
        ("prometheus", "print metrics in the text format of Prometheus"),
        ("watch", "refresh every second, with rates and a graph"),
    ):
        how.add_argument(f"--{name}", dest="how", action="store_const", const=name, help=text)
    genkey = add_command(commands, "genkey", "print a random 256-bit key")
    genkey.set_defaults(run="genkey")
    doctor = add_command(commands, "doctor", "check this machine, and the path to a server")
    doctor.set_defaults(run="doctor")
    doctor.add_argument(
        "peer",
        nargs="?",
        metavar="HOST[:PORT]",
        help="server to check: does it answer, and the path MTU",
    )
    # Its options are tuntox's own, in a parser of its own: see run_tox.
    add_command(commands, "tox", "forward ports through the Tox network, as Tuntox does")
    return parser


def add_command(
    commands: argparse._SubParsersAction[Parser],
    name: str,
    text: str,
    epilog: str = "",
    usage: str = "",
) -> Parser:
    """Return the parser of a new command. text: its help. usage: short, if it has many options."""
    description = text[0].upper() + text[1:] + "."
    short = f"ttun {name} {usage}" if usage else None
    return commands.add_parser(name, help=text, description=description, epilog=epilog, usage=short)


def _tunnel_options(command: Parser, ours: Addresses, peers: Addresses) -> None:
    command.add_argument(
        "-k", "--psk", metavar="KEY", help="pre-shared key (ps shows it for a moment)"
    )
    command.add_argument(
        "-psk-file",
        "--psk-file",
        action="append",
        default=[],
        metavar="FILE",
        help="file with the key, mode 0600" + (" (repeatable)" if ours is SERVER else ""),
    )
    command.add_argument(
        "-m",
        "--cipher",
        metavar="CIPHER",
        help="use only this cipher: aegis-256, aes-256-gcm or chacha20-poly1305 (default: best of "
        "both)",
    )
    command.add_argument(
        "-wire",
        "--wire",
        default=Settings.wire,
        metavar="|".join(WIRES),
        help="use only protocol v1 (Go ttun) or x1 (default: auto)",
    )
    command.add_argument(
        "-mtu",
        "--mtu",
        type=number,
        default=Settings.mtu,
        metavar="BYTES",
        help=f"MTU of the device, {MIN_MTU} to {MAX_MTU} (default: %(default)s)",
    )
    command.add_argument(
        "-mptcp",
        "--mptcp",
        nargs="?",
        type=_boolean,
        const=True,
        metavar="true|false",
        help=f"use Multipath TCP (default: {'accept both' if ours is SERVER else 'false'})",
    )
    command.add_argument(
        "-offload",
        "--offload",
        nargs="?",
        type=_boolean,
        const=True,
        default=Settings.offload,
        metavar="true|false",
        help="use GSO and GRO at the device (default: true)",
    )
    command.add_argument(
        "--congestion-control",
        default=Settings.congestion_control,
        metavar="NAME",
        help="congestion control, such as bbr; system: the system's (default: auto)",
    )
    command.add_argument(
        "--buffers",
        default=Settings.buffers,
        metavar="|".join(BUFFERS),
        help="small: less memory and throughput (default: %(default)s)",
    )
    command.add_argument(
        "--dev", default=Settings.device, metavar="NAME", help="name of the device (default: ttunN)"
    )
    for side, whose, usual in (("local", "this end", ours), ("peer", "the peer", peers)):
        for version, address in (("4", usual.ipv4.ip), ("6", usual.ipv6.ip)):
            command.add_argument(
                f"--{side}{version}",
                metavar="ADDRESS",
                help=f"tunnel IPv{version} address of {whose} (default: {address})",
            )
    command.add_argument(
        "--route",
        action="append",
        default=[],
        metavar="NET/LENGTH",
        help="network to route into the tunnel"
        + ("" if ours is SERVER else ", or default: all but the LAN")
        + " (repeatable)",
    )
    for name, when in (("up", "connects"), ("down", "disconnects")):
        command.add_argument(
            f"--{name}", metavar="COMMAND", help=f"shell command to run when the peer {when}"
        )
    for name, level, text in (
        ("verbose", "DEBUG", "log more: each attempt, key change and hook"),
        ("quiet", "WARNING", "log only warnings and errors"),
    ):
        command.add_argument(
            f"-{name[0]}",
            f"--{name}",
            dest="log_level",
            action="store_const",
            const=level,
            help=text,
        )
    command.add_argument(
        "--monitor-group", metavar="NAME", help="let this group use ttun show for this tunnel"
    )
    command.add_argument(
        "--hook-user",
        metavar="NAME",
        help="run --up and --down as this user (default: --user)",
    )
    command.add_argument(
        "-user",
        "--user",
        metavar="NAME",
        help="drop privileges to this user (default: ttun, else nobody)",
    )


def number(text: str) -> int:
    """Read a whole number; for ``type`` of an option."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def _boolean(text: str) -> bool:
    """Read a boolean as Go's flag package does."""
    values = {"1": True, "t": True, "true": True, "0": False, "f": False, "false": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError("expected true or false")  # what was given may be a key
    return values[text.lower()]


def join_values(arguments: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """Write ``-k VALUE`` as ``-k=VALUE``: argparse then takes a value with a dash in front.

    For server and client, read the options in the files of ``@FILE`` first. Raises TtunError.
    """
    commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    joined = list(arguments[:1])
    command = commands.choices.get(arguments[0]) if arguments else None
    if command is None:
        return list(arguments)
    with_value = {
        option
        for action in command._actions
        for option in action.option_strings
        if action.nargs is None
    }
    rest = list(arguments[1:])
    if command.takes_files:
        rest = list(options_file.expand(rest, with_value, command))
    return joined + join_each(rest, with_value.__contains__, "=")
