"""Privileges: check, drop, and protect this process. Source: capabilities(7), prctl(2).

Once the device and port are open, the program needs no privileges. drop() drops all of them:

 1. Import what would be loaded later, which the new user may not be able to read.
 2. Empty the bounding set, so that no program started from here gains a capability.
 3. Switch to an unprivileged user and its group. glibc does so in every thread.
 4. Drop the remaining capabilities (in a user namespace the user may have to stay root).
 5. Set no_new_privs, so that set-user-ID programs gain nothing.

Capabilities belong to a thread, and a new thread inherits those of its creator: call drop() before
starting threads.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import pwd
import resource
import struct
from collections.abc import Iterator
from typing import NamedTuple

from ttun._codec import ffi, lib
from ttun.errors import TtunError, UsageError
from ttun.users import user_name

log = logging.getLogger("ttun")

NET_ADMIN, SYS_ADMIN = 12, 21  # linux/capability.h, as is this
HEADER = struct.pack("=Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, of this thread
# Effective, permitted and inheritable ones, 32 in each number; then the later ones.
CAPABILITIES = struct.Struct("=6I")
DEFAULT_USERS = ("ttun", "nobody")  # the first that exists
MAX_ID = 0xFFFFFFFE  # of a user; one more means "unchanged" to setresuid()
NOBODY = 65534  # if the user database has none: the kernel's overflow user


class User(NamedTuple):
    """A user to switch to."""

    name: str
    uid: int
    gid: int


def has(capability: int) -> bool:
    """Return whether one of the first 32 capabilities is effective in this thread (capget(2))."""
    data = bytearray(CAPABILITIES.size)
    lib.capget(HEADER, ffi.from_buffer(data))  # leaves zeros where it is forbidden
    return bool(CAPABILITIES.unpack(data)[0] >> capability & 1)


def check(more: str = "", what: str = "a TUN device") -> None:
    """Raise TtunError if this process may not configure the network. more: other ways."""
    if not has(NET_ADMIN):
        raise TtunError(f"{what} requires root or CAP_NET_ADMIN (run with sudo{more})")


def forbid_dumps() -> None:
    """Protect keys in memory: no core dumps, no tracing by other processes."""
    with contextlib.suppress(ValueError):  # a container forbids it; the next line is enough
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _prctl(lib.PR_SET_DUMPABLE, 0)


def find_user(name: str | None) -> User | None:
    """Return the user to switch to. name: a user name or ID, or None for the default.

    The default for root is ttun, or nobody if there is no such user; for others it is no change
    (None). Raises UsageError for an unknown user.
    """
    if name is None and os.geteuid() != 0:
        return None
    if name is None:
        for usual in DEFAULT_USERS:
            with contextlib.suppress(KeyError, OSError):
                return User(usual, *pwd.getpwnam(usual)[2:4])
        return User(usual, NOBODY, NOBODY)
    is_number = name.isascii() and name.isdigit() and len(name) <= len(str(MAX_ID))
    number = int(name) if is_number else None
    try:
        entry = pwd.getpwnam(name) if number is None else pwd.getpwuid(number)
    except (KeyError, ValueError, OverflowError, OSError):
        if number is not None and number <= MAX_ID:
            return User(name, number, number)
        raise UsageError(f"no such user: {name!r}") from None
    return User(entry.pw_name, entry.pw_uid, entry.pw_gid)


def find_group(name: str | None) -> int | None:
    """Return the ID of a group, None for None. Raises UsageError for an unknown one."""
    if name is None:
        return None
    import grp

    try:
        return grp.getgrnam(name).gr_gid
    except (KeyError, ValueError, OSError):
        raise UsageError(f"no such group: {name!r}") from None


def drop(user: User | None, *, required: bool) -> None:
    """Switch to user, if not None, and drop every capability, irrevocably.

    required: raise TtunError if switching fails; else log it and keep the current user.
    """
    _load_what_comes_later()
    capability = 0
    while _prctl(lib.PR_CAPBSET_READ, capability) >= 0:
        _prctl(lib.PR_CAPBSET_DROP, capability)
        capability += 1
    done = f"dropped privileges: user {user_name(os.geteuid())}"
    if user is not None:
        try:
            _become(user)
            done = f"dropped privileges: user {user.name}"
        except OSError as error:
            why = f"cannot switch to user {user.name}: {_why_not(error)}"
            if required:
                raise TtunError(why) from None
            done = f"{why}; {done}"
    drop_capabilities()
    forbid_dumps()  # changing the user resets it
    log.info("%s, no capabilities", done)


def drop_capabilities() -> None:
    """Drop all capabilities of this thread, ambient ones included."""
    none = bytes(CAPABILITIES.size)
    if lib.capset(HEADER, none) != 0 or _prctl(lib.PR_SET_NO_NEW_PRIVS, 1) != 0:
        raise TtunError("cannot drop capabilities")


@contextlib.contextmanager
def acting_as(user: User) -> Iterator[None]:
    """Use only this user's permissions within the block. Raises OSError if not allowed.

    It affects all threads, so use it in a single-threaded program. Open what needs root before.
    """
    uid, gid = os.geteuid(), os.getegid()
    os.setegid(user.gid)
    try:
        os.seteuid(user.uid)  # this also clears the effective capabilities
        try:
            yield
        finally:
            os.seteuid(uid)
    finally:
        os.setegid(gid)


def may_become(user: User) -> bool:
    """Return whether this process is another user and can act as that one."""
    try:
        with acting_as(user):
            return os.getuid() != user.uid
    except OSError:
        return False


def can_be(user: User) -> bool:
    """Return whether a program that this process starts can run as that user.

    With any group: Group= of a unit may have chosen another one.
    """
    return os.geteuid() == user.uid or may_become(user)


def _prctl(option: int, value: int) -> int:
    return int(lib.prctl(option, value, 0, 0, 0))


def _become(user: User) -> None:
    if os.getresuid() == (user.uid,) * 3 and os.getresgid() == (user.gid,) * 3:
        return
    # The user last, as changing groups needs root. In a user namespace the first call fails, and
    # nothing has changed.
    group, groups = os.getresgid(), os.getgroups()
    try:
        os.setresgid(user.gid, user.gid, user.gid)
        os.setgroups([])
        os.setresuid(user.uid, user.uid, user.uid)
    except OSError:
        with contextlib.suppress(OSError):
            os.setresgid(*group)
            os.setgroups(groups)
        raise


def _why_not(error: OSError) -> str:
    if error.errno == errno.EINVAL:
        return "not mapped in this user namespace"
    if error.errno == errno.EPERM:
        return "CAP_SETUID and CAP_SETGID required"
    return error.strerror or str(error)


def _load_what_comes_later() -> None:
    """Import what Python imports at the first name lookup or the first unusual character."""
    "é".encode("idna")  # loads the codecs idna and punycode
    "\n".encode("unicode_escape")
