"""What the commands do; parser.py is the grammar of the command line.

Errors are one line on stderr: exit code 2 for bad usage, 1 for what cannot work here.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ttun import key, log_writer, privileges, program_name, standard_streams
from ttun.arguments import Parser, find_secrets
from ttun.errors import TtunError, UsageError, printable
from ttun.parser import build_parser, join_values
from ttun.signals import ENDING, Signals, end_while_starting

if TYPE_CHECKING:
    from ttun.endpoint import Endpoint
    from ttun.notify import Manager
    from ttun.status import StatusSocket
    from ttun.tox.transport import Listener

log = logging.getLogger("ttun")

MOST_MIB = 1 << 20  # of a transfer of the demo
# What write(2) says of a stream that takes no more.
OUTPUT_ERRORS = (errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EBADF, errno.EDQUOT, errno.EFBIG)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, by default this program's own, and return its exit code."""
    try:
        standard_streams.open_missing()
    except OSError as error:
        return _fail(_describe(error))
    log_writer.install()
    try:
        return _main(arguments)
    except KeyboardInterrupt:
        return 130
    finally:
        standard_streams.forget_unwritten()
        log_writer.finish()


def _main(arguments: Sequence[str] | None) -> int:
    try:
        try:
            code = _run_command(arguments)
        except SystemExit as end:  # of argparse, after help or an error
            code = end.code if isinstance(end.code, int) else 0
        sys.stdout.flush()
        return code
    except UsageError as error:
        return _fail(str(error), 2)
    except TtunError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(_describe(error))
    except ImportError as error:
        return _fail(f"cannot load what it needs: {error} (ttun doctor says what is missing)")
    except MemoryError:
        return _fail("not enough memory")
    except Exception as error:
        if "new thread" in str(error):  # RuntimeError, of threading
            return _fail(f"{error}: too many run for this user (ulimit -u), or too little memory")
        # A bug: one line, without what is in memory.
        return _fail(f"internal error: {type(error).__name__}: {error}")


def _run_command(arguments: Sequence[str] | None) -> int:
    given = program_name.arguments() if arguments is None else arguments
    parser = build_parser()
    if arguments is None:
        _hide_secrets(given, parser)
    if given[:1] == ["tox"]:
        options = argparse.Namespace(command="tox", run="tox", arguments=given[1:])
    else:
        options = parser.parse_args(join_values(given, parser))
    if not sys.platform.startswith("linux"):
        raise TtunError("ttun runs on Linux only so far: it needs a Linux TUN device")
    end_while_starting(options.run)
    threading.excepthook = _log_failed_thread
    try:
        return int(COMMANDS[options.run](options))
    except UsageError as error:
        raise UsageError(f"{error}; see ttun {options.command} -h") from None


def _hide_secrets(arguments: Sequence[str], parser: Parser) -> None:
    """Overwrite what may be a key where others see this command line, before anything can fail."""
    added = len(arguments) - len(sys.argv[1:])  # by the name that this program was called by
    with contextlib.suppress(ImportError):  # of what is not installed; that is said later
        if arguments[:1] == ["tox"]:
            from ttun.tox import options

            places = options.find_secrets(arguments)
        else:
            places = find_secrets(arguments, parser)
        key.hide(sys.argv[1:], ((index - added, first) for index, first in places))


def _log_failed_thread(failed: threading.ExceptHookArgs) -> None:
    """Log what ended a thread that should not have ended, in one line."""
    name = failed.thread.name if failed.thread else "thread"
    text = f"{failed.exc_type.__name__}: {failed.exc_value}"
    log.error("internal error: %s: %s", name, printable(text))


def _describe(error: OSError) -> str:
    """Return what went wrong. What a command opens it mostly answers for itself."""
    why = error.strerror or str(error)
    if error.filename:
        return f"{os.fsdecode(error.filename)}: {why}"
    if error.errno in OUTPUT_ERRORS:
        return f"cannot write the output: {why}"
    return f"{why}: raise its limit (ulimit -n)" if error.errno == errno.EMFILE else why


def _fail(message: str, code: int = 1) -> int:
    with contextlib.suppress(OSError):
        print(f"ttun: {printable(message)}", file=sys.stderr)
    return code


def run_genkey(_: argparse.Namespace) -> int:
    """``ttun genkey``."""
    print(key.generate())
    return 0


def run_doctor(options: argparse.Namespace) -> int:
    """``ttun doctor``."""
    from ttun import doctor, link

    peer = options.peer
    return doctor.run(None if peer is None else link.parse_address(peer, listening=False))


def run_demo(options: argparse.Namespace) -> int:
    """``ttun demo``."""
    from ttun import demo

    if not 1 <= options.size <= MOST_MIB:
        raise UsageError(f"--size {options.size}: from 1 to {MOST_MIB} MiB")
    return demo.run(options.size)


def run_bench_codec(_: argparse.Namespace) -> int:
    """``ttun bench codec``."""
    from ttun import bench

    return bench.codec()


def run_bench_tunnel(options: argparse.Namespace) -> int:
    """``ttun bench tunnel``."""
    from ttun import bench

    _check_amount(options)
    return bench.tunnel(
        options.rounds, options.seconds, options.against, options.json, options.plot
    )


def run_bench_link(options: argparse.Namespace) -> int:
    """``ttun bench link``."""
    from ttun import bench_link

    _check_amount(options)
    plan = bench_link.Plan(
        bench_link.parse_link(options.rate, options.rtt, options.queue),
        bench_link.parse_losses(options.loss),
        options.rounds,
        options.seconds,
        options.congestion_control,
        options.emulator,
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the hosts are removed then too
    return bench_link.run(plan, options.against, options.json, options.plot)


def _check_amount(options: argparse.Namespace) -> None:
    if options.rounds < 1 or not 0 < options.seconds < 3600:
        raise UsageError("at least one round and less than an hour")


def run_show(options: argparse.Namespace) -> int:
    """``ttun show``."""
    from ttun import show

    return show.run(options.device, options.how)


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
        _show_client_command(psk, tox.address if tox else _our_address(options.listen))
    server = Server(
        psk,
        listen=options.listen,
        takeover=options.takeover,
        tox=tox,
        **_endpoint_options(options),
    )
    return _run(server, psk, options)


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
    return _run(client, psk, options)


def _endpoint_options(options: argparse.Namespace) -> dict[str, object]:
    from ttun import routes
    from ttun.device import CLIENT, SERVER, Addresses, check_routes

    networks = [routes.parse(text) for text in options.route]
    check_routes(networks, options.mtu)
    names = ("cipher", "mtu", "mptcp", "offload", "wire", "buffers", "congestion_control")
    usual = SERVER if options.command == "server" else CLIENT
    given = (options.local4, options.local6, options.peer4, options.peer6)
    return {
        **{name: getattr(options, name) for name in names},
        "device": options.dev,
        "addresses": Addresses.parse(usual, *given),
        "routes": networks,
    }


def _show_client_command(psk: bytes, where: str) -> None:
    """Print the other end's command line, but only where a person sees it and no log keeps it."""
    if not sys.stdout.isatty():
        return
    program = "./ttun.py" if Path(sys.argv[0]).name == "ttun.py" else "ttun"  # as started here
    print(f"\non the client:\n\n    sudo {program} client -k {psk.decode()} -s {where}\n")


def _our_address(listen: str) -> str:
    """Return where a client reaches us, as far as that is to be known here."""
    from ttun import link

    address = link.parse_address(listen, listening=True)
    if address.host not in ("", "0.0.0.0", "::"):
        return str(address)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: only asks which address would be used
            host = str(probe.getsockname()[0])
        except OSError:
            host = "THIS-HOST"
    return str(address._replace(host=host))


def _run(endpoint: Endpoint, psk: bytes, options: argparse.Namespace) -> int:
    """Run an endpoint until SIGTERM, SIGINT, SIGHUP or its own end."""
    from ttun import notify, show, status
    from ttun.hooks import Hooks

    privileges.forbid_dumps()
    manager = notify.Manager()
    user = privileges.find_user(options.user)
    hooks = Hooks(options.up, options.down)
    endpoint.on_connected = lambda _: hooks.up(endpoint.facts())
    endpoint.on_disconnected = lambda _, why: hooks.down({**endpoint.facts(), "reason": why})
    key.warn_if_short(psk)
    endpoint.open()
    signals = Signals(*ENDING, signal.SIGUSR1)  # from here on something is left to tidy up
    socket_of_status = status.StatusSocket(str(endpoint.status().device), user)
    privileges.drop(user, required=options.user is not None)  # before there are threads
    log_writer.start()
    hooks.start()
    endpoint.start()
    socket_of_status.serve(endpoint.status)
    endpoint.when_over(signals.wake)
    manager.tell(manager.READY)
    while (received := _wait(signals, endpoint, manager, socket_of_status)) == signal.SIGUSR1:
        lines = show.describe(status.as_dict(endpoint.status()))
        log.info("status: %s", "; ".join(line.strip() for line in lines))
    manager.tell(manager.STOPPING)
    socket_of_status.close()
    if received:
        log.info("%s: stopping", signal.Signals(received).name)
    endpoint.stop()
    hooks.close()
    endpoint.wait()
    return 0


def _wait(signals: Signals, endpoint: Endpoint, manager: Manager, answering: StatusSocket) -> int:
    """Return the number of a signal, or 0 when the endpoint is over; until then, signs of life."""
    while (received := signals.wait(answering.patience(manager.interval))) is None:
        answering.serve(endpoint.status)  # if there was no thread for it yet
        if endpoint.is_alive():
            manager.tell(manager.ALIVE)
    return received


COMMANDS = {
    "genkey": run_genkey,
    "doctor": run_doctor,
    "demo": run_demo,
    "bench_codec": run_bench_codec,
    "bench_tunnel": run_bench_tunnel,
    "bench_link": run_bench_link,
    "show": run_show,
    "tox": run_tox,
    "server": run_server,
    "client": run_client,
}
