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
import sys
import threading
from collections.abc import Sequence

from ttun.commands import key
from ttun.commands.parser import build_parser, join_values
from ttun.errors import TtunError, UsageError, printable
from ttun.process import log_writer, program_name, standard_streams
from ttun.process.argv import Parser, find_secrets
from ttun.process.signals import end_while_starting

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
        if error.name == "ttun._codec":
            return _fail("the codec is not built here: run make in the source directory")
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
    except ModuleNotFoundError as error:
        if error.name != "ttun.lab":
            raise
        where = f"run ./ttun.py {options.command} in the source directory, after make"
        raise TtunError(f"a wheel has no {options.command}: {where}") from None


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
    from ttun import tcp
    from ttun.commands import doctor

    peer = options.peer
    return doctor.run(None if peer is None else tcp.parse_address(peer, listening=False))


def run_demo(options: argparse.Namespace) -> int:
    """``ttun demo``."""
    from ttun.lab import demo

    if not 1 <= options.size <= MOST_MIB:
        raise UsageError(f"--size {options.size}: from 1 to {MOST_MIB} MiB")
    return demo.run(options.size)


def run_bench_codec(_: argparse.Namespace) -> int:
    """``ttun bench codec``."""
    from ttun.lab import bench

    return bench.codec()


def run_bench_tunnel(options: argparse.Namespace) -> int:
    """``ttun bench tunnel``."""
    from ttun.lab import bench

    _check_amount(options)
    return bench.tunnel(
        options.rounds, options.seconds, options.against, options.json, options.plot
    )


def run_bench_link(options: argparse.Namespace) -> int:
    """``ttun bench link``."""
    from ttun.lab import bench_link

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
    from ttun.commands import show

    return show.run(options.device, options.how)


def run_tox(options: argparse.Namespace) -> int:
    """``ttun tox``."""
    from ttun.tox import command
    from ttun.tox import options as tox_options

    parser = Parser(
        prog="ttun tox",
        description="Forward ports through Tox to a machine behind NAT; the options are tuntox's.",
        epilog=tox_options.EPILOG,
    )
    return command.run(parser, options.arguments)


def run_server(options: argparse.Namespace) -> int:
    """``ttun server``."""
    from ttun.commands import run

    return run.server(options)


def run_client(options: argparse.Namespace) -> int:
    """``ttun client``."""
    from ttun.commands import run

    return run.client(options)


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
