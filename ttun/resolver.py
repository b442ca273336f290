"""The addresses of a name: looked up where nothing else can be held up by it, and remembered.

getaddrinfo() cannot be interrupted and may take half a minute. So it runs

1. nowhere, for a numeric address;
2. in a child process, before the program has dropped its privileges: they belong to each thread,
   so no thread may be there yet;
3. on a thread, afterwards, and in a program that has threads already. There is one at a time,
   however long a resolver is silent.

A name that was found once is dialled also while it cannot be looked up: the question may have gone
into the very tunnel that is to be built.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import json
import logging
import os
import queue
import resource
import select
import signal
import socket
import threading
from typing import Any, NamedTuple, Union

from ttun._codec import lib
from ttun.errors import reason
from ttun.flag import StopFlag

log = logging.getLogger("ttun")

PATIENCE = 2.0  # seconds for a look-up when there are addresses of an earlier one
FIRST_PATIENCE = 60.0  # seconds for the first: longer than the C library's resolver takes
ANSWER_MAX = 65536  # bytes from the child
MOST = 64  # addresses of a name: each may take 14 s to dial and to shake hands with

SocketAddress = Union[tuple[str, int], tuple[str, int, int, int]]


class Target(NamedTuple):
    """Where to connect to: what socket() and connect() take."""

    family: int
    sockaddr: SocketAddress


def numeric(host: str, port: int, flags: int = 0) -> list[Target]:
    """Return the target of an address in figures; none for a name. It asks nobody."""
    try:
        if host:
            ipaddress.ip_address(host.partition("%")[0])
        return _getaddrinfo(host, port, flags | socket.AI_NUMERICHOST)
    except (OSError, ValueError):
        return []


def look_up(host: str, port: int, stop: StopFlag, flags: int = 0) -> list[Target]:
    """Return the targets of a host, which may be a name.

    Raises OSError with the reason, InterruptedError when stop was set.
    """
    if found := numeric(host, port, flags):
        return found
    if threading.active_count() > 1:
        return _wait_for(_on_a_thread(host, port, flags), FIRST_PATIENCE, stop)
    return _in_a_child(host, port, flags, stop)


class Resolver:
    """Looks one host up again and again, for a client that dials again and again."""

    def __init__(self, host: str, port: int) -> None:
        """Ask nobody yet."""
        self._host, self._port = host, port
        self.known: list[Target] = []  # found last
        self._asked: queue.SimpleQueue[list[Target] | Exception] | None = None

    def first(self, stop: StopFlag) -> list[Target]:
        """Look it up as look_up() does, and remember what was found."""
        self.known = look_up(self._host, self._port, stop)
        return self.known

    def targets(self, stop: StopFlag) -> list[Target]:
        """Look it up on a thread; return what is known from before when that fails or takes long.

        Raises OSError with the reason when nothing is known, InterruptedError when stop was set.
        """
        if found := numeric(self._host, self._port):
            return found
        try:
            if self._asked is None:
                self._asked = _on_a_thread(self._host, self._port, 0)
            self.known = _wait_for(self._asked, PATIENCE if self.known else FIRST_PATIENCE, stop)
            self._asked = None
        except InterruptedError:
            raise
        except OSError as error:
            if not isinstance(error, TimeoutError):
                self._asked = None  # it has answered; else it is under way still
            if not self.known:
                raise
            log.info(
                "cannot look up %s: %s; dialling its last addresses", self._host, reason(error)
            )
        return self.known


def _getaddrinfo(host: str, port: int, flags: int) -> list[Target]:
    # No host: the addresses to listen on.
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=flags)
    return [Target(family, sockaddr) for family, _, _, _, sockaddr in found[:MOST]]  # type: ignore[arg-type]


def _on_a_thread(host: str, port: int, flags: int) -> queue.SimpleQueue[list[Target] | Exception]:
    """Begin a look-up; its answer comes through the queue. Raises OSError without a thread."""
    answers: queue.SimpleQueue[list[Target] | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(_getaddrinfo(host, port, flags))
        except Exception as error:  # whatever it is: somebody waits for an answer
            answers.put(error)

    try:
        threading.Thread(target=ask, name="ttun-lookup", daemon=True).start()
    except RuntimeError as error:
        raise OSError(errno.EAGAIN, str(error)) from None
    return answers


def _wait_for(
    answers: queue.SimpleQueue[list[Target] | Exception], seconds: float, stop: StopFlag
) -> list[Target]:
    """Wait for the answer of a look-up. Raises TimeoutError when it takes longer."""
    tries = int(seconds / 0.1)
    while not stop.is_set():
        stop.beat()
        try:
            answer = answers.get(timeout=0.1)
        except queue.Empty:
            tries -= 1
            if tries <= 0:
                raise TimeoutError(f"no answer from the resolver for {seconds:.0f} s") from None
            continue
        if isinstance(answer, Exception):
            renamed = OSError(reason(answer))
            renamed.errno = getattr(answer, "errno", None)
            raise renamed
        return answer
    raise InterruptedError


def _in_a_child(host: str, port: int, flags: int, stop: StopFlag) -> list[Target]:
    """Look a host up in a process of its own, which is ended with the wait."""
    readable, writable = os.pipe()
    try:
        child = os.fork()
        if child == 0:
            _answer(writable, host, port, flags)
    except BaseException:
        os.close(readable)
        raise
    finally:
        os.close(writable)
    try:
        answer = _read_all(readable, stop)
    finally:
        os.close(readable)
        # Where SIGCHLD is ignored, as whoever started us may have it, or another part of the
        # program waits for all children, it is gone by itself.
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)
    if not answer:
        raise OSError("the look-up ended without an answer")
    found: dict[str, Any] = json.loads(answer)
    if "error" in found:
        raise OSError(found["error"])
    return [Target(family, tuple(sockaddr)) for family, sockaddr in found["targets"]]


def _answer(writable: int, host: str, port: int, flags: int) -> None:
    """Be the child: ask, answer and end, without anything of the parent's."""
    try:
        signal.set_wakeup_fd(-1)  # the pipe behind it is the parent's too
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        # It must not outlive the parent, nor keep the parent's device or port.
        lib.prctl(lib.PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        signal.alarm(int(FIRST_PATIENCE))
        os.closerange(3, writable)
        # Python 3.9 closes them one by one, and a container may allow a thousand million.
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        os.closerange(writable + 1, 65536 if most == resource.RLIM_INFINITY else min(most, 65536))
        try:
            found: dict[str, Any] = {"targets": _getaddrinfo(host, port, flags)}
        except Exception as error:
            found = {"error": reason(error)}
        os.write(writable, json.dumps(found).encode())  # a pipe takes 64 KiB at once
    finally:
        os._exit(0)


def _read_all(readable: int, stop: StopFlag) -> bytes:
    answer = b""
    waiting = select.poll()
    waiting.register(readable, select.POLLIN)
    waiting.register(stop, select.POLLIN)
    end = FIRST_PATIENCE
    while len(answer) < ANSWER_MAX and end > 0:
        stop.beat()
        ready = waiting.poll(1000)
        if stop.is_set():
            raise InterruptedError
        if not ready:
            end -= 1
            continue
        part = os.read(readable, ANSWER_MAX)
        if not part:
            break
        answer += part
    return answer
