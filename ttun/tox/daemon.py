"""The background: fork, the file with the process id, another user, syslog. Source: daemon(7)."""

from __future__ import annotations

import logging
import logging.handlers
import os
import pwd
import sys
from pathlib import Path

from ttun.errors import TtunError, UsageError

SYSLOG = "/dev/log"


def to_background() -> None:
    """Go on in a process of its own, without a terminal. The one that was started returns 0.

    Nothing may run on other threads yet: they would not come along.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if os.fork():
        os._exit(0)
    os.setsid()
    if os.fork():  # no session leader: it can never get a terminal again
        os._exit(0)
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)


def open_pid_file(path: Path) -> int:
    """Return a descriptor to write the process id to, opened while we still may."""
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    except OSError as error:
        raise TtunError(f"cannot write the process id to {path}: {error.strerror}") from None


def write_pid(descriptor: int) -> None:
    """Write who we are."""
    os.write(descriptor, f"{os.getpid()}\n".encode())
    os.close(descriptor)


def become(user: str) -> None:
    """Become a user, given by name or number, for good, with that user's groups."""
    try:
        entry = pwd.getpwuid(int(user)) if user.isdigit() else pwd.getpwnam(user)
        name, uid, gid = entry.pw_name, entry.pw_uid, entry.pw_gid
    except KeyError:
        if not user.isdigit():
            raise UsageError(f"there is no user {user!r} here") from None
        name, uid, gid = "", int(user), int(user)
    if os.geteuid() != 0:
        if os.geteuid() == uid:
            return
        raise TtunError(f"becoming the user {user} needs root")
    try:
        if name:
            os.initgroups(name, gid)
        else:
            os.setgroups([])
        os.setgid(gid)
        os.setuid(uid)
    except OSError as error:
        raise TtunError(f"cannot become the user {user}: {error.strerror}") from None


def log_to_syslog(log: logging.Logger) -> None:
    """Log to syslog in place of stderr. Raises TtunError."""
    try:
        handler = logging.handlers.SysLogHandler(
            SYSLOG, facility=logging.handlers.SysLogHandler.LOG_DAEMON
        )
    except OSError as error:
        raise TtunError(f"no syslog at {SYSLOG}: {error.strerror}") from None
    handler.setFormatter(logging.Formatter("ttun[%(process)d]: %(message)s"))
    log.handlers[:] = [handler]
