"""The command line: ``ttun server``, ``client``, ``demo``, ``bench``, ``genkey``.

Long options work with one dash, as in the original program, and with two. A value may begin with
a dash. Errors are one line on stderr: exit code 2 for bad usage, 1 for what cannot work here.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ttun import key, privileges
from ttun.errors import TtunError, UsageError
from ttun.version import __version__

if TYPE_CHECKING:
    from ttun.endpoint import Endpoint
    from ttun.tox.transport import Listener

log = logging.getLogger("ttun")

EPILOG = """\
The key comes from -k, else --psk-file, else TTUN_PSK in the environment, else /etc/ttun/psk.
In the tunnel the server is 10.1.1.1 and fc11::1, the client 10.1.1.2 and fc11::2."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, where help is, and exit with code 2."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} -h\n")


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
    server.set_defaults(run=run_server)
    server.add_argument(
        "-l",
        "--listen",
        default=":20203",
        metavar="ADDRESS",
        help="listen on :PORT, 0.0.0.0:PORT or [::]:PORT (default: %(default)s)",
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
    client.set_defaults(run=run_client)
    client.add_argument(
        "-s",
        "--server",
        required=True,
        metavar="HOST:PORT",
        help="the server: a name, an IPv4 address or an [IPv6] one; the port is 20203 if left out; "
        "tox:ID through the Tox network, or tox:NAME from ~/.config/ttun/hosts",
    )
    client.add_argument(
        "-rekey",
        "--rekey",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="fresh keys after so long, or after 64 GiB; on wire x1 (default: %(default).0f)",
    )
    for end in (server, client):
        end.add_argument(
            "--tox-nodes", metavar="FILE", help="where to enter Tox, like nodes.tox.chat/json"
        )
        _tunnel_options(end)

    demo = _command(commands, "demo", "both ends on this machine: pings, a transfer, a table")
    demo.set_defaults(run=run_demo)
    demo.add_argument(
        "--size",
        type=int,
        default=256,
        metavar="MIB",
        help="how much to send each way (default: %(default)s MiB)",
    )
    _bench_commands(_command(commands, "bench", "measure how fast it is on this machine"))
    genkey = _command(commands, "genkey", "print a fresh 256-bit key")
    genkey.set_defaults(run=run_genkey)
    # Its options are tuntox's own, in a parser of its own: see run_tox.
    _command(commands, "tox", "forward ports through Tox to a machine behind NAT, as tuntox does")
    return parser


def _bench_commands(bench: Parser) -> None:
    kinds = bench.add_subparsers(dest="kind", metavar="WHAT", required=True)
    codec = _command(kinds, "codec", "seal and open, each cipher and size, on one core")
    codec.set_defaults(run=run_bench_codec)
    tunnel = _command(kinds, "tunnel", "both ends on this machine, beside the bare link and others")
    tunnel.set_defaults(run=run_bench_tunnel)
    tunnel.add_argument("--rounds", type=_number, default=5, help="default: %(default)s")
    tunnel.add_argument(
        "--seconds", type=float, default=2.0, help="of each transfer (default: %(default)s)"
    )
    tunnel.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="OTHER",
        help="openvpn, wireguard-go (or its path), or 'SERVER COMMAND :: CLIENT COMMAND' with "
        "{peer} for the server's address; repeatable",
    )
    tunnel.add_argument("--json", metavar="FILE", help="write all figures")
    tunnel.add_argument("--plot", metavar="FILE.svg", help="draw them (pip install 'ttun[plot]')")


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
        default="auto",
        metavar="auto|v1|x1",
        help="x1 between two of ours, v1 with an original peer (default: auto, whatever the peer "
        "has)",
    )
    command.add_argument(
        "-mtu",
        "--mtu",
        type=_number,
        default=1280,
        metavar="BYTES",
        help="MTU of the device, 576 to 65519 (default: %(default)s)",
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
        default=True,
        metavar="true|false",
        help="large packets at the device where the kernel has them (default: true)",
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
        raise argparse.ArgumentTypeError(f"{text!r} is not true or false")
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
    rest = list(arguments[1:])
    while rest:
        argument = rest.pop(0)
        # argparse drops a value of two dashes whatever is done: leave it apart, it is refused then.
        if argument in with_value and rest and rest[0] != "--":
            argument += f"={rest.pop(0)}"
        joined.append(argument)
    return joined


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    _open_standard_streams()
    parser = build_parser()
    if arguments[:1] == ["tox"]:
        options = argparse.Namespace(command="tox", run=run_tox, arguments=arguments[1:])
    else:
        options = parser.parse_args(join_values(arguments, parser))
    if not sys.platform.startswith("linux"):
        return _fail("ttun runs on Linux only so far: it needs a Linux TUN device")
    _start_logging()
    try:
        code = int(options.run(options))
        sys.stdout.flush()
        return code
    except UsageError as error:
        _fail(f"{error}; see ttun {options.command} -h")
        return 2
    except TtunError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        return _fail(f"cannot write the output: {error.strerror}")
    finally:
        _forget_unwritten()


def _open_standard_streams() -> None:
    """Give a program that was started without them somewhere to write, and no other file 0 to 2."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - it is to stay open
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115


def _forget_unwritten() -> None:
    """Drop what a full disk or a closed pipe did not take: Python would make it exit code 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _fail(message: str) -> int:
    print(f"ttun: {message}", file=sys.stderr)
    return 1


def _start_logging() -> None:
    # A full disk or a closed terminal must not turn a log line into a traceback.
    logging.raiseExceptions = False
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y/%m/%d %H:%M:%S"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)


def run_genkey(_: argparse.Namespace) -> int:
    """``ttun genkey``."""
    print(key.generate())
    return 0


def run_demo(options: argparse.Namespace) -> int:
    """``ttun demo``."""
    from ttun import demo

    return demo.run(options.size)


def run_bench_codec(_: argparse.Namespace) -> int:
    """``ttun bench codec``."""
    from ttun import bench

    return bench.codec()


def run_bench_tunnel(options: argparse.Namespace) -> int:
    """``ttun bench tunnel``."""
    from ttun import bench

    if options.rounds < 1 or not 0 < options.seconds < 3600:
        raise UsageError("at least one round and less than an hour")
    return bench.tunnel(
        options.rounds, options.seconds, options.against, options.json, options.plot
    )


def run_tox(options: argparse.Namespace) -> int:
    """``ttun tox``."""
    from ttun.tox import command
    from ttun.tox import options as tox_options

    parser = Parser(
        prog="ttun tox",
        description="Forward ports through Tox to a machine behind NAT; the options are tuntox's.",
        epilog=tox_options.EPILOG,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return command.run(parser, options.arguments)


def run_server(options: argparse.Namespace) -> int:
    """``ttun server``."""
    from ttun.server import Server

    psk = key.find(options.psk, options.psk_file)
    made = psk is None
    if psk is None:
        privileges.check()  # before a key is made that nobody can use
        psk = key.create()
        log.info("made a new key and kept it in %s", key.DEFAULT_FILE)
    tox = _tox_listener(options) if options.tox else None
    if tox is not None:
        log.info("on the client: ttun client -s %s", tox.address)
    if made:
        _show_client_command(psk, tox.address if tox else None)
    return _run(Server(psk, listen=options.listen, tox=tox, **_endpoint_options(options)))


def _tox_listener(options: argparse.Namespace) -> Listener:
    from ttun.tox.transport import Listener

    return Listener(Path(options.tox_dir), Path(options.tox_nodes) if options.tox_nodes else None)


def run_client(options: argparse.Namespace) -> int:
    """``ttun client``."""
    from ttun.client import Client
    from ttun.control import Limits

    psk = key.find(options.psk, options.psk_file)
    if psk is None:
        raise UsageError(
            f"no key: put the server's with -k or --psk-file, in {key.VARIABLE}, "
            f"or into {key.DEFAULT_FILE} (chmod 600)"
        )
    if not 0 < options.rekey <= 120:
        raise UsageError(f"--rekey {options.rekey:g}: more than 0, and 120 seconds at most")
    client = Client(
        psk,
        server=options.server,
        tox_nodes=options.tox_nodes,
        limits=Limits(seconds=options.rekey),
        **_endpoint_options(options),
    )
    return _run(client)


def _endpoint_options(options: argparse.Namespace) -> dict[str, object]:
    names = ("cipher", "mtu", "mptcp", "offload", "wire")
    return {name: getattr(options, name) for name in names}


def _show_client_command(psk: bytes, tox: str | None) -> None:
    """Print the other end's command line, but only where a person sees it and no log keeps it."""
    if not sys.stdout.isatty():
        return
    where = tox or f"{_our_address()}:20203"
    print(f"\non the client:\n\n    sudo ./ttun.py client -k {psk.decode()} -s {where}\n")


def _our_address() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: only asks which address would be used
            return str(probe.getsockname()[0])
        except OSError:
            return "THIS-HOST"


def _run(endpoint: Endpoint) -> int:
    """Run an endpoint until SIGINT, SIGTERM or its own end."""
    privileges.forbid_dumps()
    # The handler does nothing: the interpreter writes the signal's number to the pipe, which is
    # safe at any moment, and the main thread sleeps in read().
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    signal.set_wakeup_fd(writable)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    endpoint.start()
    endpoint.when_over(lambda: os.write(writable, b"\0"))
    received = os.read(readable, 1)[0]
    if received:
        log.info("%s: stopping", signal.Signals(received).name)
    endpoint.stop()
    endpoint.wait()
    return 0
