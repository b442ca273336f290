"""The status socket of an endpoint: a Unix socket that answers each connection once.

 1. The endpoint opens it before it drops privileges, as the user that it switches to. Only that
    user, root and a group that the administrator names may connect. runtime.py says where it is.
 2. A thread answers each connection with one line of JSON and closes it. It never waits: what the
    client does not accept at once is lost.
 3. ``ttun show`` queries all sockets on the machine (query.py).

The socket is removed at the end. If the program is killed it stays behind, refuses connections, and
the next tunnel of that user removes it.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import errno
import json
import logging
import os
import secrets
import select
import socket
import threading
import time
from pathlib import Path
from typing import Any, Callable

from ttun import privileges
from ttun.commands import runtime
from ttun.commands.answer import FORMAT, own_netns
from ttun.privileges import User
from ttun.record import Status
from ttun.summary import Summary

log = logging.getLogger("ttun")

BACKLOG = 128  # connections that wait to be accepted
LACK = 0.2  # seconds to wait when there is no descriptor or memory for a connection
RETRY = 2.0  # seconds to wait when no thread can be started
JOIN = 1.0  # seconds for the last answer


class StatusSocket:
    """Answers for one endpoint. If it cannot be opened, the endpoint runs without it."""

    def __init__(self, device: str, user: User | None = None, group: int | None = None) -> None:
        """Listen in the first directory that this process may write to.

        user: the user that this process switches to before serve(), if any. group: one that may
        connect too.
        """
        self._group = group
        self._listener: socket.socket | None = None
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._told_no_thread = False
        if user is not None and not privileges.may_become(user):
            user = None
        places = runtime.directories()
        if user is None:
            places = runtime.made_by_systemd() + places
        for place in places:
            try:
                self._listen(place, device, user)
                return
            except OSError as error:
                where, why = place, error.strerror or error
        log.warning("ttun show will not see this tunnel: cannot listen in %s: %s", where, why)

    def serve(self, status: Callable[[], Status]) -> None:
        """Start to answer, on a thread. Call it again after patience(): it may have failed."""
        if self._listener is None or self._thread is not None:
            return
        thread = threading.Thread(
            target=self._serve, args=(status, self._listener), name="ttun-status", daemon=True
        )
        try:
            thread.start()
        except RuntimeError as error:  # other programs of this user may use them all
            if not self._told_no_thread:
                log.warning("cannot answer ttun show: %s (retrying)", error)
            self._told_no_thread = True
            return
        self._thread = thread

    def patience(self, seconds: float | None) -> float | None:
        """Return how long to wait before serve() is called again: seconds, or less."""
        if self._listener is None or self._thread is not None:
            return seconds
        return RETRY if seconds is None else min(seconds, RETRY)

    def entry(self) -> tuple[str, int] | None:
        """Return its name and the directory that it is in, a descriptor; None if there is none."""
        return (self._name, self._directory) if self._listener is not None else None

    def close(self) -> None:
        """Stop answering and remove the socket. Within JOIN seconds."""
        atexit.unregister(self.close)
        listener, self._listener = self._listener, None
        if listener is None:
            return
        self._closing.set()
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)  # wakes poll()
        if self._thread is not None:
            self._thread.join(JOIN)
        listener.close()
        with contextlib.suppress(OSError):
            os.unlink(self._name, dir_fd=self._directory)
        os.close(self._directory)

    def _listen(self, place: Path, device: str, user: User | None) -> None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # bind() makes the name with this mode
            os.fchmod(listener.fileno(), 0o600 if self._group is None else 0o660)
            directory, is_users = _own_directory(place, user)
            # Nothing is changed as root in a directory that another user owns.
            acting: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
            if user and is_users:
                gid = user.gid if self._group is None else self._group
                acting = privileges.acting_as(user._replace(gid=gid))
            try:
                dead = runtime.dead(directory)
                with acting:
                    runtime.remove(directory, dead)
                    mask = os.umask(0o117)
                    try:
                        self._name = _bind(listener, directory, device)
                    finally:
                        os.umask(mask)
                    self._let_group_in(directory)
                    listener.listen(BACKLOG)
                # Again: SO_PEERCRED names who did this last, and no other user can forge root.
                listener.listen(BACKLOG)
            except BaseException:
                os.close(directory)
                raise
        except BaseException:
            listener.close()
            raise
        self._directory, self._listener = directory, listener
        atexit.register(self.close)  # the endpoint may fail to start

    def _let_group_in(self, directory: int) -> None:
        """Give the name to the group, unless bind() has. An unprivileged user needs to be in it."""
        if self._group is None or self._group == os.getegid():
            return
        try:
            os.chown(self._name, -1, self._group, dir_fd=directory, follow_symlinks=False)
        except OSError as error:
            why = f"{error.strerror} (systemd: Group=)"
            log.warning("only root and this user can use ttun show: --monitor-group: %s", why)

    def _serve(self, status: Callable[[], Status], listener: socket.socket) -> None:
        failed = Summary("and %d more queries of ttun show failed")
        lacking = False
        # accept() fails for lack of a descriptor even if no connection waits: poll first.
        listener.setblocking(False)
        waiting = select.poll()
        waiting.register(listener, select.POLLIN)
        while not self._closing.is_set():
            try:
                waiting.poll()
                asking, _ = listener.accept()
                with asking:
                    asking.setblocking(False)  # the answer fits any buffer
                    asking.send(json.dumps(as_dict(status())).encode() + b"\n")
                lacking = False
            except (ConnectionError, BlockingIOError):
                continue  # the client has disconnected, or reads nothing
            except Exception as error:  # no descriptor or memory, for now
                if self._closing.is_set():
                    break
                if not lacking:  # one line each time, not one for each client
                    failed.log(time.monotonic(), "cannot answer ttun show: %s", _reason(error))
                lacking = True
                self._closing.wait(LACK)
        failed.tick(time.monotonic(), end=True)


def as_dict(status: Status) -> dict[str, Any]:
    """Return a status as it is sent: plain types, counters by name, and fields of the process."""
    counters = {name: getattr(status, name)._asdict() for name in ("counters", "totals")}
    more = {"pid": os.getpid(), "netns": own_netns(), "format": FORMAT}
    return {**dataclasses.asdict(status), **counters, **more}


def _own_directory(place: Path, user: User | None) -> tuple[int, bool]:
    """Open the directory to listen in; return it, and whether another user owns it.

    Raises OSError.
    """
    directory = runtime.make(place)
    if user is None:
        return directory, False
    try:
        # Left by an earlier version, or by a tunnel that stayed root.
        runtime.remove(directory, runtime.dead(directory))
        inner = runtime.make_inner(directory, user)
    except PermissionError:  # not the user's: the socket will stay behind at the end
        return directory, False
    except BaseException:
        os.close(directory)
        raise
    os.close(directory)
    return inner, True


def _bind(listener: socket.socket, directory: int, device: str) -> str:
    """Bind to a name that is free, and return it. Raises OSError."""
    name = f"{device}.{os.getpid()}{runtime.SUFFIX}"
    try:
        runtime.bind(listener, directory, name)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        # Containers that share /run may have equal device names and process numbers.
        name = f"{device}.{os.getpid()}.{secrets.token_hex(4)}{runtime.SUFFIX}"
        runtime.bind(listener, directory, name)
    return name


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
