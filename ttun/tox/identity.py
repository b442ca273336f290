"""Who we are on the Tox network: the ID, the file with its secret key, names for other people's.

A Tox ID is 76 hexadecimal digits: the public key (32 bytes), a number that keeps strangers' friend
requests away (4), and a checksum (2): all pairs of bytes before it, combined with xor.
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
SCHEME = "tox:"  # in front of a Tox ID, where it could be something else
MAX_SIZE = 16 << 20  # bytes of a file of ours
MAX_SECRET = 920  # bytes; a friend request's message holds it and a NUL


class Contact(NamedTuple):
    """Somebody's address (38 bytes) and the secret to show there, if one is known."""

    address: bytes
    secret: bytes | None


def bare(text: str) -> str:
    """Return a Tox ID, or a name, without what it was copied with: blanks, and tox: before it."""
    text = text.strip()
    return text[len(SCHEME) :] if text.lower().startswith(SCHEME) else text


def parse_id(text: str) -> bytes:
    """Return the address that a Tox ID shows. Raises UsageError."""
    try:
        address = bytes.fromhex(bare(text))
    except ValueError:
        address = b""
    if len(address) != ADDRESS_SIZE:
        # Not shown: it may be a secret.
        raise UsageError(f"that is no Tox ID: one has {2 * ADDRESS_SIZE} hexadecimal digits")
    if checksum(address[:-2]) != address[-2:]:
        raise UsageError("that is no Tox ID: its checksum is wrong")
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
    """Return how the log names the owner of a key: the first digits of the Tox ID."""
    return key.hex()[:8].upper()


def hosts_files() -> tuple[Path, Path]:
    """Return where names are kept, ``NAME TOXID [SECRET]`` lines: ours, and that of Tuntox."""
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return Path(home, "ttun", "hosts"), Path(os.path.expanduser("~/.tuntox/hosts"))


def find_contact(text: str) -> Contact:
    """Return who is meant by a Tox ID, or by a name in the files of names. Raises TtunError."""
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
        raise UsageError(f"that is no Tox ID and no name in {' or '.join(files_read)}")
    raise UsageError(f"that is no Tox ID, and there is no {hosts_files()[0]} with names")


def _find_name(path: Path, wanted: str) -> Contact | None:
    """Return who a name in a file belongs to. Raises TtunError, OSError, UnicodeError."""
    found: list[os.stat_result] = []
    lines = files.read(path, MAX_SIZE, found.append).decode().splitlines()
    is_ours = path == hosts_files()[0]
    for number, line in enumerate(lines, 1):
        # In that of Tuntox, which its script tokssh reads, a # within a line is no comment.
        text = line.split("#", 1)[0] if is_ours or line.startswith("#") else line
        name, *rest = text.split(None, 2) or [""]
        if name != wanted:
            continue
        if not rest:
            raise TtunError(f"{path}, line {number}: a Tox ID is missing after the name")
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
    """Return a secret that fits a friend request. Raises UsageError."""
    if not secret:
        raise UsageError("the shared secret is empty")
    if len(secret) > MAX_SECRET or b"\0" in secret:
        raise UsageError(f"the shared secret is longer than {MAX_SECRET} bytes")
    return secret


def load(directory: Path) -> bytes | None:
    """Return the identity saved in a directory, None if there is none. Raises TtunError."""
    path = directory / SAVE
    try:
        return files.read(path, MAX_SIZE, functools.partial(_check, path))
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise TtunError(f"cannot read {path}: it is a link to a file that is missing") from None
        return None
    except OSError as error:
        raise TtunError(f"cannot read {path}: {error.strerror}") from None


def _check(path: Path, found: os.stat_result) -> None:
    """Raise TtunError for what cannot be our identity."""
    if not stat.S_ISREG(found.st_mode):
        raise TtunError(f"cannot read {path}: it is not a file")
    files.check_owner(path, found, "identity")


def save(directory: Path, data: bytes) -> None:
    """Save an identity. Raises OSError; the one saved before is then left as it was."""
    files.write_secret(directory / SAVE, data, replace=True)
