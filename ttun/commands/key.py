"""The pre-shared key: where it is read from, and how a server makes one.

In this order: ``-k``, ``--psk-file``, ``TTUN_PSK`` in the environment, ``/etc/ttun/psk``. A key is
any sequence of bytes. A newline at the end of a file is not part of it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from ttun.errors import TtunError, UsageError
from ttun.process import files
from ttun.settings import MAX_KEYS

log = logging.getLogger("ttun")

DEFAULT_FILE = Path("/etc/ttun/psk")
VARIABLE = "TTUN_PSK"
# All variables that may have a secret.
SECRETS = (b"TTUN_PSK", b"TUNTOX_SHARED_SECRET", b"TTUN_PROXY", b"ALL_PROXY", b"all_proxy")
MAX_SIZE = 65536  # bytes of a key file; a larger file is not one
SHORT = 16  # bytes; a shorter key gets a warning


def generate() -> str:
    """Return a random 256-bit key as 64 hexadecimal digits, which need no quotes in a shell."""
    import secrets  # loads OpenSSL, which the keeper does not need

    return secrets.token_hex(32)


def find_all(given: str | None, files: Sequence[str]) -> list[bytes]:
    """Return the keys of a server: those of several files, else the one of find(), if any."""
    if given is not None or len(files) < 2:
        found = find(given, files[0] if files else None)
        return [] if found is None else [found]
    if len(files) > MAX_KEYS:
        raise UsageError(f"--psk-file: {len(files)} files are too many (at most {MAX_KEYS})")
    return [read_file(file) for file in files]


def find(given: str | None, file: str | None) -> bytes | None:
    """Return the key from the first source that has one; None if there is none.

    given, file: the values of -k and --psk-file. Raises UsageError for an empty key, TtunError
    for a file that cannot be used.
    """
    if given is not None:
        return _not_empty(os.fsencode(given or ""), "-k")  # argparse makes [] of -k=--
    if file is not None:
        return read_file(file)
    if VARIABLE in os.environ:
        return _not_empty(os.environb[VARIABLE.encode()], VARIABLE)
    try:
        if not DEFAULT_FILE.exists():
            return None
    except PermissionError:
        return None  # only root may look into the directory: other users have no key there
    return read_file(DEFAULT_FILE)


def read_file(name: str | Path) -> bytes:
    """Return the key in a pipe, or in a file that no other user can read or change."""
    if not str(name):  # an empty variable in a script
        raise UsageError("--psk-file: the file name is empty")
    path = Path(name)
    if not os.path.lexists(path) and not _is_name_of_file(path):
        # It may be a key in the place of a file name, so it is not shown.
        raise TtunError("key file not found (--psk-file takes a file name, -k the key itself)")
    key = files.read_secret(path, MAX_SIZE, "key file")
    return _not_empty(key[:-1] if key.endswith(b"\n") else key, str(path))


def _is_name_of_file(path: Path) -> bool:
    return path.name != str(path) and os.path.isdir(path.parent)


def create(path: Path = DEFAULT_FILE) -> bytes:
    """Write a new key to a file (mode 0600) and return it; or return the key in the file."""
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        files.write_secret(path, generate().encode() + b"\n")
    except OSError as error:
        raise TtunError(
            f"cannot write a key to {path}: {error.strerror} (give a key with -k or --psk-file)"
        ) from None
    return read_file(path)


def warn_if_short(key: bytes) -> None:
    """Log a warning for a weak key, which an attacker who records a handshake can guess offline."""
    if len(key) < SHORT:
        log.warning(
            "weak key: %d bytes are vulnerable to offline guessing (use ttun genkey)",
            len(key),
        )


def hide(arguments: Sequence[str], places: Iterable[tuple[int, int]]) -> None:
    """Overwrite parts of this program's command line, as ps shows it, with asterisks.

    arguments: all after the program's name. places: the index of an argument and the first
    character to hide; the rest of the argument is hidden too. The key was visible until then: a
    file is safer.
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


def hide_environment() -> None:
    """Overwrite secrets in the environment, as /proc shows it; os.environ keeps them."""
    from ttun._codec import lib

    for name in SECRETS:
        if value := os.environb.get(name):
            old, new = (b"%b=%b\0" % (name, each) for each in (value, b"*" * len(value)))
            lib.ttun_replace_arguments(old, new, len(old))


def _not_empty(key: bytes, source: str) -> bytes:
    if not key:
        raise UsageError(f"the key in {source} is empty (ttun genkey makes one)")
    return key
