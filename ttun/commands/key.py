"""The pre-shared key: where it comes from, and how a server makes one.

In this order: ``-k``, ``--psk-file``, ``TTUN_PSK`` in the environment, ``/etc/ttun/psk``.
A key is bytes, taken as given; a file may end in a newline, which is not part of it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from ttun.errors import TtunError, UsageError
from ttun.process import files

log = logging.getLogger("ttun")

DEFAULT_FILE = Path("/etc/ttun/psk")
VARIABLE = "TTUN_PSK"
MAX_SIZE = 65536  # bytes of a key file; a larger one is some other file
SHORT = 16  # bytes; below that it is worth a warning


def generate() -> str:
    """Return a fresh 256-bit key as 64 hexadecimal digits, which every shell takes unquoted."""
    import secrets  # which loads OpenSSL: the keeper has no use for that

    return secrets.token_hex(32)


def find(given: str | None, file: str | None) -> bytes | None:
    """Return the key that the user gave or keeps in a usual place; None if there is none.

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
        return None  # the directory is root's: for other users there is no key in it
    return read_file(DEFAULT_FILE)


def read_file(path: Path) -> bytes:
    """Return the key in a pipe, or in a file that nobody else can read or change."""
    if not os.path.lexists(path) and not _is_name_of_file(path):
        # It may be a key where a file's name should be, so it is not shown.
        raise TtunError(
            "key file not found: --psk-file takes the name of a file, -k the key itself"
        )
    key = files.read_secret(path, MAX_SIZE, "key file")
    return _not_empty(key[:-1] if key.endswith(b"\n") else key, str(path))


def _is_name_of_file(path: Path) -> bool:
    return path.name != str(path) and os.path.isdir(path.parent)


def create(path: Path = DEFAULT_FILE) -> bytes:
    """Make a key, keep it in a file (mode 0600) and return it; return the one that exists."""
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        files.write_secret(path, generate().encode() + b"\n", replace=False)
    except OSError as error:
        raise TtunError(
            f"cannot keep a key in {path}: {error.strerror}; name one with -k or --psk-file"
        ) from None
    return read_file(path)


def warn_if_short(key: bytes) -> None:
    """Log a warning for a weak key, which an attacker who records a handshake can guess."""
    if len(key) < SHORT:
        log.warning(
            "the key has %d bytes, so whoever records this link can try out all such keys: "
            "ttun genkey makes a safe one",
            len(key),
        )


def hide(arguments: Sequence[str], places: Iterable[tuple[int, int]]) -> None:
    """Overwrite parts of this program's command line, as ps shows it, with asterisks.

    arguments: all that stand behind the program's name. places: the index of an argument and its
    first character to be hidden; the rest of that argument is. What was read there before stays
    known: a file is the better place for a key.
    """
    before = [os.fsencode(argument) for argument in arguments]
    after = before[:]
    for index, first in places:
        shown = len(os.fsencode(arguments[index][:first]))
        after[index] = after[index][:shown].ljust(len(after[index]), b"*")
    if after == before:
        return
    from ttun._codec import lib

    old, new = (b"".join(each + b"\0" for each in both) for both in (before, after))
    lib.ttun_replace_arguments(old, new, len(old))


def _not_empty(key: bytes, source: str) -> bytes:
    if not key:
        raise UsageError(f"the key in {source} is empty: ttun genkey makes one")
    return key
