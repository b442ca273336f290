"""What this process may do, and what nobody may do to it. Source: capabilities(7), prctl(2).

A program that made its device and its port needs no right any more. drop() gives all of them up:

 1. What is loaded on first use later on is loaded now: afterwards this user may not be able to.
 2. The bounding set loses every capability, so that no program started from here gets one.
 3. Groups and user change to an unprivileged user's. glibc does that in every thread.
 4. What capabilities are left go (in a user namespace the user may have had to stay root).
 5. no_new_privs: no set-user-ID program gives anything back.

Capabilities belong to a thread, and a new thread starts with those of the one that made it: drop
before threads are made.
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

log = logging.getLogger("ttun")

NET_ADMIN, SYS_ADMIN = 12, 21  # linux/capability.h, as is this
HEADER = struct.pack("=Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, of this thread
DEFAULT_USER = "nobody"
MAX_ID = 0xFFFFFFFE  # of a user; setresuid() takes one more for «as it is»
NOBODY = 65534  # where the user database has none: the kernel's own overflow user


class User(NamedTuple):
    """Whom to become."""

    name: str
    uid: int
    gid: int


def has(capability: int) -> bool:
    """Return whether this thread has a capability in effect: capget(2), which needs no /proc."""
    data = bytearray(24)  # effective, permitted, inheritable; then bits 32 to 63
    if lib.capget(HEADER, ffi.from_buffer(data)) != 0:
        return False
    return bool(struct.unpack_from("=I", data, 12 * (capability // 32))[0] >> capability % 32 & 1)


def check() -> None:
    """Raise TtunError if this process may not make a network device."""
    if not has(NET_ADMIN):
        raise TtunError("making a TUN device needs root or CAP_NET_ADMIN: run it with sudo")


def forbid_dumps() -> None:
    """Keep what is in memory, keys among it, out of core files and other processes' reach."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    lib.prctl(lib.PR_SET_DUMPABLE, 0, 0, 0, 0)


def find_user(name: str | None) -> User | None:
    """Return whom to become. name: of a user, or a number, or None for what is usual.

    That is nobody for root, and nobody else (None) for everybody else. Raises UsageError for a
    name that is no user's.
    """
    if name is None and os.geteuid() != 0:
        return None
    text = DEFAULT_USER if name is None else name
    is_number = text.isascii() and text.isdigit() and len(text) <= len(str(MAX_ID))
    number = int(text) if is_number else None
    try:
        entry = pwd.getpwnam(text) if number is None else pwd.getpwuid(number)
    except (KeyError, ValueError, OverflowError, OSError):
        if name is None:
            return User(DEFAULT_USER, NOBODY, NOBODY)
        if number is not None and number <= MAX_ID:
            return User(name, number, number)
        raise UsageError(f"there is no user {name!r} here") from None
    return User(entry.pw_name, entry.pw_uid, entry.pw_gid)


def drop(user: User | None, *, required: bool) -> None:
    """Become user, if one is given, and give up every capability, for good.

    required: raise TtunError when that user cannot be had; else stay who we are, and say so.
    """
    _load_what_comes_later()
    capability = 0
    while lib.prctl(lib.PR_CAPBSET_READ, capability, 0, 0, 0) >= 0:
        lib.prctl(lib.PR_CAPBSET_DROP, capability, 0, 0, 0)
        capability += 1
    done = f"going on as user {os.geteuid()}"
    if user is not None:
        try:
            _become(user)
            done = f"going on as user {user.name}"
        except OSError as error:
            why = f"cannot become the user {user.name}: {_why_not(error)}"
            if required:
                raise TtunError(why) from None
            done = f"{why}; {done}"
    drop_capabilities()
    forbid_dumps()  # the kernel forgets that when the user changes
    log.info("%s, without capabilities", done)


def drop_capabilities() -> None:
    """Give up those of this thread; the ambient ones go with the permitted ones."""
    if lib.capset(HEADER, bytes(24)) != 0 or lib.prctl(lib.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise TtunError("cannot give up capabilities")


@contextlib.contextmanager
def acting_as(user: User) -> Iterator[None]:
    """Have only this user's rights for a while. Raises OSError if it may not be.

    Of all threads: for a program that has one. What is opened by root is to be opened before.
    """
    uid, gid = os.geteuid(), os.getegid()
    os.setegid(user.gid)
    try:
        os.seteuid(user.uid)  # and its capabilities have no effect until it is undone
        try:
            yield
        finally:
            os.seteuid(uid)
    finally:
        os.setegid(gid)


def may_become(user: User) -> bool:
    """Return whether this process is not that user, and can act as it."""
    try:
        with acting_as(user):
            return os.getuid() != user.uid
    except OSError:
        return False


def _become(user: User) -> None:
    if os.getresuid() == (user.uid,) * 3 and os.getresgid() == (user.gid,) * 3:
        return
    # The user last: who is not root may not change groups. In a user namespace the first of these
    # fails, and then nothing has changed.
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
        return "this user namespace does not have it"
    if error.errno == errno.EPERM:
        return "this process may not change its user"
    return error.strerror or str(error)


def _load_what_comes_later() -> None:
    """Import what Python would import at the first look-up of a name, the first odd character."""
    "é".encode("idna")  # which takes the codec of ASCII names, and one more
    "\n".encode("unicode_escape")
