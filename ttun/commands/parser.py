"""The command line's grammar: what there is to say, and how a wrong one is answered.

The long options of Go ttun work with one dash and with two. A value may begin with a dash; behind
an option of one letter it may follow without a blank. What each command does is in cli.py, under
the name in ``run``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ttun.process.argv import Parser, join_each
from ttun.settings import BUFFERS, DEFAULT_PORT, MAX_MTU, MIN_MTU, WIRES, Settings
from ttun.version import __version__

EPILOG = """\
The key comes from -k, else --psk-file, else TTUN_PSK in the environment, else /etc/ttun/psk.
In the tunnel the server is 10.1.1.1 and fc11::1, the client 10.1.1.2 and fc11::2."""


def build_parser() -> Parser:
    """Return the parser of the whole command line."""
    parser = Parser(
        prog="ttun",
        description="A point-to-point tunnel over one TCP connection.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", "-version", action="version", version=f"ttun {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    server = _command(commands, "server", "wait for the client", epilog=EPILOG)
    server.set_defaults(run="server")
    server.add_argument(
        "-l",
        "--listen",
        action="append",
        metavar="ADDRESS",
        help=f"listen on :PORT, 0.0.0.0:PORT or [::]:PORT; repeatable (default: :{DEFAULT_PORT})",
    )
    server.add_argument(
        "-takeover",
        "--takeover",
        action="store_true",
        help="a new client replaces the one that is connected (default: it waits)",
    )
    server.add_argument(
        "--tox", action="store_true", help="listen on the Tox network instead: no open port"
    )
    server.add_argument(
        "--tox-dir",
        default="/etc/ttun",
        metavar="DIR",
        help="our Tox identity (default: %(default)s)",
    )
    client = _command(commands, "client", "connect to the server", epilog=EPILOG)
    client.set_defaults(run="client")
    client.add_argument(
        "-s",
        "--server",
        action="append",
        required=True,
        metavar="HOST:PORT",
        help="the server: a name, an IPv4 address or an [IPv6] one; the port is "
        f"{DEFAULT_PORT} if left out; "
        "tox:ID through the Tox network, or tox:NAME from ~/.config/ttun/hosts; repeatable: the "
        "next one after a failure",
    )
    client.add_argument(
        "--proxy",
        metavar="URL",
        help="connect through http://[USER:PASSWORD@]HOST:PORT or socks5://... (default: "
        "TTUN_PROXY in the environment)",
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
        help="fresh keys after so long, or after 64 GiB; on wire x1 (default: %(default).0f)",
    )
    for end in (server, client):
        end.add_argument(
            "--tox-nodes", metavar="FILE", help="where to enter Tox, like nodes.tox.chat/json"
        )
        _tunnel_options(end)

    demo = _command(commands, "demo", "both ends on this machine: pings, a transfer, a table")
    demo.set_defaults(run="demo")
    demo.add_argument(
        "--size",
        type=int,
        default=256,
        metavar="MIB",
        help="how much to send each way (default: %(default)s MiB)",
    )
    _bench_commands(_command(commands, "bench", "measure how fast it is on this machine"))
    show = _command(commands, "show", "what the tunnels of this machine are doing")
    show.set_defaults(run="show", how="text")
    show.add_argument("device", nargs="?", metavar="DEVICE", help="ttun0, for one (default: all)")
    how = show.add_mutually_exclusive_group()
    for name, text in (
        ("json", "as JSON"),
        ("prometheus", "in the text format of Prometheus"),
        ("watch", "again every second, with rates and a graph"),
    ):
        how.add_argument(f"--{name}", dest="how", action="store_const", const=name, help=text)
    genkey = _command(commands, "genkey", "print a fresh 256-bit key")
    genkey.set_defaults(run="genkey")
    doctor = _command(commands, "doctor", "what of this machine a tunnel can use, what it lacks")
    doctor.set_defaults(run="doctor")
    doctor.add_argument(
        "peer",
        nargs="?",
        metavar="HOST[:PORT]",
        help="a server, to see whether it answers and how large a packet gets there",
    )
    # Its options are tuntox's own, in a parser of its own: see run_tox.
    _command(commands, "tox", "forward ports through Tox to a machine behind NAT, as tuntox does")
    return parser


def _bench_commands(bench: Parser) -> None:
    kinds = bench.add_subparsers(dest="kind", metavar="WHAT", required=True)
    codec = _command(kinds, "codec", "seal and open, each cipher and size, on one core")
    codec.set_defaults(run="bench_codec")
    tunnel = _command(kinds, "tunnel", "both ends on this machine, beside the bare link and others")
    tunnel.set_defaults(run="bench_tunnel")
    _bench_options(tunnel, seconds=2.0)
    link = _command(kinds, "link", "both ends on this machine, over a link with delay and loss")
    link.set_defaults(run="bench_link")
    link.add_argument(
        "--rate",
        default="50",
        metavar="DOWN[/UP]",
        help="Mbit/s to the client, and from it if not the same (default: %(default)s)",
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
        help="lost each way (default: %(default)s); with several, measure goodput over loss",
    )
    link.add_argument(
        "--queue",
        type=float,
        default=100.0,
        metavar="MS",
        help="longest wait in the link's queue before packets are dropped (default: %(default)g)",
    )
    link.add_argument(
        "--congestion-control",
        default="cubic",
        metavar="NAME",
        help="default of both hosts (default: %(default)s)",
    )
    link.add_argument(
        "--emulator",
        default="auto",
        metavar="auto|relay|netem",
        help="what makes the link: a program that needs a C compiler, or the kernel's netem "
        "(default: auto, the first that can be had)",
    )
    _bench_options(link, seconds=10.0)


def _bench_options(command: Parser, seconds: float) -> None:
    command.add_argument("--rounds", type=_number, default=5, help="default: %(default)s")
    command.add_argument(
        "--seconds", type=float, default=seconds, help="of each transfer (default: %(default)s)"
    )
    command.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="OTHER",
        help="openvpn, wireguard-go (or its path), or 'SERVER COMMAND :: CLIENT COMMAND' with "
        "{peer} for the server's address; with NAME= in front, under that name; repeatable",
    )
    command.add_argument("--json", metavar="FILE", help="write all figures")
    command.add_argument("--plot", metavar="FILE.svg", help="draw them; needs matplotlib")


def _command(
    commands: argparse._SubParsersAction[Parser], name: str, text: str, epilog: str = ""
) -> Parser:
    return commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=epilog,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _tunnel_options(command: Parser) -> None:
    command.add_argument("-k", "--psk", metavar="KEY", help="the pre-shared key itself")
    command.add_argument(
        "-psk-file", "--psk-file", metavar="FILE", help="a file with the key, mode 0600"
    )
    command.add_argument(
        "-m",
        "--cipher",
        metavar="CIPHER",
        help="chacha20-poly1305, aes-256-gcm or aegis-256, and no other (default: the best of both "
        "ends; with an original peer, chacha20-poly1305)",
    )
    command.add_argument(
        "-wire",
        "--wire",
        default=Settings.wire,
        metavar="|".join(WIRES),
        help="x1 between two of ours, v1 with an original peer (default: auto, whatever the peer "
        "has)",
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
        help="Multipath TCP, or plain TCP; left out, the server takes both, the client dials TCP",
    )
    command.add_argument(
        "-offload",
        "--offload",
        nargs="?",
        type=_boolean,
        const=True,
        default=Settings.offload,
        metavar="true|false",
        help="large packets at the device where the kernel has them (default: true); "
        "with false, raw sockets and captures show each packet, not coalesced ones",
    )
    command.add_argument(
        "--congestion-control",
        default=Settings.congestion_control,
        metavar="NAME",
        help="of the tunnel's connection: cubic, bbr, ..., or system for the system's (default: "
        "auto, which is bbr unless the peer is nearer than 1 ms)",
    )
    command.add_argument(
        "--buffers",
        default=Settings.buffers,
        metavar="|".join(BUFFERS),
        help="small: less memory and less speed, for a router with 64 MB (default: %(default)s)",
    )
    command.add_argument(
        "--dev", default=Settings.device, metavar="NAME", help="name of the device (default: ttunN)"
    )
    for side, whose in (("local", "our"), ("peer", "the peer's")):
        for version in ("4", "6"):
            command.add_argument(
                f"--{side}{version}",
                metavar="ADDRESS",
                help=f"{whose} IPv{version} address in the tunnel, if not the usual one",
            )
    command.add_argument(
        "--route",
        action="append",
        default=[],
        metavar="NET/LENGTH",
        help="reach this network through the tunnel; repeatable",
    )
    for name, when in (("up", "a peer is connected"), ("down", "it has left")):
        command.add_argument(
            f"--{name}",
            metavar="COMMAND",
            help=f"run when {when}, with TTUN_DEVICE, TTUN_PEER and more in its environment, as "
            "the user of --user",
        )
    command.add_argument(
        "-user",
        "--user",
        metavar="NAME",
        help="who to be once the device is open (default: nobody, if started as root)",
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
        raise argparse.ArgumentTypeError("it is true or false")  # what was given may be a key
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
