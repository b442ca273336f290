"""The pre-shared key: where it comes from, and how a server makes one.

In this order: ``-k``, ``--psk-file``, ``TTUN_PSK`` in the environment, ``/etc/ttun/psk``.
A key is bytes, taken as given; a file may end in a newline, which is not part of it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import stat
from pathlib import Path

from ttun.errors import TtunError, UsageError

log = logging.getLogger("ttun")

DEFAULT_FILE = Path("/etc/ttun/psk")
VARIABLE = "TTUN_PSK"
CREDENTIALS = "CREDENTIALS_DIRECTORY"
MAX_SIZE = 65536  # bytes of a key file; a larger one is some other file
SHORT = 16  # bytes; below that it is worth a warning


def generate() -> str:
    """Return a fresh 256-bit key as 64 hexadecimal digits, which every shell takes unquoted."""
    return secrets.token_hex(32)


def find(given: str | None, file: str | None) -> bytes | None:
    """Return the key that the user named or left in a place of ours; None if there is none.

    given, file: the values of -k and --psk-file. Raises UsageError for an empty key, TtunError
    for a file that cannot be used.
    """
    if given is not None:
        return _not_empty(os.fsencode(given or ""), "-k")  # argparse makes [] of -k=--
    if file is not None:
        return read_file(Path(file))
    if VARIABLE in os.environ:
        return _not_empty(os.environb[VARIABLE.encode()], VARIABLE)
    try:
        if not DEFAULT_FILE.exists():
            return None
    except PermissionError:
        return None  # the directory is root's: for everybody else there is no key in it
    return read_file(DEFAULT_FILE)


def read_file(path: Path) -> bytes:
    """Return the key in a file that nobody but its owner can read."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if mode & (stat.S_IRWXG | stat.S_IRWXO) and not _is_credential(path, mode):
                raise TtunError(f"others can read the key file {path}: chmod 600 {path}")
            key = file.read(MAX_SIZE + 1)
    except PermissionError:
        raise TtunError(f"this user may not read the key file {path}: use sudo") from None
    except OSError as error:
        raise TtunError(f"cannot read the key file {path}: {error.strerror}") from None
    if len(key) > MAX_SIZE:
        raise TtunError(f"{path} is no key file: it has more than {MAX_SIZE} bytes")
    return _not_empty(key[:-1] if key.endswith(b"\n") else key, str(path))


def _is_credential(path: Path, mode: int) -> bool:
    """Return whether systemd keeps a file for this service alone (systemd.exec(5), Credentials).

    It may give the service its right by an access control list, whose mask stat shows as the right
    of a group; nobody but root and the service can enter the directory.
    """
    directory = os.environ.get(CREDENTIALS)
    return directory is not None and path.parent == Path(directory) and not mode & ~0o440 & 0o777


def create(path: Path = DEFAULT_FILE) -> bytes:
    """Make a key, keep it in path (mode 0600) and return it; if there is one by now, return that.

    The file appears whole or not at all: it is written beside its place and linked there.
    """
    key = generate()
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        fresh.unlink(missing_ok=True)
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            with open(descriptor, "wb") as file:
                file.write(key.encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileExistsError):
                os.link(fresh, path)
        finally:
            fresh.unlink()
    except OSError as error:
        raise TtunError(
            f"cannot keep a key in {path}: {error.strerror}; name one with -k or --psk-file"
        ) from None
    return read_file(path)


def warn_if_short(key: bytes) -> None:
    """Say so when a key can be guessed by somebody who recorded a handshake."""
    if len(key) < SHORT:
        log.warning(
            "the key has %d bytes, so whoever records this link can try out all such keys: "
            "ttun genkey makes a safe one",
            len(key),
        )


def hide(key: bytes) -> None:
    """Overwrite a key that stands on this program's command line, as ps shows it.

    The kernel reads /proc/PID/cmdline from the program's own memory, and proc_pid_stat(5) says
    where that is. What was read there before stays known: a file is the better place for a key.
    """
    from ttun._codec import ffi

    # After the name in parentheses comes the third field; arg_start and arg_end are 48 and 49.
    fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
    if len(fields) <= 49 - 3:
        return  # qemu-user has a short file
    start, end = int(fields[48 - 3]), int(fields[49 - 3])
    if not 0 < start < end:
        return  # this kernel does not tell
    line = ffi.buffer(ffi.cast("char *", start), end - start)
    position = 0
    for argument in line[:].split(b"\0"):
        position += len(argument)
        if argument == key or argument.endswith(b"=" + key):
            line[position - len(key) : position] = b"*" * len(key)
        position += 1


def _not_empty(key: bytes, source: str) -> bytes:
    if not key:
        raise UsageError(f"the key in {source} is empty: ttun genkey makes one")
    return key
