"""Run a command of the command line, whose grammar is in parser.py.

An error is one line on stderr; the exit code is 2 for bad usage and 1 for any other failure.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import os
import sys
import threading
from collections.abc import Sequence

from ttun.commands import key, parser
from ttun.commands.parser import join_values
from ttun.errors import TtunError, UsageError, printable
from ttun.process import log_writer, program_name, standard_streams, syslog
from ttun.process.argv import Parser, find_secrets
from ttun.process.signals import end_while_starting

try:
    from ttun.lab import command as lab
except ModuleNotFoundError:  # not part of a wheel
    lab = None  # type: ignore[assignment]

log = logging.getLogger("ttun")

# What write(2) fails with when a stream accepts no more data.
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
            return _fail("the codec is not built (run make in the source directory)")
        return _fail(f"cannot load a package: {error} (see ttun doctor)")
    except MemoryError:
        return _fail("not enough memory")
    except Exception as error:
        if "new thread" in str(error):  # RuntimeError, of threading
            return _fail(f"{error}: out of memory, or limit reached (ulimit -u)")
        # A bug: one line, without what is in memory.
        return _fail(f"internal error: {type(error).__name__}: {error}")


def build_parser() -> Parser:
    """Return the parser of the command line."""
    return parser.build_parser(lab.add_options if lab else None)


def _run_command(arguments: Sequence[str] | None) -> int:
    given = program_name.arguments() if arguments is None else arguments
    parser = build_parser()
    if arguments is None:
        _hide_secrets(given, parser)
    if lab is None and given[:1] in (["demo"], ["bench"]):
        where = f"run make and ./ttun.py {given[0]} in the source directory"
        raise TtunError(f"{given[0]} is not part of the wheel ({where})")
    if given[:1] == ["tox"]:
        options = argparse.Namespace(command="tox", run="tox", arguments=given[1:])
    else:
        options = parser.parse_args(join_values(given, parser))
    if not sys.platform.startswith("linux"):
        raise TtunError("ttun runs on Linux only: it needs a Linux TUN device")
    end_while_starting(options.run)
    threading.excepthook = _log_failed_thread
    log.setLevel(getattr(options, "log_level", None) or logging.INFO)
    syslog.log_to_syslog_if_wanted()
    try:
        return int(COMMANDS[options.run](options))
    except UsageError as error:
        raise UsageError(f"{error}; see ttun {options.command} -h") from None


def _hide_secrets(arguments: Sequence[str], parser: Parser) -> None:
    """Overwrite what may be a key in the process list, before anything can fail."""
    added = len(arguments) - len(sys.argv[1:])  # for the name that this program was started under
    with contextlib.suppress(ImportError):  # a package is not installed; reported later
        if arguments[:1] == ["tox"]:
            from ttun.tox import options

            places = options.find_secrets(arguments)
        else:
            places = find_secrets(arguments, parser)
        key.hide(sys.argv[1:], ((index - added, first) for index, first in places))
        if arguments[:1] in (["server"], ["client"], ["tox"]):  # others start ttun again
            key.hide_environment()


def _log_failed_thread(failed: threading.ExceptHookArgs) -> None:
    """Log an exception that ended a thread, in one line."""
    name = failed.thread.name if failed.thread else "thread"
    text = f"{failed.exc_type.__name__}: {failed.exc_value}"
    log.error("internal error: %s: %s", name, printable(text))


def _describe(error: OSError) -> str:
    """Return what went wrong. Commands report most errors of files that they open themselves."""
    why = error.strerror or str(error)
    if error.filename:
        return f"{os.fsdecode(error.filename)}: {why}"
    if error.errno in OUTPUT_ERRORS:
        return f"cannot write the output: {why}"
    return f"{why} (raise the limit: ulimit -n)" if error.errno == errno.EMFILE else why


def _fail(message: str, code: int = 1) -> int:
    standard_streams.tell(f"ttun: {printable(message)}")
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
        description="Forward ports through Tox to a machine behind NAT, with options as in Tuntox.",
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
    **(lab.COMMANDS if lab else {}),
    "show": run_show,
    "tox": run_tox,
    "server": run_server,
    "client": run_client,
}
