"""Tox IDs, the file with our own identity (its secret key), and names for other IDs.

A Tox ID is 76 hexadecimal digits: the public key (32 bytes), the nospam value, without which a
friend request is ignored (4), and a checksum (2), the XOR of all preceding pairs of bytes.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import os
import stat
from pathlib import Path
from typing import NamedTuple

from ttun.errors import TtunError, UsageError
from ttun.process import files
from ttun.tox.toxcore import ADDRESS_SIZE, PUBLIC_KEY_SIZE

SAVE = "tox_save"
SCHEME = "tox:"  # prefix of a Tox ID, where a host name is possible too
MAX_SIZE = 16 << 20  # bytes in one of our files
MAX_SECRET = 920  # bytes; a friend request holds the secret and a NUL


class Contact(NamedTuple):
    """A peer's address (38 bytes) and the shared secret to send, if known."""

    address: bytes
    secret: bytes | None


def bare(text: str) -> str:
    """Strip white space and a tox: prefix from a Tox ID or a name."""
    text = text.strip()
    return text[len(SCHEME) :] if text.lower().startswith(SCHEME) else text


def parse_id(text: str) -> bytes:
    """Return the address that a Tox ID stands for. Raises UsageError."""
    try:
        address = bytes.fromhex(bare(text))
    except ValueError:
        address = b""
    if len(address) != ADDRESS_SIZE:
        # The text is not shown: it may be a secret.
        raise UsageError(f"not a Tox ID: expected {2 * ADDRESS_SIZE} hexadecimal digits")
    if checksum(address[:-2]) != address[-2:]:
        raise UsageError("not a Tox ID: wrong checksum")
    return address


def parse_key(text: str) -> bytes:
    """Return the public key in a Tox ID, or a bare public key. Raises UsageError."""
    if len(bare(text)) == 2 * PUBLIC_KEY_SIZE:
        with contextlib.suppress(ValueError):
            return bytes.fromhex(bare(text))
    return parse_id(text)[:PUBLIC_KEY_SIZE]


def checksum(data: bytes) -> bytes:
    """Return the checksum of a Tox ID's other bytes."""
    return bytes(functools.reduce(operator.xor, data[half::2], 0) for half in (0, 1))


def short_name(key: bytes) -> str:
    """Return the name of a key's owner in the log: the first digits of the Tox ID."""
    return key.hex()[:8].upper()


def hosts_files() -> tuple[Path, Path]:
    """Return the files of ``NAME TOXID [SECRET]`` lines: ttun's own and that of Tuntox."""
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return Path(home, "ttun", "hosts"), Path(os.path.expanduser("~/.tuntox/hosts"))


def find_contact(text: str) -> Contact:
    """Return the contact for a Tox ID, or for a name in the hosts files. Raises TtunError."""
    name = bare(text)
    if len(name) == 2 * ADDRESS_SIZE:
        return Contact(parse_id(name), None)
    files_read = []
    for path in hosts_files():
        try:
            contact = _find_name(path, name)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise TtunError(f"cannot read {path}: {error.strerror}") from None
        except UnicodeError:
            raise TtunError(f"cannot read {path}: it is not UTF-8") from None
        if contact is not None:
            return contact
        files_read.append(str(path))
    if files_read:
        raise UsageError(f"the server is neither a Tox ID nor a name in {' or '.join(files_read)}")
    raise UsageError(f"the server is not a Tox ID, and {hosts_files()[0]} does not exist")


def _find_name(path: Path, wanted: str) -> Contact | None:
    """Return the contact for a name in a file. Raises TtunError, OSError, UnicodeError."""
    found: list[os.stat_result] = []
    lines = files.read(path, MAX_SIZE, found.append).decode().splitlines()
    is_ours = path == hosts_files()[0]
    for number, line in enumerate(lines, 1):
        # In the file of Tuntox's script tokssh, a # starts a comment only in the first column.
        text = line.split("#", 1)[0] if is_ours or line.startswith("#") else line
        name, *rest = text.split(None, 2) or [""]
        if name != wanted:
            continue
        if not rest:
            raise TtunError(f"{path}, line {number}: no Tox ID after the name")
        try:
            address = parse_id(rest[0])
        except UsageError as error:
            raise TtunError(f"{path}, line {number}: {error}") from None
        if len(rest) == 1:
            return Contact(address, None)
        files.check_secret(path, found[0], "file of names and secrets")
        return Contact(address, check_secret(rest[1].strip().encode()))
    return None


def check_secret(secret: bytes) -> bytes:
    """Return a secret if it fits in a friend request. Raises UsageError."""
    if not secret:
        raise UsageError("the shared secret is empty")
    if len(secret) > MAX_SECRET or b"\0" in secret:
        raise UsageError(f"the shared secret is longer than {MAX_SECRET} bytes")
    return secret


def load(directory: Path) -> bytes | None:
    """Return the identity saved in a directory, or None. Raises TtunError."""
    path = directory / SAVE
    try:
        return files.read(path, MAX_SIZE, functools.partial(_check, path))
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise TtunError(f"cannot read {path}: symbolic link to a missing file") from None
        return None
    except OSError as error:
        raise TtunError(f"cannot read {path}: {error.strerror}") from None


def _check(path: Path, found: os.stat_result) -> None:
    """Raise TtunError for a file that cannot be our identity."""
    if not stat.S_ISREG(found.st_mode):
        raise TtunError(f"cannot read {path}: not a regular file")
    files.check_owner(path, found, "identity")


def save(directory: Path, data: bytes) -> None:
    """Save an identity where there is none. Raises OSError; TtunError if there is one."""
    path = directory / SAVE
    files.write_secret(path, data)
    if load(directory) != data:
        raise TtunError(f"another program has just created {path} (start again to use it)")
