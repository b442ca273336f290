"""The keeper: a small process that keeps the privileges that the program drops, for fixed jobs.

 1. Keeper.start(), before privileges are dropped, and only where something needs it: the program
    starts a fresh Python. A fork would do but for its memory, which may hold the pre-shared key.
 2. The keeper reads its Plan from the program, which is still privileged: commands, users, what to
    do at the end. It takes no other command and no path.
 3. The program drops its privileges. From then on the keeper takes requests alone, one message of
    a socketpair each: ``up``, ``down``, ``dial``, ``hangup``, ``background``, and facts. It checks
    each fact by its form and refuses everything else.
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
import pickle
import pwd
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from types import FrameType
from typing import Any, Callable, NamedTuple

from ttun import privileges
from ttun.errors import TtunError, printable, reason
from ttun.privileges import User
from ttun.process import log_writer, process_group
from ttun.process.process_group import ProcessGroup
from ttun.summary import Summary

log = logging.getLogger("ttun")

START, DIAL, AT_END = 30.0, 10.0, 30  # seconds
MOST = 4096  # bytes of a message
LOST = "the keeper process ended"
KEPT = ("PATH", "SSH_AUTH_SOCK", "TERM", "LANG", "LC_ALL")  # of our environment, for --via
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
IGNORED = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGQUIT, signal.SIGUSR1)
RECEIVED = socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
ENDED = select.POLLHUP | select.POLLRDHUP | select.POLLERR
START_CODE = """import sys
sys.excepthook = lambda kind, why, _: print("ttun: keeper:", kind.__name__, why, file=sys.stderr)
sys.path[:] = {}
from ttun.process.keeper import main
main({})"""

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

Facts = Mapping[str, "str | None"]


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
    at_end: list[Callable[[], object]]


class Keeper:
    """The program's side. Set hooks, via and at_end, then start()."""

    def __init__(self) -> None:
        """Need nothing yet."""
        self.hooks: Callable[[], Any] | None = None  # makes Hooks, which run --up and --down
        self.via: Via | None = None
        # Called in the keeper in this order, whatever the ones before it raise. Pickled: functions
        # of modules, functools.partial of them.
        self.at_end: list[Callable[[], object]] = []
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._is_ready = False
        self._number = 0  # of a dial

    def start(self, facts: Facts, entry: tuple[str, int] | None = None) -> None:
        """Start the process, if anything needs it, and wait until it is ready. Raises TtunError.

        facts: what --up and --down get each time; of a session's nothing is taken. entry: a name
        and the directory that it is in (a descriptor), to be removed at the end. Call it while
        there is no thread, before privileges are dropped.
        """
        if not (self.hooks or self.via or self.at_end):
            return
        fixed = {name: value or "" for name, value in facts.items() if name not in SESSION}
        at_end, passed = [*self.at_end], []
        if entry is not None:
            at_end.insert(0, functools.partial(os.unlink, entry[0], dir_fd=entry[1]))
            passed = [entry[1]]
        plan = pickle.dumps(Plan(self.hooks, fixed, self.via, at_end))
        try:
            self._start(plan, passed)
            answer = self._receive(time.monotonic() + START, 0)[0]
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
            # What is typed at a terminal reaches the keeper too: not before it ignores that.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)
            try:
                self._process = process_group.start(
                    [sys.executable, "-IB", "-c", code],
                    env={"PATH": PATH},
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

    def dial(self, host: str, port: str) -> tuple[socket.socket, int]:
        """Run the command of --via; return its standard input and output, and a pipe of its stderr.

        host, port: for %h and %p, or empty. The command of the dial before ends. Raises OSError
        with the reason if it cannot be started.
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
            answer, descriptors = self._receive(deadline, 2)
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
        if self._process is not None:
            try:
                self._process.wait(AT_END + 1)
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

    def _receive(self, deadline: float, most: int) -> tuple[str, list[int]]:
        """Return an answer and the descriptors that came with it. Raises OSError."""
        assert self._socket is not None
        watch = select.poll()
        watch.register(self._socket, select.POLLIN)
        if not watch.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError(errno.ETIMEDOUT, "the keeper process does not answer")
        descriptors = array.array("i")
        try:
            data, came, _, _ = self._socket.recvmsg(
                MOST, socket.CMSG_LEN(most * descriptors.itemsize), RECEIVED
            )
        except OSError:
            data, came = b"", []
        for _, _, each in came:
            descriptors.frombytes(each[: len(each) // descriptors.itemsize * descriptors.itemsize])
        if not data:
            raise self._lost()
        return data.decode().rstrip("\n"), list(descriptors)

    def _lost(self) -> OSError:
        """Note that the keeper is gone; it cannot be had again without privileges."""
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


# ---- the process ----


def main(descriptor: int) -> None:
    """Be the keeper, on a socket that the program has the other end of."""
    for number in IGNORED:
        signal.signal(number, _note)  # a handler, as what is ignored stays so in its commands
    signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGTTOU})  # to set the terminal's group
    os.environ.pop("LC_CTYPE", None)  # Python's own, see PEP 538
    log_writer.install()
    control = socket.socket(fileno=descriptor)
    try:
        plan = pickle.loads(sys.stdin.buffer.read())
        privileges.forbid_dumps()
        log_writer.start()
        servant = Servant(plan, control)
        control.send(b"\n")
    except Exception as error:  # the program may be gone too
        with contextlib.suppress(OSError):
            control.send(f"keeper: {reason(error)}".encode())
        return
    try:
        servant.serve()
    finally:
        signal.alarm(AT_END)  # whatever hangs: the default action ends the process
        servant.close()
        log_writer.finish()


def _note(_: int, __: FrameType | None) -> None:
    """Do nothing."""


class Servant:
    """Does what requests ask for, on the keeper's main thread."""

    def __init__(self, plan: Plan, control: socket.socket) -> None:
        """Start the thread of --up and --down. Raises TtunError."""
        self._plan, self._control = plan, control
        self._hooks = plan.hooks() if plan.hooks else None
        self._session: Facts | None = None
        self._dialled = Dialled(plan.via) if plan.via else None
        self._noted = Summary("keeper: and %d more lines")
        if self._hooks:
            self._hooks.start()

    def serve(self) -> None:
        """Serve requests until the program has ended."""
        watch = select.poll()
        watch.register(self._control, select.POLLIN | select.POLLRDHUP)
        while True:
            events = watch.poll(self._dialled.tick() if self._dialled else None)
            try:
                if self._dialled and (line := self._dialled.tend()):
                    self._say(line)
                if not events:
                    continue
                data = self._control.recv(MOST + 1, socket.MSG_DONTWAIT)
                if not data and events[0][1] & ENDED:
                    return
                self._do(data)
            except (BrokenPipeError, ConnectionResetError):
                return
            except ValueError as error:
                self._say(f"keeper: refused a request: {error}")
            except Exception as error:  # a lack, or a bug: the next request may have better luck
                self._say(f"keeper: {type(error).__name__}: {reason(error)}")
                time.sleep(process_group.TICK)

    def close(self) -> None:
        """End what runs, then do what the plan has for the end."""
        if self._hooks:
            self._hooks.close()
        steps = [self._dialled.hang_up] if self._dialled else []
        for step in [*steps, *self._plan.at_end]:
            try:
                step()
            except FileNotFoundError:
                pass  # the program has done it
            except Exception as error:
                log.warning("keeper: at the end: %s", reason(error))
        self._noted.tick(time.monotonic(), end=True)

    def _say(self, line: str) -> None:
        self._noted.log(time.monotonic(), "%s", printable(line))

    def _do(self, data: bytes) -> None:
        """Do what a message asks for. Raises ValueError for what is no request."""
        request, facts = parse(data)
        if request == "dial":
            self._dial(facts)
        elif request == "hangup" and self._dialled:
            self._dialled.hang_up()
        elif request == "background" and self._dialled:
            self._dialled.background()
        elif request in ("up", "down") and self._hooks:
            if self._session is not None:
                self._hooks.down({**self._session, **facts, **self._plan.facts})
            self._session = {**facts, **self._plan.facts} if request == "up" else None
            if self._session is not None:
                self._hooks.up(self._session)
        else:
            raise ValueError(f"nothing to do for {request}")

    def _dial(self, facts: Mapping[str, str]) -> None:
        number, host, port = (facts.get(name, "") for name in ("number", "host", "port"))
        with contextlib.ExitStack() as opened:
            descriptors: list[int] = []
            try:
                if self._dialled is None:
                    raise OSError(errno.ENOSYS, "there is no --via")
                descriptors = self._dialled.dial(host, port, opened)
                answer = f"{number}\0000\0"
            except (OSError, subprocess.SubprocessError) as error:
                answer = f"{number}\0{getattr(error, 'errno', None) or errno.EIO}\0{reason(error)}"
            try:
                flags = socket.MSG_DONTWAIT
                socket.send_fds(self._control, [answer.encode()], descriptors, flags)
            except BlockingIOError:  # the program takes no answers
                if self._dialled:
                    self._dialled.hang_up()


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


class Dialled:
    """The command of --via: one process group at a time, in the terminal's session."""

    def __init__(self, via: Via) -> None:
        """Find the terminal, if there is one."""
        self._via = via
        self._group: ProcessGroup | None = None
        self._terminal: int | None = None
        self._program = os.getppid()
        if via.foreground:
            with contextlib.suppress(OSError):
                self._terminal = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)

    def dial(self, host: str, port: str, opened: contextlib.ExitStack) -> list[int]:
        """Start the command; return its standard input and output, and a pipe of its stderr.

        opened: closes these. Raises OSError, SubprocessError.
        """
        self.hang_up()
        values = {"%h": host, "%p": port, "%%": "%"}
        command = re.sub("%[hp%]", lambda found: values[found[0]], self._via.command)
        ours, theirs = (opened.enter_context(each) for each in socket.socketpair())
        readable, writable = os.pipe()
        opened.callback(os.close, readable)
        opened.callback(os.close, writable)
        self._group = ProcessGroup(
            command,
            {
                os.fsencode(name): os.fsencode(value)
                for name, value in self._via.environment.items()
            },
            log.info,
            stdin=theirs,
            stdout=theirs,
            stderr=writable,
            preexec_fn=self._prepare,
            **process_group.becoming(self._via.user),
        )
        return [ours.fileno(), readable]

    def _prepare(self) -> None:
        """Be a process group, in the foreground if the program is there; in the new process.

        Popen can do the first from Python 3.11 on. Nothing here takes a lock of another thread.
        """
        terminal = self._terminal
        with contextlib.suppress(OSError):
            if terminal is not None and os.tcgetpgrp(terminal) == os.getpgrp():
                os.setpgid(0, 0)
                os.tcsetpgrp(terminal, os.getpid())
        os.setpgid(0, 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        if self._via.confined:
            privileges.drop_capabilities()

    def tick(self) -> float | None:
        """Return in how many milliseconds to call tend(), if at all."""
        if self._group is None:
            return None
        return 1000.0 if self._terminal is None else 1000 * process_group.TICK

    def tend(self) -> str:
        """Look whether the command is over; return a line about it if it failed."""
        if self._group is None or not self._group.wait(0):
            return ""
        code = self._group.code or 0
        is_foreground = self._terminal is not None
        self.hang_up()
        # Who typed that meant the program, which is not in the foreground.
        if is_foreground and code in (-signal.SIGINT, 128 + signal.SIGINT):
            if os.getppid() == self._program:
                os.kill(self._program, signal.SIGINT)
            return ""
        if code:
            return f"--via: {process_group.how_it_ended(code)}"
        return ""

    def hang_up(self) -> None:
        """End the command's processes."""
        group, self._group = self._group, None
        if group is not None:
            self._give_back(group)
            process_group.end([group])

    def background(self) -> None:
        """Give the terminal back, for good."""
        if self._group is not None:
            self._give_back(self._group)
        if self._terminal is not None:
            os.close(self._terminal)
            self._terminal = None

    def _give_back(self, group: ProcessGroup) -> None:
        with contextlib.suppress(OSError):
            if self._terminal is not None and os.tcgetpgrp(self._terminal) == group.number:
                os.tcsetpgrp(self._terminal, os.getpgrp())
