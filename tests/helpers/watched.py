"""A real device on a host, and a DeviceWatch on its own thread, driven like in an endpoint."""

from __future__ import annotations

import logging
import os
import queue
import re
import select
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Callable

from tunnel import enter_namespace, eventually

from ttun import privileges
from ttun.device import Device
from ttun.lab import netns
from ttun.settings import SERVER, Addresses
from ttun.settings import parse_network as parse
from ttun.watch.device_watch import DeviceWatch

log = logging.getLogger("ttun")


class Watched(logging.Handler):
    """Context manager. privileged: the thread keeps its capabilities."""

    def __init__(
        self,
        namespace: str,
        *routes: str,
        addresses: Addresses = SERVER,
        mtu: int = 1280,
        privileged: bool = False,
    ) -> None:
        super().__init__(logging.INFO)
        self.namespace, self.privileged = namespace, privileged
        self.how: Any = (addresses, mtu, False, "ttun%d", [parse(route) for route in routes])
        self.lines: list[str] = []
        self.calls: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self.failed: list[BaseException] = []
        self.over = threading.Event()
        self.ready = threading.Event()
        self.looks = 0
        self.cpu = 0.0  # seconds of the thread so far
        self.longest = 0.0  # CPU seconds of one look()
        self.thread = threading.Thread(target=self.run, daemon=True)

    def __enter__(self) -> Watched:
        self.level_before = log.level
        log.setLevel(logging.INFO)
        log.addHandler(self)
        self.readable, self.writable = os.pipe()
        self.thread.start()
        assert self.ready.wait(20)
        if self.failed:
            self.__exit__(None)
            raise self.failed[0]
        return self

    def __exit__(self, *what: object) -> None:
        self.over.set()
        os.write(self.writable, b"x")
        self.thread.join(20)
        log.removeHandler(self)
        log.setLevel(self.level_before)
        os.close(self.readable)
        os.close(self.writable)
        assert not self.thread.is_alive()
        if what[0] is None:
            assert not self.failed, self.failed

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self.thread.ident:
            self.lines.append(record.getMessage())

    def run(self) -> None:
        try:
            enter_namespace(self.namespace)
            self.device = Device(*self.how)
            self.watch = DeviceWatch(self.device)
            if not self.privileged:
                privileges.drop_capabilities()
            self.ready.set()
            while not self.over.is_set():
                wait = min(1.0, max(0.0, self.watch.due - time.monotonic()))
                descriptors = [self.readable, self.watch.fileno()]
                ready = select.select([x for x in descriptors if x >= 0], [], [], wait)[0]
                if self.readable in ready:
                    os.read(self.readable, 100)
                while not self.calls.empty():
                    self.calls.get()()
                before = time.thread_time()
                self.watch.look(time.monotonic())
                self.longest = max(self.longest, time.thread_time() - before)
                self.looks += 1
                self.cpu = time.thread_time()
            self.watch.close()
            self.device.close()
        except BaseException as error:
            self.failed.append(error)
        finally:
            self.ready.set()

    def call(self, function: Callable[[], object]) -> None:
        """Call a function on the thread, and wait for it."""
        done = threading.Event()

        def run() -> None:
            try:
                function()
            finally:
                done.set()

        self.calls.put(run)
        os.write(self.writable, b"x")
        assert done.wait(20)

    def ip(self, *arguments: str) -> str:
        return netns.ip("-n", self.namespace, *arguments)

    def shell(self, command: str) -> None:
        netns.ip("netns", "exec", self.namespace, "sh", "-c", command)

    def misses(self, *words: str, seconds: float = 10) -> None:
        """Wait until exactly this is missing."""
        eventually(
            lambda: self.watch.missing == list(words),
            f"{list(words)}, but there is {self.watch.missing}",
            seconds,
        )

    def says(self, text: str, seconds: float = 10) -> str:
        """Wait until the log has a line with text; return the last one that has."""
        found = eventually(
            lambda: [line for line in self.lines if text in line],
            f"{text!r} in {self.lines}",
            seconds,
        )
        return found[-1]

    def do_what_it_says(self) -> None:
        """Run the commands of the last log line."""
        for command in commands(self.lines[-1]):
            self.shell(command)


def commands(line: str) -> list[str]:
    """The commands in a log line."""
    found = re.search(r"\(to restore: (.*); or restart ttun\)", line)
    assert found, line
    named = found[1].split("; ")
    assert all(command.startswith("sudo ") for command in named), line
    return [command.removeprefix("sudo ") for command in named]


@contextmanager
def flood(namespace: str, changes: Iterable[str]) -> Iterator[None]:
    """Run ip commands on the server's host in a loop, as fast as possible."""
    text = "".join(f"{change}\n" for change in changes)
    script = 'while :; do printf %s "$0" | ip -force -batch - > /dev/null 2>&1; done'
    command = ["ip", "netns", "exec", namespace, "sh", "-c", script, text]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for left in (
            "route flush root 10.0.0.0/8 dev vserver",
            "route flush 203.0.113.0/24 dev vserver",
            "address flush to 10.99.0.0/16 dev vserver",
        ):
            netns.ip("-n", namespace, *left.split())
