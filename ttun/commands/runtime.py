"""The directories of status sockets, opened so that whoever owns one cannot lead us astray.

    /run/ttun/                      root's; or the user's whose service has it as RuntimeDirectory=
    /run/ttun/DEVICE.PID.sock       of a tunnel that stays root
    /run/ttun/65534/                of the user that a tunnel becomes: its number, as in /run/user
    /run/ttun/ttun-server@office/   of a systemd unit, made and removed by systemd
    $XDG_RUNTIME_DIR/ttun/          of a user who runs a tunnel without root

A tunnel drops its privileges, and can then remove its socket only from a directory that its user
owns. So each user has one. A directory like /tmp would let every user of the machine pretend to
be a tunnel. A directory for each tunnel would have to be removed from a directory that is root's;
one for each user stays, and is empty. The socket of a tunnel that was killed stays too, until the
next tunnel of that user removes it.

Root looks into directories that an unprivileged user owns. Everything goes through descriptors of
the directories and of the sockets, so that what is used is what was checked. No symbolic link is
followed, and no mount is entered: a file system of the owner's could block a reader for ever. A
Unix socket takes a path and no descriptor, so the path is /proc/self/fd/N, see proc(5). This path
is also short: unix(7) allows 107 bytes.
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
MOST_ENTRIES = 1024  # of a directory that are looked at
SECOND_LOOK = 0.05  # seconds
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_OURS = Path("/proc/self/fd")


def directories() -> list[Path]:
    """Return where sockets are: the system's place, and that of the user who asks."""
    own = os.environ.get("XDG_RUNTIME_DIR", "")
    return [SYSTEM, *([Path(own, "ttun")] if own.startswith("/") else [])]


def made_by_systemd() -> list[Path]:
    """Return those that a unit has for this process alone: RuntimeDirectory= of systemd.exec(5)."""
    made = map(Path, os.environ.get("RUNTIME_DIRECTORY", "").split(":"))
    return [path for path in made if path.parent == SYSTEM]


def open_directory(path: Path) -> int:
    """Open one of the directories. Raises OSError."""
    return os.open(path, _DIRECTORY)


def open_inner(directory: int, name: str) -> int:
    """Open a directory in it. Raises OSError."""
    with _found(directory, name) as found:
        return os.open(_OURS / str(found), _DIRECTORY & ~os.O_NOFOLLOW)


@contextlib.contextmanager
def directory(path: Path, inner: str = "") -> Iterator[int]:
    """Have one of the directories open, or one in it. Raises OSError."""
    descriptor = open_directory(path)
    try:
        if inner:
            outer, descriptor = descriptor, open_inner(descriptor, inner)
            os.close(outer)
        yield descriptor
    finally:
        os.close(descriptor)


def connect(sock: socket.socket, directory: int, name: str) -> int:
    """Connect a socket that does not block to one in a directory; return 0 or the errno.

    EAGAIN: its owner is slow to accept; try again. Raises OSError, ENOTSOCK for what is no socket.
    """
    with _found(directory, name) as found:
        if not stat.S_ISSOCK(os.fstat(found).st_mode):
            raise OSError(errno.ENOTSOCK, "not a socket")
        return sock.connect_ex(str(_OURS / str(found)))


def bind(sock: socket.socket, directory: int, name: str) -> None:
    """Make sock a socket in a directory. Raises OSError."""
    if not _OURS.exists():
        raise OSError(errno.ENOENT, "/proc is not mounted")
    sock.bind(str(_OURS / str(directory) / name))


def entries(directory: int) -> tuple[dict[str, bool], bool]:
    """Return the names in it, MOST_ENTRIES at most, and whether these are all. Raises OSError.

    Each name says whether it is a directory.
    """
    found: dict[str, bool] = {}
    with os.scandir(directory) as listing:
        for entry in listing:
            if len(found) == MOST_ENTRIES:
                return found, False
            found[entry.name] = entry.is_dir(follow_symlinks=False)
    return found, True


def make(path: Path) -> int:
    """Open one of the directories for us to listen in; make it if it is missing. Raises OSError."""
    made = False
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o755)
        made = True
    directory = open_directory(path)
    try:
        if made:
            os.fchmod(directory, 0o755)  # whatever our umask is: its users have to get through
    except BaseException:
        os.close(directory)
        raise
    return directory


def make_inner(directory: int, user: User) -> int:
    """Open the directory in it that is this user's, made if it is missing.

    Raises OSError, PermissionError if it is another's or cannot be given to the user.
    """
    name, made = str(user.uid), False
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, mode=0o700, dir_fd=directory)
        made = True
    inner = open_inner(directory, name)
    try:
        if made and not os.listdir(inner):  # who owns the outer one may put another in its place
            os.fchmod(inner, 0o755)
            os.fchown(inner, user.uid, user.gid)
        if os.fstat(inner).st_uid != user.uid:
            raise PermissionError(errno.EPERM, f"{name} in it belongs to another user")
    except BaseException:
        os.close(inner)
        if made:
            with contextlib.suppress(OSError):
                os.rmdir(name, dir_fd=directory)
        raise
    return inner


def dead(directory: int) -> list[str]:
    """Return the sockets in a directory that nobody listens on. Raises OSError."""
    found = _refusing(directory, entries(directory)[0])
    if found:
        time.sleep(SECOND_LOOK)  # for whoever is just between bind() and listen()
    return _refusing(directory, found)


def remove(directory: int, names: Iterable[str]) -> None:
    """Remove these from a directory, if it is ours alone. Raises OSError."""
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
    """Have a descriptor that stands for what is there. Raises OSError, EXDEV for a mount."""
    found = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        if _mount(found) != _mount(directory):
            raise OSError(errno.EXDEV, "something is mounted there")
        yield found
    finally:
        os.close(found)


def _mount(descriptor: int) -> str:
    """Return which mount a file is on, see proc(5). Asks nothing of what is mounted."""
    try:
        lines = Path(f"/proc/self/fdinfo/{descriptor}").read_text(encoding="ascii").splitlines()
    except PermissionError:  # before Linux 5.14, for us without privileges: there it is all our own
        return ""
    return next((line for line in lines if line.startswith("mnt_id:")), "")
