"""Resolve host names without blocking the caller, and remember the addresses.

getaddrinfo() cannot be interrupted and may take half a minute. So it

1. is not called for a numeric address;
2. runs in a child process before privileges are dropped: they belong to each thread, so no thread
   may exist yet;
3. runs on a thread afterwards, and in a program that has threads already. There is at most one at a
   time, however long it takes.

If a name can no longer be resolved, its last addresses are used: the DNS query may have been routed
into the tunnel that is to be established.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import json
import logging
import os
import resource
import select
import signal
import socket
import threading
from functools import partial
from typing import Any, Callable, NamedTuple, Union

from ttun._codec import lib
from ttun.errors import reason
from ttun.flag import Flag
from ttun.network import name_servers

log = logging.getLogger("ttun")

PATIENCE = 2.0  # seconds for a lookup when earlier addresses are known
FIRST_PATIENCE = 60.0  # seconds for the first lookup: longer than the timeout of the C library
AMONG_OTHERS = 4.0  # the same where another server can be tried meanwhile, as for a connection
ANSWER_MAX = 65536  # bytes from the child process
MOST = 64  # addresses of a name: each may take 14 s to connect and authenticate

SocketAddress = Union[tuple[str, int], tuple[str, int, int, int]]


class Target(NamedTuple):
    """Arguments of socket() and connect()."""

    family: int
    sockaddr: SocketAddress


def numeric(host: str, port: int, flags: int = 0) -> list[Target]:
    """Return the target of a numeric address, without a lookup; empty for a name."""
    try:
        if host:
            ipaddress.ip_address(host.partition("%")[0])
        return _getaddrinfo(host, port, flags | socket.AI_NUMERICHOST)
    except (OSError, ValueError):
        return []


def look_up(host: str, port: int, stop: Flag, flags: int = 0) -> list[Target]:
    """Resolve a host name or address.

    Raises OSError with the reason, InterruptedError when stop was set.
    """
    if found := numeric(host, port, flags):
        return found
    find = partial(_getaddrinfo, host, port, flags)
    if threading.active_count() > 1:
        return _LookUp(find).wait(FIRST_PATIENCE, stop)
    return _in_a_child(find, stop, FIRST_PATIENCE)


class Resolver:
    """Resolve one host repeatedly, for a client that reconnects."""

    def __init__(self, host: str, port: int) -> None:
        """Do not resolve it yet."""
        self._host, self._port = host, port
        self.known: list[Target] = []  # last result
        self._asked: _LookUp | None = None
        self._told = False  # that a name server on this machine is of no use

    def first(
        self, stop: Flag, outside: bool = False, patience: float = FIRST_PATIENCE
    ) -> list[Target]:
        """Resolve it before the tunnel takes anything, and remember the result.

        outside, patience: as for targets().
        """
        find = self._find_first if outside else partial(_getaddrinfo, self._host, self._port, 0)
        if not (found := numeric(self._host, self._port)):
            if threading.active_count() > 1:
                found = self._await(find, patience, stop)
            else:
                found = _in_a_child(find, stop, patience)
        self.known = found
        return found

    def targets(
        self, stop: Flag, outside: bool = False, patience: float = FIRST_PATIENCE
    ) -> list[Target]:
        """Resolve it on a thread; return the last result if that fails or takes too long.

        outside: a name server on this machine would send its queries through the tunnel. patience:
        seconds if there is no last result. Raises OSError with the reason then, InterruptedError
        when stop was set.
        """
        if found := numeric(self._host, self._port):
            return found
        find = self._find_outside if outside else partial(_getaddrinfo, self._host, self._port, 0)
        try:
            self.known = self._await(find, PATIENCE if self.known else patience, stop)
        except InterruptedError:
            raise
        except OSError as error:
            if not self.known:
                raise
            log.warning(
                "cannot resolve %s: %s; using its last addresses", self._host, reason(error)
            )
        return self.known

    def _find_first(self) -> list[Target]:
        """Resolve it before the tunnel takes anything.

        A name server on this machine may ask only servers behind the tunnel, and time out.
        """
        found: list[Target] = []
        if name_servers.local() and not name_servers.is_in_hosts(self._host):
            with contextlib.suppress(OSError):
                found = self._ask(name_servers.upstream())
        return found or _getaddrinfo(self._host, self._port, 0)

    def _await(self, find: Callable[[], list[Target]], patience: float, stop: Flag) -> list[Target]:
        """Wait for a lookup on a thread. One that takes longer goes on, and is the next one too."""
        self._asked = self._asked or _LookUp(find)
        try:
            found = self._asked.wait(patience, stop)
        except (InterruptedError, TimeoutError):
            raise
        except OSError:
            self._asked = None
            raise
        self._asked = None
        return found

    def _find_outside(self) -> list[Target]:
        """Resolve it; if a name server on this machine would be asked, ask its upstream."""
        local = name_servers.local()
        if local and not name_servers.is_in_hosts(self._host):
            if servers := name_servers.upstream():
                if found := self._ask(servers):
                    return found
            elif not self._told:
                self._told = True
                log.warning(
                    "the name server %s sends its queries through the tunnel: until that is "
                    "connected, the last addresses of %s are dialled",
                    local,
                    self._host,
                )
        try:
            return _getaddrinfo(self._host, self._port, 0)
        except OSError:
            # The C library may have had a daemon ask (nscd, nss-resolve): through the tunnel.
            if not local:
                with contextlib.suppress(OSError):
                    if found := self._ask([*name_servers.in_use()]):
                        return found
            raise

    def _ask(self, servers: list[str]) -> list[Target]:
        found = name_servers.look_up(self._host, servers)[:MOST]
        return [target for each in found for target in numeric(each, self._port)]


def _getaddrinfo(host: str, port: int, flags: int) -> list[Target]:
    # No host: addresses to listen on.
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=flags)
    return [Target(family, sockaddr) for family, _, _, _, sockaddr in found[:MOST]]  # type: ignore[arg-type]


class _LookUp:
    """A lookup on its own thread. Raises OSError if no thread is available."""

    def __init__(self, find: Callable[[], list[Target]]) -> None:
        self._done, self._find = Flag(), find
        self._answer: list[Target] | Exception = []
        try:
            threading.Thread(target=self._run, name="ttun-lookup", daemon=True).start()
        except RuntimeError as error:
            raise OSError(errno.EAGAIN, str(error)) from None

    def _run(self) -> None:
        try:
            self._answer = self._find()
        except Exception as error:  # any error: the other thread waits for an answer
            self._answer = error
        self._done.set()

    def wait(self, seconds: float, stop: Flag) -> list[Target]:
        """Return the result. Raises OSError; TimeoutError after so many seconds."""
        if not stop.wait_for(self._done.fileno(), select.POLLIN, seconds):
            raise _no_answer(seconds)
        if isinstance(self._answer, Exception):
            renamed = OSError(reason(self._answer))
            renamed.errno = getattr(self._answer, "errno", None)
            raise renamed
        return self._answer


def _no_answer(seconds: float) -> TimeoutError:
    return TimeoutError(f"no answer from the resolver in {seconds:.0f} s")


def _in_a_child(find: Callable[[], list[Target]], stop: Flag, patience: float) -> list[Target]:
    """Call it in a child process, which is killed when this returns."""
    readable, writable = os.pipe()
    try:
        child = os.fork()
        if child == 0:
            _answer(writable, find)
    except BaseException:
        os.close(readable)
        raise
    finally:
        os.close(writable)
    try:
        answer = _read_all(readable, stop, patience)
    finally:
        os.close(readable)
        # If SIGCHLD is ignored (inherited), or another part of the program reaps all children, the
        # child may be gone.
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)
    if not answer:
        raise OSError("the resolver process failed")
    found: dict[str, Any] = json.loads(answer)
    if "error" in found:
        raise OSError(found["error"])
    return [Target(family, tuple(sockaddr)) for family, sockaddr in found["targets"]]


def _answer(writable: int, find: Callable[[], list[Target]]) -> None:
    """Run the child: resolve, write the answer, exit; keep no descriptor of the parent's."""
    try:
        signal.set_wakeup_fd(-1)  # the parent's pipe
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        # Do not outlive the parent or hold its device or port.
        lib.prctl(lib.PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        signal.alarm(int(FIRST_PATIENCE))
        os.closerange(3, writable)
        # Python 3.9 closes them one by one, and a container may allow 10^9.
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        os.closerange(writable + 1, 65536 if most == resource.RLIM_INFINITY else min(most, 65536))
        try:
            found: dict[str, Any] = {"targets": find()}
        except Exception as error:
            found = {"error": reason(error)}
        os.write(writable, json.dumps(found).encode())  # a pipe takes 64 KiB at once
    finally:
        os._exit(0)


def _read_all(readable: int, stop: Flag, patience: float) -> bytes:
    """Return the output of the child process. Raises TimeoutError."""
    answer = b""
    while len(answer) < ANSWER_MAX:
        if not stop.wait_for(readable, select.POLLIN, patience):
            raise _no_answer(patience)
        part = os.read(readable, ANSWER_MAX)
        if not part:
            break
        answer += part
    return answer
