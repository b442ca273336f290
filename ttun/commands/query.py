"""Query all status sockets on this machine.

Root may ask, and any user who owns one of the directories may answer (runtime.py). A socket whose
answer is late, too large or malformed is skipped with a message, and the others are shown.

1. Collect the sockets, up to a limit. Sockets of different directories alternate, so the owner of a
   directory can crowd out only what is in it.
2. Connect to all of them in parallel and read, with one deadline for everything.
3. Check each answer (answer.py). The kernel, not the answer, says which process sent it:
   SO_PEERCRED of unix(7), with the user of that process when it last called listen().
"""

from __future__ import annotations

import errno
import itertools
import os
import selectors
import socket
import struct
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ttun.commands import runtime
from ttun.commands.answer import Malformed, Tunnel, parse
from ttun.errors import is_lack, printable

DEADLINE = 2.0  # seconds for all sockets together
AGAIN = 0.05  # seconds until a socket that could not be queried is retried
MOST_AT_ONCE = 512  # sockets
BATCH = 16  # sockets that are connected to before answers are read
MOST_SOCKETS = 2048  # in all directories together
MOST_BYTES = 65536  # of an answer
UCRED = struct.Struct("iII")  # struct ucred


class Answers(NamedTuple):
    """The result of a query."""

    tunnels: list[Tunnel]  # with "uid" and "pid" from the kernel
    skipped: list[str]  # which sockets, and why: printable lines
    denied: bool  # whether there are sockets that this user may not query


def ask(directories: Iterable[Path], seconds: float = DEADLINE) -> Answers:
    """Query every socket in these directories and their subdirectories.

    Raises OSError if /proc is not mounted.
    """
    return _Round(seconds).run(directories)


class _Candidate(NamedTuple):
    """The place of a socket."""

    base: Path
    inner: str  # a subdirectory of base; "" for none
    name: str

    def __str__(self) -> str:
        return printable(str(self.base / self.inner / self.name))


class _Asked(NamedTuple):
    """A connected socket, and its answer so far."""

    name: str
    sock: socket.socket
    pid: int
    uid: int
    answer: bytearray


class _Round:
    """One query of all sockets."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._end = time.monotonic() + seconds
        self._selector = selectors.PollSelector()  # needs no descriptor of its own
        self._active: dict[socket.socket, _Asked] = {}
        self._answers = Answers([], [], False)

    def run(self, directories: Iterable[Path]) -> Answers:
        os.stat("/proc/self/fd")  # raises
        queue = deque(self._collect(directories))
        why = late = f"no answer within {self._seconds:g} s"
        while queue or self._active:
            why = self._start(queue) or late
            left = self._end - time.monotonic()
            if left <= 0:
                break
            self._receive(min(left, AGAIN) if queue else left)
        for asked in list(self._active.values()):
            self._end_with(asked, late)
        for candidate in queue:
            self._skip(str(candidate), why)
        return self._answers

    def _receive(self, seconds: float) -> None:
        """Read what comes within so many seconds."""
        for key, _ in self._selector.select(seconds):
            if time.monotonic() < self._end:  # checking a long answer takes milliseconds
                self._read(key.data)

    def _skip(self, name: str, why: str) -> None:
        self._answers.skipped.append(f"skipped {name}: {why}")

    def _failed(self, name: str, error: OSError) -> None:
        if isinstance(error, PermissionError):
            self._answers = self._answers._replace(denied=True)
        elif error.errno not in (errno.ENOENT, errno.ECONNREFUSED):  # just removed, or dead
            self._skip(name, error.strerror or str(error))

    def _collect(self, directories: Iterable[Path]) -> list[_Candidate]:
        lists = []
        for base in directories:
            sockets, inner = self._look_into(base)
            lists += [sockets, *(self._look_into(base, name)[0] for name in inner)]
        by_turns = itertools.chain.from_iterable(itertools.zip_longest(*lists))
        found = [candidate for candidate in by_turns if candidate is not None]
        if len(found) > MOST_SOCKETS:
            self._skip(f"{len(found) - MOST_SOCKETS} sockets", f"more than {MOST_SOCKETS}")
        return found[:MOST_SOCKETS]

    def _look_into(self, base: Path, inner: str = "") -> tuple[list[_Candidate], list[str]]:
        """Return the sockets in a directory, and its subdirectories."""
        name = printable(str(base / inner))
        try:
            with runtime.directory(base, inner) as directory:
                found, complete = runtime.entries(directory)
        except OSError as error:
            self._failed(name, error)
            return [], []
        if not complete:
            self._skip(f"some of {name}", f"more than {runtime.MOST_ENTRIES} entries")
        directories = [name for name, is_directory in found.items() if is_directory]
        return [
            _Candidate(base, inner, name)
            for name, is_directory in found.items()
            if name.endswith(runtime.SUFFIX) and not is_directory
        ], directories

    def _start(self, queue: deque[_Candidate]) -> str:
        """Connect to the candidates; return what is lacking to query them all, if anything."""
        for number in range(1, len(queue) + 1):
            if number % BATCH == 0:  # a full directory must not hide the answer of another
                self._receive(0)
            if len(self._active) >= MOST_AT_ONCE or time.monotonic() > self._end:
                break
            candidate = queue.popleft()
            try:
                self._connect(candidate)
            except BlockingIOError:  # its backlog is full
                queue.append(candidate)
            except OSError as error:
                if is_lack(error):
                    queue.appendleft(candidate)
                    return error.strerror or str(error)
                self._failed(str(candidate), error)
        return ""

    def _connect(self, candidate: _Candidate) -> None:
        """Connect to a candidate. Raises OSError, BlockingIOError to be retried."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            with runtime.directory(candidate.base, candidate.inner) as directory:
                code = runtime.connect(sock, directory, candidate.name)
            if code != 0:
                raise OSError(code, os.strerror(code))
            credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size)
            pid, uid, _ = UCRED.unpack(credentials)
            asked = _Asked(str(candidate), sock, pid, uid, bytearray())
            self._selector.register(sock, selectors.EVENT_READ, asked)
        except BaseException:
            sock.close()
            raise
        self._active[sock] = asked

    def _read(self, asked: _Asked) -> None:
        try:
            part = asked.sock.recv(MOST_BYTES)
        except BlockingIOError:
            return
        except OSError:  # the process has just ended
            self._end_with(asked)
            return
        asked.answer.extend(part)
        line, newline, _ = asked.answer.partition(b"\n")
        if len(line) > MOST_BYTES:
            self._end_with(asked, f"answer larger than {MOST_BYTES} bytes")
        elif newline or not part:
            self._end_with(asked, self._take(asked, bytes(line)))

    def _take(self, asked: _Asked, line: bytes) -> str:
        """Check and keep an answer; return what is wrong with it."""
        if not line:
            return "empty answer"
        try:
            tunnel = parse(line)
        except Malformed as error:
            return f"malformed answer: {error}"
        # The kernel has no number for a process outside this PID namespace.
        tunnel.update(pid=asked.pid or tunnel["pid"], uid=asked.uid)
        self._answers.tunnels.append(tunnel)
        return ""

    def _end_with(self, asked: _Asked, why: str = "") -> None:
        if why:
            self._skip(asked.name, why)
        self._selector.unregister(asked.sock)
        del self._active[asked.sock]
        asked.sock.close()
