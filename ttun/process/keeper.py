"""The keeper: a small process that keeps the privileges that the program drops, for fixed jobs.

 1. Keeper.start(), before privileges are dropped, and only where something needs it: the program
    starts a fresh Python, as the memory of a fork may hold the pre-shared key.
 2. The keeper reads its Plan from the program, which is still privileged: commands, users, what to
    do at the end. It takes no other command and no path. Before that, Keeper.hold() has waited for
    the keeper of a killed program, if the device had one: --up comes after the last --down.
 3. The program drops its privileges. From then on the keeper takes requests alone, one message of
    a socketpair each: ``up``, ``down``, ``dial``, ``hangup``, ``background``; some with facts. It
    checks each fact by its form and refuses everything else. It restores the rules of the default
    route without a request.
 4. The socketpair ends with the program, however that ends. Then the keeper ends its commands, runs
    --down for a session that has begun, does what the Plan has for the end, and ends itself.

A message is UTF-8: ``request NUL name=value NUL name=value``. An answer, to ``dial`` alone, is
``number NUL errno NUL reason``; with errno 0 two descriptors come with it (SCM_RIGHTS).

What ends each wait: the start START seconds, a dial DIAL, the end AT_END (a SIGALRM in the keeper).
Sources: unix(7), tcsetpgrp(3), setpgid(2), alarm(2).
"""

from __future__ import annotations

import array
import atexit
import contextlib
import errno
import functools
import logging
import os
import pwd
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any, Callable, NamedTuple

from ttun import privileges
from ttun.errors import TtunError, printable, reason
from ttun.flag import Flag
from ttun.privileges import User
from ttun.process import log_writer, process_group, syslog
from ttun.process.signals import ENDING, ENDING_LATER

log = logging.getLogger("ttun")

START, DIAL, AT_END = 30.0, 10.0, 30  # seconds
SOON = 0.2  # seconds that a keeper has to hang up
MOST = 4096  # bytes of a message
LOST = "the keeper process ended"
KEPT = ("PATH", "SSH_AUTH_SOCK", "TERM", "LANG", "LC_ALL")  # of our environment, for --via
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
LOGGED = ("JOURNAL_STREAM", syslog.VARIABLE)  # the same for the keeper's own log, as is
ZONE = "TZ"  # which --up and --down get too
# By the keeper: what ends the program, SIGABRT being that of a service manager's watchdog.
IGNORED = (*ENDING, *ENDING_LATER, signal.SIGABRT, signal.SIGUSR1)
RECEIVED = socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT

START_CODE = """import sys
sys.excepthook = lambda kind, why, _: print("ttun: keeper:", kind.__name__, why, file=sys.stderr)
own = sys.path[:]
sys.path[:] = {}
from ttun.process.keeper_process import main
main({}, own)"""

# The facts that a program may tell. What stays the same (device, addresses) is in the Plan.
NO_PEER = re.compile(r"[^\w.:%@/\[\]+ -]", re.ASCII)  # not in its name: what a shell acts on
FORMS = {
    "peer": re.compile(NO_PEER.pattern.replace("[^", "[", 1) + "{0,255}", re.ASCII),
    "transport": re.compile(r"[a-z0-9-]{0,16}"),
    "wire": re.compile(r"(v1|x1)?"),
    "cipher": re.compile(r"[a-z0-9-]{0,32}"),
    "reason": re.compile(r".{0,256}"),
    "number": re.compile(r"[0-9]{1,9}"),
    "host": re.compile(r"([A-Za-z0-9.:_%][A-Za-z0-9.:_%-]{0,254})?"),
    "port": re.compile(r"([1-9][0-9]{0,4})?"),
}
SESSION = ("peer", "transport", "wire", "cipher", "reason")
REQUESTS: dict[str, tuple[str, ...]] = {
    "up": SESSION,
    "down": SESSION,
    "dial": ("number", "host", "port"),
    "hangup": (),
    "background": (),
}

Facts = Mapping[str, "str | None"]  # name without ``TTUN_`` in front, in lower case -> value


class Via(NamedTuple):
    """The command that carries a connection, and as whom it runs."""

    command: str  # for /bin/sh; %h and %p are the host and the port of a dial, %% is %
    user: User | None  # None: as the user that the keeper is
    environment: dict[str, str]
    confined: bool  # without capabilities and set-user-ID programs
    foreground: bool  # it has the terminal until background() is called


def via(command: str, user: User | None, *, foreground: bool = True) -> Via:
    """Return a command as it is to run: as the user who called sudo(8), else as user, else as now.

    user: whom the program becomes.
    """
    caller = os.environ.get("SUDO_UID", "")
    is_caller = os.geteuid() == 0 and caller.isdecimal() and int(caller) != 0
    if is_caller:
        found = privileges.find_user(caller)
        assert found is not None
        group = os.environ.get("SUDO_GID", "")
        user = found._replace(gid=int(group)) if group.isdecimal() else found
    elif user is not None and not privileges.may_become(user):
        user = None
    uid = os.geteuid() if user is None else user.uid
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        entry = pwd.struct_passwd((str(uid), "", uid, uid, "", "/", "/bin/sh"))
    environment = {name: os.environ[name] for name in KEPT if name in os.environ}
    environment.update(HOME=entry.pw_dir, USER=entry.pw_name, LOGNAME=entry.pw_name)
    environment["SHELL"] = entry.pw_shell
    return Via(command, user, environment, not is_caller, foreground)


class Plan(NamedTuple):
    """All that a keeper does, as the program says while it has its privileges."""

    hooks: Callable[[], Any] | None  # Hooks of commands/hooks.py
    facts: dict[str, str]  # those that stay the same
    via: Via | None
    rules: Callable[[], Any] | None  # RuleKeeper of network/default_route.py
    at_end: list[Callable[[], object]]
    held: int | None  # the socket that has the keeper's name
    level: int  # of the log


class Keeper:
    """The program's side. Set hooks, via, rules and at_end, then start()."""

    def __init__(self) -> None:
        """Need nothing yet."""
        self.hooks: Callable[[], Any] | None = None  # makes Hooks, which run --up and --down
        self.via: Via | None = None
        self.rules: Callable[[], Any] | None = None  # makes a RuleKeeper
        # Called in the keeper in this order, whatever the ones before it raise. Pickled: functions
        # of modules, functools.partial of them.
        self.at_end: list[Callable[[], object]] = []
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._held: socket.socket | None = None
        self._is_ready = self._is_awaited = False
        self._number = 0  # of a dial

    def hold(self, device: str) -> None:
        """Be the only keeper of an open device: wait for that of a killed program to end.

        AT_END at most. A keeper has the name as long as it runs, in its network namespace. While
        its program is there, its device was renamed: then it hangs up at once.
        """
        name = f"\0ttun-keeper-{device}"
        with contextlib.suppress(OSError), contextlib.ExitStack() as failed:
            held = failed.enter_context(socket.socket(socket.AF_UNIX))
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as earlier:
                earlier.setblocking(False)
                earlier.connect(name)
                peer = earlier.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
                _, user, _ = struct.unpack("3i", peer)  # struct ucred
                if user in (0, os.geteuid()):  # else anybody's
                    watch = select.poll()
                    watch.register(earlier, 0)  # for its end
                    if not watch.poll(1000 * SOON):
                        log.info("waiting for the keeper process of a killed ttun")
                        watch.poll(1000 * (AT_END + 1))
            held.bind(name)
            held.listen()
            failed.pop_all()
            self._held = held

    def start(self, facts: Facts, entry: tuple[str, int] | None = None) -> None:
        """Start the process, if anything needs it, and wait until it is ready. Raises TtunError.

        facts: what --up and --down get each time; of a session's nothing is taken. entry: a name
        and the directory that it is in (a descriptor), to be removed at the end. Call it while
        there is no thread, before privileges are dropped.
        """
        with self._held or contextlib.nullcontext() as held:
            if self.hooks or self.via or self.at_end:
                self._make_ready(facts, entry, held)

    def _make_ready(
        self, facts: Facts, entry: tuple[str, int] | None, held: socket.socket | None
    ) -> None:
        passed = [held.fileno()] if held else []
        fixed = {name: value or "" for name, value in facts.items() if name not in SESSION}
        at_end = [*self.at_end]
        if entry is not None:
            at_end.insert(0, functools.partial(os.unlink, entry[0], dir_fd=entry[1]))
            passed.append(entry[1])
        import pickle  # by a program that needs a keeper only: it takes a while to load

        name = held.fileno() if held else None
        plan = pickle.dumps(Plan(self.hooks, fixed, self.via, self.rules, at_end, name, log.level))
        try:
            self._start(plan, passed)
            answer = self._receive(time.monotonic() + START, Flag())[0]
        except OSError as error:
            self.close()
            raise TtunError(f"cannot start the keeper process: {reason(error)}") from None
        if answer:
            self.close()
            raise TtunError(answer)
        self._is_ready = True

    def _start(self, plan: bytes, passed: list[int]) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            code = START_CODE.format(sys.path, theirs.fileno())
            kept = {name: os.environ[name] for name in (*LOGGED, ZONE) if name in os.environ}
            # What is typed at a terminal reaches the keeper too: not before it ignores that.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)
            try:
                self._process = process_group.start(
                    [sys.executable, "-IB", "-c", code],
                    env={"PATH": PATH, **kept},
                    stdin=subprocess.PIPE,
                    stdout=log_writer.STDERR,
                    pass_fds=[theirs.fileno(), *passed],
                )
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        atexit.register(self.close)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:
            stdin.write(plan)

    def up(self, facts: Facts) -> None:
        """A peer connected: run --up."""
        self._tell("up", facts)

    def down(self, facts: Facts) -> None:
        """It disconnected: run --down."""
        self._tell("down", facts)

    def dial(self, host: str, port: str, stop: Flag) -> tuple[socket.socket, int]:
        """Run the command of --via; return its standard input and output, and a pipe of its stderr.

        host, port: for %h and %p, or empty. The command of the dial before ends. Raises OSError
        with the reason if it cannot be started, InterruptedError when stop was set.
        """
        self._number += 1
        facts = {"number": str(self._number), "host": host, "port": port}
        try:
            parse(_message("dial", facts))  # which tells us why the keeper would refuse it
        except ValueError as error:
            raise OSError(errno.EINVAL, f"cannot dial: {error}") from None
        self._send("dial", facts)
        deadline = time.monotonic() + DIAL
        while True:
            answer, descriptors = self._receive(deadline, stop)
            number, _, rest = answer.partition("\0")
            number_of_error, _, why = rest.partition("\0")
            if number == str(self._number):
                break
            _close(descriptors)  # of a dial that was given up
        if len(descriptors) != 2:
            _close(descriptors)
            code = int(number_of_error) or errno.EMFILE  # the kernel found no room for them here
            raise OSError(code, why or os.strerror(code))
        return socket.socket(fileno=descriptors[0]), descriptors[1]

    def hang_up(self) -> None:
        """End the command of the last dial, and all its processes."""
        self._tell("hangup", {})

    def background(self) -> None:
        """Give the terminal back to the program, for good: the peer is connected."""
        self._tell("background", {})

    def close(self) -> None:
        """Have the keeper end its commands, tidy up and end; wait for that, AT_END at most."""
        atexit.unregister(self.close)
        sock, self._socket = self._socket, None
        if sock is not None:
            sock.close()
        if self._process is not None and not self._is_awaited:
            self._is_awaited = True
            try:
                code = self._process.wait(AT_END + 1)
                if code and self._is_ready:
                    how = process_group.how_it_ended(code)
                    log.warning("%s: %s (its rules and status socket may be left)", LOST, how)
            except subprocess.TimeoutExpired:
                log.warning("the keeper process did not end within %d s", AT_END)

    def _tell(self, request: str, facts: Facts) -> None:
        with contextlib.suppress(OSError):
            self._send(request, {name: facts[name] for name in REQUESTS[request] if name in facts})

    def _send(self, request: str, facts: Facts) -> None:
        """Send a request. Raises OSError."""
        if self._socket is None:
            raise self._lost()
        try:
            self._socket.send(_message(request, facts), socket.MSG_DONTWAIT)
        except BlockingIOError:
            log.warning("the keeper process is busy: skipped %s", request)
            raise
        except OSError:
            raise self._lost() from None

    def _receive(self, deadline: float, stop: Flag) -> tuple[str, list[int]]:
        """Return an answer and the descriptors that came with it. Raises OSError."""
        assert self._socket is not None
        left = deadline - time.monotonic()
        if not stop.wait_for(self._socket.fileno(), select.POLLIN, left):
            raise TimeoutError(errno.ETIMEDOUT, "the keeper process does not answer")
        try:
            answer, came, _, _ = self._socket.recvmsg(MOST, socket.CMSG_LEN(8), RECEIVED)
        except OSError:
            answer, came = b"", []
        if not answer:
            raise self._lost()
        descriptors = array.array("i", b"".join(data for _, _, data in came))
        return answer.decode().rstrip("\n"), descriptors.tolist()

    def _lost(self) -> OSError:
        """Note that the keeper has ended; without privileges there cannot be another."""
        sock, self._socket = self._socket, None
        if sock is not None:
            sock.close()
            if self._is_ready:
                log.error("%s: no more --up, --down and --via (restart ttun)", LOST)
        return BrokenPipeError(errno.EPIPE, LOST)


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _message(request: str, facts: Facts) -> bytes:
    """Return a request as it is sent."""
    parts = [request]
    for name, value in facts.items():
        text = printable(value or "")[:256]
        parts.append(f"{name}={NO_PEER.sub('_', text)[:255] if name == 'peer' else text}")
    return "\0".join(parts).encode()


def parse(data: bytes) -> tuple[str, dict[str, str]]:
    """Return what a message asks for, and the facts in it. Raises ValueError."""
    if len(data) > MOST:
        raise ValueError("too long")
    request, *parts = data.decode("utf-8").split("\0")  # UnicodeDecodeError is a ValueError
    if request not in REQUESTS:
        raise ValueError("unknown request")
    facts = {}
    for part in parts:
        name, equals, value = part.partition("=")
        if name not in REQUESTS[request] or not equals or name in facts:
            raise ValueError(f"unexpected fact for {request}")
        if not FORMS[name].fullmatch(value) or not value.isprintable():
            raise ValueError(f"malformed {name}")
        facts[name] = value
    if int(facts.get("port") or 0) > 65535:
        raise ValueError("malformed port")
    return request, facts
