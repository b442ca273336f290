"""Files that the user names, read with limits of size and time; secrets, read and written.

A name may lead to a pipe, as in ``--psk-file <(pass show ttun)``, to a FIFO without a writer, or to
/dev/zero. Reading from anything but a regular file ends after WAIT seconds. A secret is read only
if no other user can read or replace it.

Sources: fifo(7), poll(2), pipe(7), open(2), fsync(2).
"""

from __future__ import annotations

import errno
import logging
import os
import select
import stat
import time
from pathlib import Path
from typing import Callable

from ttun.errors import TtunError
from ttun.users import user_name

log = logging.getLogger("ttun")

WAIT = 60.0  # seconds for a pipe to end: time enough to type a passphrase
WAIT_SILENTLY = 2.0  # seconds until it is logged
CHUNK = 65536
SUDO_VARIABLE = "SUDO_UID"  # sudo(8): the user who called it
CREDENTIALS = "CREDENTIALS_DIRECTORY"


def read(path: Path, most: int, check: Callable[[os.stat_result], None] = lambda _: None) -> bytes:
    """Return the content of a file of at most so many bytes.

    check: called with the fstat(2) of the open file before it is read. Raises OSError, EFBIG if the
    file is larger.
    """
    # Without O_NONBLOCK, opening a FIFO waits for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        found = os.fstat(descriptor)
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        check(found)
        is_regular = stat.S_ISREG(found.st_mode)
        started, size = time.monotonic(), 0
        parts: list[bytes] = []
        while is_regular or _await(descriptor, started, path):
            try:
                part = os.read(descriptor, min(CHUNK, most + 1 - size))
            except BlockingIOError:
                continue
            if not part:
                return b"".join(parts)
            parts.append(part)
            size += len(part)
            if size > most:
                raise OSError(errno.EFBIG, f"larger than {most} bytes")
        raise TimeoutError(errno.ETIMEDOUT, f"no end of file within {WAIT:.0f} s")
    finally:
        os.close(descriptor)


def _await(descriptor: int, started: float, path: Path) -> bool:
    """Wait for data or the end of the file; return whether it came in time."""
    watch = select.poll()
    watch.register(descriptor, select.POLLIN)
    for until in (WAIT_SILENTLY, WAIT):
        left = started + until - time.monotonic()
        if left > 0:
            if watch.poll(left * 1000):
                return True
            if until < WAIT:
                log.info("waiting for %s, %.0f s at most", path, WAIT)
    return False


def write_secret(path: Path, data: bytes) -> None:
    """Write a new file of mode 0600, atomically and durably; leave an existing one unchanged.

    Raises OSError.
    """
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.unlink(missing_ok=True)
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(fresh, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links, such as that of a memory card
            if not os.path.lexists(path):
                os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def read_secret(path: Path, most: int, what: str) -> bytes:
    """Return the secret in a file that no other user can read or replace.

    what: the kind of file, for errors. Raises TtunError.
    """
    try:
        return read(path, most, lambda found: check_secret(path, found, what))
    except OSError as error:
        raise TtunError(f"cannot read the {what} {path}: {why(path, error)}") from None


def why(path: Path, error: OSError) -> str:
    """Return why a file cannot be read, for an error."""
    if error.errno == errno.ENOENT and str(path).startswith(("/dev/fd/", "/proc/self/fd/")):
        return "it is closed (sudo closes <(COMMAND): use COMMAND | sudo ttun ... /dev/stdin)"
    if isinstance(error, PermissionError):
        return "permission denied (use sudo)"
    return error.strerror or str(error)


def check_secret(path: Path, found: os.stat_result, what: str) -> None:
    """Raise TtunError if other users can read the secret in an open file, or put it there."""
    if stat.S_ISFIFO(found.st_mode) and _is_nameless(found):
        return  # the parent process made it
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISFIFO(found.st_mode)):
        raise TtunError(f"{path} is a device, not a {what}")
    if _is_credential(path, found.st_mode):
        return
    check_owner(path, found, what)
    if found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise TtunError(f"the {what} {path} is readable by other users (chmod 600 {path})")


def check_owner(path: Path, found: os.stat_result, what: str) -> None:
    """Raise TtunError unless root, this user, or the caller of sudo owns a file."""
    caller = os.environ.get(SUDO_VARIABLE, "")
    trusted = {"0", str(os.getuid()), str(os.geteuid()), caller}
    if str(found.st_uid) in trusted:
        return
    raise TtunError(
        f"the {what} {path} belongs to user {user_name(found.st_uid)} "
        f"(chown {user_name(os.geteuid())} {path})"
    )


def _is_nameless(found: os.stat_result) -> bool:
    """Return whether a pipe was made by pipe(2), so that only its maker's children have it."""
    descriptors = os.pipe()
    try:
        return os.fstat(descriptors[0]).st_dev == found.st_dev
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _is_credential(path: Path, mode: int) -> bool:
    """Return whether a file is a credential of this service (systemd.exec(5), Credentials).

    systemd may grant the service access through an access control list, whose mask appears as the
    group permissions in stat. Only root and the service can enter the directory.
    """
    directory = os.environ.get(CREDENTIALS)
    return directory is not None and path.parent == Path(directory) and not mode & ~0o440 & 0o777
