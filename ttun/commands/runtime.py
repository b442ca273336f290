"""The directories of status sockets, and safe access to those that other users own.

    /run/ttun/                      root's, or that of the user of a service with RuntimeDirectory=
    /run/ttun/DEVICE.PID.sock       of a tunnel that stays root
    /run/ttun/65534/                of the user that a tunnel switches to: the number
    /run/ttun/ttun-server@office/   of a systemd unit, made and removed by systemd
    $XDG_RUNTIME_DIR/ttun/          of a user who runs a tunnel without root

After a tunnel has dropped privileges it can remove its socket only from a directory that its user
owns. So each user has one. In a directory like /tmp every user of the machine could pretend to be a
tunnel. A directory for each tunnel would have to be removed from a directory that root owns; one
for each user stays, empty. The socket of a tunnel that was killed stays too, until the next tunnel
of that user removes it.

Root enters directories that an unprivileged user owns. All access goes through descriptors of the
directories and sockets, so that what is used is what was checked. No symbolic link is followed, and
no mount is entered: a file system of that user could block a reader forever. A Unix socket takes a
path and no descriptor, so the path is /proc/self/fd/N, see proc(5). That is also short enough:
unix(7) allows 107 bytes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from ttun.privileges import User

SYSTEM = Path("/run/ttun")
SUFFIX = ".sock"
MOST_ENTRIES = 1024  # read from a directory
SECOND_LOOK = 0.05  # seconds until a socket counts as dead
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_OURS = Path("/proc/self/fd")


def directories() -> list[Path]:
    """Return the directories with sockets: the system's, and the calling user's."""
    own = os.environ.get("XDG_RUNTIME_DIR", "")
    return [SYSTEM, *([Path(own, "ttun")] if own.startswith("/") else [])]


def made_by_systemd() -> list[Path]:
    """Return those that systemd made for this unit: RuntimeDirectory= in systemd.exec(5)."""
    made = map(Path, os.environ.get("RUNTIME_DIRECTORY", "").split(":"))
    return [path for path in made if path.parent == SYSTEM]


def open_directory(path: Path) -> int:
    """Open one of the directories. Raises OSError."""
    return os.open(path, _DIRECTORY)


def open_inner(directory: int, name: str) -> int:
    """Open a subdirectory. Raises OSError."""
    with _found(directory, name) as found:
        return os.open(_OURS / str(found), _DIRECTORY & ~os.O_NOFOLLOW)


@contextlib.contextmanager
def directory(path: Path, inner: str = "") -> Iterator[int]:
    """Open one of the directories, or a subdirectory, for the block. Raises OSError."""
    descriptor = open_directory(path)
    try:
        if inner:
            outer, descriptor = descriptor, open_inner(descriptor, inner)
            os.close(outer)
        yield descriptor
    finally:
        os.close(descriptor)


def connect(sock: socket.socket, directory: int, name: str) -> int:
    """Connect a non-blocking socket to one in a directory; return 0 or the errno.

    EAGAIN: its backlog is full; retry. Raises OSError, ENOTSOCK if it is not a socket.
    """
    with _found(directory, name) as found:
        if not stat.S_ISSOCK(os.fstat(found).st_mode):
            raise OSError(errno.ENOTSOCK, "not a socket")
        return sock.connect_ex(str(_OURS / str(found)))


def bind(sock: socket.socket, directory: int, name: str) -> None:
    """Bind sock to a name in a directory. Raises OSError."""
    sock.bind(str(_OURS / str(directory) / name))


def entries(directory: int) -> tuple[dict[str, bool], bool]:
    """Return the names in a directory, MOST_ENTRIES at most, and whether these are all.

    The value of a name is whether it is a directory. Raises OSError.
    """
    found: dict[str, bool] = {}
    with os.scandir(directory) as listing:
        for entry in listing:
            if len(found) == MOST_ENTRIES:
                return found, False
            found[entry.name] = entry.is_dir(follow_symlinks=False)
    return found, True


def make(path: Path) -> int:
    """Open one of the directories to listen in; create it if it is missing. Raises OSError."""
    if not _OURS.exists():
        raise OSError(errno.ENOENT, "/proc is not mounted")
    made = False
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o755)
        made = True
    directory = open_directory(path)
    try:
        if made:
            os.fchmod(directory, 0o755)  # whatever the umask: its users have to pass
    except BaseException:
        os.close(directory)
        raise
    return directory


def make_inner(directory: int, user: User) -> int:
    """Open the subdirectory of this user; create it if it is missing.

    Raises OSError, PermissionError if another user owns it or it cannot be given to this one.
    """
    name, made = str(user.uid), False
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, mode=0o700, dir_fd=directory)
        made = True
    inner = open_inner(directory, name)
    try:
        if made and not os.listdir(inner):  # the owner of the outer one may have replaced it
            os.fchmod(inner, 0o755)
            os.fchown(inner, user.uid, user.gid)
        if os.fstat(inner).st_uid != user.uid:
            raise PermissionError(errno.EPERM, f"subdirectory {name} belongs to another user")
    except BaseException:
        os.close(inner)
        if made:
            with contextlib.suppress(OSError):
                os.rmdir(name, dir_fd=directory)
        raise
    return inner


def dead(directory: int) -> list[str]:
    """Return the sockets in a directory that no process listens on. Raises OSError."""
    found = _refusing(directory, entries(directory)[0])
    if found:
        time.sleep(SECOND_LOOK)  # a process may be between bind() and listen()
    return _refusing(directory, found)


def remove(directory: int, names: Iterable[str]) -> None:
    """Remove names from a directory, if only this user can write to it. Raises OSError."""
    state = os.fstat(directory)
    if state.st_uid == os.geteuid() and not state.st_mode & 0o022:
        for name in names:
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=directory)


def _refusing(directory: int, names: Iterable[str]) -> list[str]:
    found = []
    for name in names:
        if name.endswith(SUFFIX):
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
                sock.setblocking(False)
                if connect(sock, directory, name) == errno.ECONNREFUSED:
                    found.append(name)
    return found


@contextlib.contextmanager
def _found(directory: int, name: str) -> Iterator[int]:
    """Open an O_PATH descriptor of a name for the block. Raises OSError, EXDEV for a mount."""
    found = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        if _mount(found) != _mount(directory):
            raise OSError(errno.EXDEV, "something is mounted there")
        yield found
    finally:
        os.close(found)


def _mount(descriptor: int) -> str:
    """Return the mount that a file is on, see proc(5). Does not access what is mounted."""
    try:
        lines = Path(f"/proc/self/fdinfo/{descriptor}").read_text(encoding="ascii").splitlines()
    except PermissionError:  # before Linux 5.14, without privileges: then all is this user's own
        return ""
    return next((line for line in lines if line.startswith("mnt_id:")), "")
