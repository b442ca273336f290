"""The grammar of the command line.

Go ttun's long options are accepted with one dash and with two. A value may begin with a dash; after
an option of one letter it may follow without a space. cli.py maps the name in ``run`` to the
function that runs the command.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

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
  sudo ttun server                  print the client's command, wait for it
  sudo ttun client -k KEY -s HOST   connect; then ping 10.1.1.1

ttun COMMAND -h lists the options of a command."""
EPILOG = """\
The key is taken from -k, else --psk-file, else the environment variable
TTUN_PSK, else /etc/ttun/psk. Options of Go ttun may begin with one dash: -mtu."""


def build_parser() -> Parser:
    """Return the parser of the whole command line."""
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

    server = _command(commands, "server", "wait for a client", EPILOG, "[OPTION...]")
    server.set_defaults(run="server")
    server.add_argument(
        "-l",
        "--listen",
        default=f":{DEFAULT_PORT}",
        metavar="ADDRESS",
        help="listen on :PORT (IPv4 and IPv6), 0.0.0.0:PORT or [::]:PORT (default: %(default)s)",
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
    client = _command(
        commands, "client", "connect to a server", EPILOG, "-s HOST[:PORT] [OPTION...]"
    )
    client.set_defaults(run="client")
    client.add_argument(
        "-s",
        "--server",
        required=True,
        metavar="HOST:PORT",
        help=f"the server: name, IPv4 or [IPv6] address (default port: {DEFAULT_PORT}); or tox:ID, "
        "or tox:NAME from ~/.config/ttun/hosts",
    )
    client.add_argument(
        "-rekey",
        "--rekey",
        type=float,
        default=Settings.limits.seconds,
        metavar="SECONDS",
        help="protocol x1: change keys after this time, or 64 GiB (default: %(default).0f)",
    )
    for end, ours, peers in ((server, SERVER, CLIENT), (client, CLIENT, SERVER)):
        end.add_argument(
            "--tox-nodes",
            metavar="FILE",
            help="Tox bootstrap nodes, JSON as in nodes.tox.chat/json",
        )
        _tunnel_options(end, ours, peers)

    demo = _command(commands, "demo", "run both ends on this machine: pings and transfers")
    demo.set_defaults(run="demo")
    demo.add_argument(
        "--size",
        type=int,
        default=64,
        metavar="MIB",
        help="amount to transfer each way (default: %(default)s)",
    )
    _bench_commands(_command(commands, "bench", "measure performance on this machine"))
    show = _command(commands, "show", "show the status of the tunnels on this machine")
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
    genkey = _command(commands, "genkey", "print a random 256-bit key")
    genkey.set_defaults(run="genkey")
    doctor = _command(commands, "doctor", "check this machine, and the path to a server")
    doctor.set_defaults(run="doctor")
    doctor.add_argument(
        "peer",
        nargs="?",
        metavar="HOST[:PORT]",
        help="server to check: does it answer, and the path MTU",
    )
    # Its options are tuntox's own, in a parser of its own: see run_tox.
    _command(commands, "tox", "forward ports through the Tox network, as tuntox does")
    return parser


def _bench_commands(bench: Parser) -> None:
    kinds = bench.add_subparsers(title="benchmarks", dest="kind", metavar="WHAT", required=True)
    codec = _command(kinds, "codec", "measure encryption and decryption on one core")
    codec.set_defaults(run="bench_codec")
    tunnel = _command(kinds, "tunnel", "measure a tunnel between two network namespaces")
    tunnel.set_defaults(run="bench_tunnel")
    _bench_options(tunnel, seconds=2.0)
    link = _command(kinds, "link", "measure a tunnel over an emulated link")
    link.set_defaults(run="bench_link")
    link.add_argument(
        "--rate",
        default="50",
        metavar="DOWN[/UP]",
        help="Mbit/s to the client, and from it if different (default: %(default)s)",
    )
    link.add_argument(
        "--rtt",
        type=float,
        default=40.0,
        metavar="MS",
        help="round-trip time of the idle link (default: %(default)g)",
    )
    link.add_argument(
        "--loss",
        default="0",
        metavar="PERCENT[,PERCENT...]",
        help="packet loss each way; several values: goodput over loss (default: %(default)s)",
    )
    link.add_argument(
        "--queue",
        type=float,
        default=100.0,
        metavar="MS",
        help="queueing delay at which the link drops packets (default: %(default)g)",
    )
    link.add_argument(
        "--congestion-control",
        default="cubic",
        metavar="NAME",
        help="congestion control of both hosts (default: %(default)s)",
    )
    link.add_argument(
        "--emulator",
        default="auto",
        metavar="auto|relay|netem",
        help="link emulator: relay needs a C compiler, netem a kernel module (default: auto, the "
        "first available)",
    )
    _bench_options(link, seconds=10.0)


def _bench_options(command: Parser, seconds: float) -> None:
    command.add_argument(
        "--rounds",
        type=_number,
        default=5,
        metavar="N",
        help="measurements to take the median of (default: %(default)s)",
    )
    command.add_argument(
        "--seconds",
        type=float,
        default=seconds,
        metavar="N",
        help="duration of each transfer (default: %(default)g)",
    )
    command.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="OTHER",
        help="competitor: openvpn, wireguard-go (or its path), or 'SERVER COMMAND :: CLIENT "
        "COMMAND' with {peer} for the server's address; after NAME=, under that name (repeatable)",
    )
    command.add_argument("--json", metavar="FILE", help="write all figures to FILE")
    command.add_argument("--plot", metavar="FILE.svg", help="draw a chart (needs matplotlib)")


def _command(
    commands: argparse._SubParsersAction[Parser],
    name: str,
    text: str,
    epilog: str = "",
    usage: str = "",
) -> Parser:
    description = text[0].upper() + text[1:] + "."
    short = f"ttun {name} {usage}" if usage else None  # of those with many options
    return commands.add_parser(name, help=text, description=description, epilog=epilog, usage=short)


def _tunnel_options(command: Parser, ours: Addresses, peers: Addresses) -> None:
    command.add_argument(
        "-k", "--psk", metavar="KEY", help="pre-shared key (ps shows it for a moment)"
    )
    command.add_argument(
        "-psk-file", "--psk-file", metavar="FILE", help="file with the pre-shared key, mode 0600"
    )
    command.add_argument(
        "-m",
        "--cipher",
        metavar="CIPHER",
        help="use only this cipher: aegis-256, aes-256-gcm or chacha20-poly1305 (default: the "
        "fastest that both ends have; with Go ttun chacha20-poly1305)",
    )
    command.add_argument(
        "-wire",
        "--wire",
        default=Settings.wire,
        metavar="|".join(WIRES),
        help="use only protocol v1 (Go ttun) or x1 (default: auto, x1 if the peer has it)",
    )
    command.add_argument(
        "-mtu",
        "--mtu",
        type=_number,
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
        help="GSO and GRO at the device; with false, raw sockets and captures see single packets "
        "(default: true)",
    )
    command.add_argument(
        "--congestion-control",
        default=Settings.congestion_control,
        metavar="NAME",
        help="congestion control, such as bbr; system: unchanged (default: auto, bbr if the RTT is "
        "1 ms or more)",
    )
    command.add_argument(
        "--buffers",
        default=Settings.buffers,
        metavar="|".join(BUFFERS),
        help="small: less memory, lower throughput, for routers with 64 MB (default: %(default)s)",
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
        help="route this network into the tunnel (repeatable)",
    )
    facts = ", as the user of --user, with TTUN_DEVICE, TTUN_PEER, ... in the environment"
    for name, when in (("up", f"connects{facts}"), ("down", "disconnects")):
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
        "-user",
        "--user",
        metavar="NAME",
        help="switch to this user after opening the device and port (default: nobody, if "
        "started as root)",
    )


def _number(text: str) -> int:
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
    """Write ``-k VALUE`` as ``-k=VALUE``: argparse then takes a value with a dash in front."""
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
    return joined + join_each(arguments[1:], with_value.__contains__, "=")
