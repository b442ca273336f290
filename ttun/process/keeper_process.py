"""The keeper process itself: keeper.py starts it, and says what it is for.

 1. main() sees to its signals and its log, and reads the Plan from standard input.
 2. Servant waits for requests, for the end of the command of --via and for removed rules, on the
    main thread. --up and --down have a thread of their own (commands/hooks.py).
 3. Dialled runs the command of --via. ssh asks for a password on /dev/tty, and a process of another
    session cannot open that. So until background() the command stays in the terminal's session, in
    a process group of its own that is the foreground one.

Sources: tcsetpgrp(3), setpgid(2), termios(4) for SIGTTOU, alarm(2), PEP 538.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import pickle
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from ttun import privileges
from ttun.errors import TtunError, printable, reason
from ttun.process import log_writer, process_group, syslog
from ttun.process.keeper import AT_END, IGNORED, LOGGED, MOST, Facts, Plan, Via, parse
from ttun.process.process_group import ProcessGroup
from ttun.summary import Summary

log = logging.getLogger("ttun")

PAUSE = 0.001  # seconds after a connection, which any user may make: a flood costs no core


def main(descriptor: int, path: list[str]) -> None:
    """Be the keeper, on a socket that the program has the other end of.

    path: sys.path from then on. That of the program may have a directory which others can write to.
    """
    for number in IGNORED:
        signal.signal(number, _note)  # a handler, as what is ignored stays so in its commands
    signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGTTOU})  # to set the terminal's group
    log_writer.install()
    syslog.log_to_syslog_if_wanted()
    for name in ("LC_CTYPE", *LOGGED):  # the first is Python's own, see PEP 538
        os.environ.pop(name, None)  # commands get none of them
    privileges.forbid_dumps()
    log_writer.start()
    plan = pickle.loads(sys.stdin.buffer.read())
    log.setLevel(plan.level or logging.INFO)  # 0: a program that embeds ttun set none
    sys.path[:] = path
    servant = Servant(plan, socket.socket(fileno=descriptor))
    try:
        servant.serve()
    finally:
        # systemd sends it to all that a killed unit left; --down, a shell, inherits this
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(AT_END)  # whatever hangs: the default action ends the process
        servant.close()
        log_writer.finish()


def _note(_: int, __: FrameType | None) -> None:
    """Do nothing."""


class Servant:
    """Does what requests ask for, on the keeper's main thread."""

    def __init__(self, plan: Plan, control: socket.socket) -> None:
        """Start nothing yet."""
        self._plan, self._control = plan, control
        self._hooks = plan.hooks() if plan.hooks else None
        self._rules: Any = None  # a RuleKeeper
        self._held = None if plan.held is None else socket.socket(fileno=plan.held)
        self._session: Facts | None = None
        self._index = 0
        with contextlib.suppress(OSError):
            self._index = socket.if_nametoindex(plan.facts.get("device", ""))
        self._noted = Summary("keeper: and %d more lines")
        self._dialled = Dialled(plan.via, self._say) if plan.via else None

    def serve(self) -> None:
        """Say that it is ready, or why it is not; serve requests until the program has ended."""
        answer = "\n"
        try:
            if self._hooks:
                self._hooks.start()
            if self._plan.rules:
                self._rules = self._plan.rules()
        except TtunError as error:
            answer = str(error)
        watch = select.poll()
        watch.register(self._control, select.POLLIN | select.POLLRDHUP)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._control.send(answer.encode())
            if self._rules is not None:
                watch.register(self._rules.fileno(), select.POLLIN)
            if self._held is not None:
                watch.register(self._held, select.POLLIN)
            while self._serve(dict(watch.poll(self._patience()))):
                pass

    def _patience(self) -> float | None:
        """Return for how many milliseconds there is nothing to do, unless something happens."""
        found = [self._dialled.tick()] if self._dialled else []
        if self._rules and self._rules.due is not None:
            found.append(1000 * max(0.0, self._rules.due - time.monotonic()))
        return min((each for each in found if each is not None), default=None)

    def _serve(self, events: dict[int, int]) -> bool:
        """Do what is due; return whether the program is there."""
        try:
            if self._dialled:
                self._dialled.tend()
            if what := events.get(self._control.fileno()):
                data = self._control.recv(MOST + 1, socket.MSG_DONTWAIT)
                if not data and what != select.POLLIN:
                    return False
                self._do(data)
            if self._held is not None and self._held.fileno() in events:
                self._held.accept()[0].close()  # see Keeper.hold()
                time.sleep(PAUSE)
            if self._rules and (restored := self._rules.tend(time.monotonic())):
                self._say(f"restored rules that another program removed: {', '.join(restored)}")
        except (BrokenPipeError, ConnectionResetError):
            raise
        except ValueError as error:
            self._say(f"keeper: refused a request: {error}")
        except Exception as error:  # a lack, or a bug: the next request may have better luck
            self._say(f"keeper: {type(error).__name__}: {reason(error)}")
            time.sleep(process_group.TICK)
        return True

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
        if request in ("up", "down") and self._hooks:
            if self._session is not None:
                self._hooks.down({**self._session, **facts, **self._fixed()})
            self._session = None
            if request == "up":
                self._session = {**facts, **self._fixed()}
                self._hooks.up(self._session)
        elif request == "dial" and self._dialled:
            self._dial(self._dialled, **facts)
        elif request == "hangup" and self._dialled:
            self._dialled.hang_up()
        elif request == "background" and self._dialled:
            self._dialled.background()
        else:
            raise ValueError(f"nothing to do for {request}")

    def _fixed(self) -> Facts:
        """Return the facts of the plan; the device may have been renamed."""
        with contextlib.suppress(OSError):  # or removed
            self._plan.facts["device"] = socket.if_indextoname(self._index)
        return self._plan.facts

    def _dial(self, dialled: Dialled, number: str = "", host: str = "", port: str = "") -> None:
        with contextlib.ExitStack() as opened:
            descriptors: list[int] = []
            try:
                descriptors = dialled.dial(host, port, opened)
                answer = f"{number}\0000\0"
            except (OSError, subprocess.SubprocessError) as error:
                answer = f"{number}\0{getattr(error, 'errno', None) or errno.EIO}\0{reason(error)}"
            try:
                socket.send_fds(self._control, [answer.encode()], descriptors, socket.MSG_DONTWAIT)
            except BlockingIOError:  # the program takes no answers
                dialled.hang_up()


class Dialled:
    """The command of --via: one process group at a time, in the terminal's session."""

    def __init__(self, via: Via, say: Callable[[str], None]) -> None:
        """Find the terminal, if there is one. say: called with a line for the log."""
        self._via, self._say = via, say
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
            self._via.environment,
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

        Elsewhere without a terminal: what asks for a password there fails, and is not stopped.
        Nothing here takes a lock of another thread.
        """
        terminal = self._terminal
        is_ours = False
        with contextlib.suppress(OSError):
            is_ours = terminal is not None and os.tcgetpgrp(terminal) == os.getpgrp()
        if terminal is None or not is_ours:
            os.setsid()
        else:
            os.setpgid(0, 0)
            with contextlib.suppress(OSError):
                os.tcsetpgrp(terminal, os.getpid())
            # Whoever stopped it would be left with a terminal that nobody reads.
            signal.signal(signal.SIGTSTP, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        if self._via.confined:
            privileges.drop_capabilities()

    def tick(self) -> float | None:
        """Return in how many milliseconds to call tend(), if at all."""
        if self._group is None:
            return None
        return 1000.0 if self._terminal is None else 1000 * process_group.TICK

    def tend(self) -> None:
        """If the command has ended, end the rest of its group."""
        if self._group is not None and self._group.wait(0):
            self.hang_up()

    def hang_up(self) -> None:
        """End the command's processes, and say how it ended if it did so by itself."""
        group, self._group = self._group, None
        if group is None:
            return
        self._give_back(group)
        # The program may know of the end before this process does.
        code = group.code if group.wait(process_group.TICK) else 0
        process_group.end([group])
        # Whoever typed ^C meant the program, which did not have the foreground.
        if self._terminal is not None and code in (-signal.SIGINT, 128 + signal.SIGINT):
            if os.getppid() == self._program:
                os.kill(self._program, signal.SIGINT)
        elif code:
            self._say(f"--via: {process_group.how_it_ended(code)}")

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
