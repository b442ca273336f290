"""Both ends of a tunnel on two hosts of this machine, for the end-to-end tests."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shlex
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import forked
import pytest

from ttun import cipher as ciphers
from ttun.commands import query, runtime
from ttun.lab import netns
from ttun.lab.netns import CLIENT, SERVER, Hosts, Namespaces
from ttun.lab.traffic import ping

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "ttun.py"
# TTUN_TEST_PROGRAM: what to run in its place (tests/sanitize.py: with an instrumented codec).
PROGRAM = shlex.split(os.environ.get("TTUN_TEST_PROGRAM", "")) or [sys.executable, str(SCRIPT)]
SERVER_ADDRESS = "192.0.2.1"
TUNNEL4 = {SERVER: "10.1.1.1", CLIENT: "10.1.1.2"}
TUNNEL6 = {SERVER: "fc11::1", CLIENT: "fc11::2"}
# What two ttun ends agree on without -m.
BEST = {"v1": "chacha20-poly1305", "x1": ciphers.fast()[0].name}
every_way = pytest.mark.parametrize(
    "bench", ["x1", "x1-no-offload", "v1", "v1-no-offload"], indirect=True
)
OTHER = {SERVER: CLIENT, CLIENT: SERVER}
CLONE_NEWNS, CLONE_NEWNET = 0x00020000, 0x40000000  # linux/sched.h
libc = ctypes.CDLL(None, use_errno=True)
T = TypeVar("T")


def eventually(condition: Callable[[], T], what: str, seconds: float = 20) -> T:
    """Wait until condition gives something true, and return that."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        result = condition()
        if result:
            return result
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds} s: {what}")


def children(pid: int) -> dict[int, str]:
    """The children of a process, and in what state each is."""
    found = {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            fields = (directory / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found[int(directory.name)] = fields[0]
    return found


def has_thread(pid: int, name: str) -> bool:
    """Whether a process has a thread of that name."""
    with contextlib.suppress(OSError):  # one has just ended
        found = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/comm")]
        return f"{name}\n" in found
    return False


def own_mounts() -> None:
    """Give this process, and what it starts, mounts that nobody else sees: an empty /run, and a
    TUN device node that every user may open, as udev makes it.
    """
    if libc.unshare(CLONE_NEWNS) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    for arguments in (["--make-rprivate", "/"], ["-t", "tmpfs", "none", "/run"]):
        subprocess.run(["mount", *arguments], check=True)
    node = Path("/dev/net/tun")
    made = Path("/run/tun")
    if node.exists() and node.stat().st_mode & 0o666 != 0o666:
        with contextlib.suppress(PermissionError):  # root of a user namespace
            os.mknod(made, stat.S_IFCHR, os.makedev(10, 200))
            made.chmod(0o666)
            subprocess.run(["mount", "--bind", made, node], check=True)


def enter_namespace(name: str) -> None:
    """Have this thread be in a network namespace from now on."""
    descriptor = os.open(f"/run/netns/{name}", os.O_RDONLY)
    try:
        if libc.setns(descriptor, CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns")
    finally:
        os.close(descriptor)


def in_namespace(name: str, function: Callable[[], T]) -> T:
    """Call function on a thread that is in a network namespace: sockets made there stay there."""
    results: list[T] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            enter_namespace(name)
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


class Program:
    """A running program, and what it says on stderr."""

    patience = 10.0  # seconds that it may take to stop

    def __init__(self, process: subprocess.Popen[Any], log: Path) -> None:
        self.process, self.path = process, log

    def log(self) -> str:
        return self.path.read_text(errors="replace")

    def says(self, text: str, times: int = 1, seconds: float = 20) -> str:
        """Wait until the log has text that many times."""
        eventually(lambda: self.log().count(text) >= times, f"{text!r} in {self.path}", seconds)
        return self.log()

    def ended(self, seconds: float = 10) -> int:
        return self.process.wait(seconds)

    def stop(self) -> int:
        """End it as a service manager would; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(self.patience)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"did not stop:\n{self.log()}") from None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def usage(self) -> tuple[int, int, int]:
        """Return its open descriptors, its threads, and its memory in KiB.

        Of a moment when the first two stand still, if there is one within a second: what has just
        begun or ended is not counted by halves.
        """
        proc = Path(f"/proc/{self.process.pid}")
        counts = [0, 0]
        for _ in range(20):
            before = counts
            counts = [len(os.listdir(proc / name)) for name in ("fd", "task")]
            if counts == before:
                break
            time.sleep(0.05)
        memory = int((proc / "status").read_text().split("VmRSS:")[1].split()[0])
        return counts[0], counts[1], memory


def run_program(
    *arguments: str, timeout: float = 60, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run ttun to its end."""
    variables = {**os.environ, **environment}
    if forked.can(forked.TTUN):
        return forked.run(forked.TTUN, arguments, environment=variables, timeout=timeout)
    return subprocess.run(
        [*PROGRAM, *arguments], env=variables, capture_output=True, check=False, timeout=timeout,
        encoding="utf-8", errors="surrogateescape",
    )  # fmt: skip


class End(Program):
    """One end of a tunnel. With an environment of its own, even an empty one, it starts slowly."""

    patience = 5.0

    def __init__(
        self,
        pair: Namespaces,
        host: str,
        arguments: list[str],
        log: Path,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.host = host
        process: subprocess.Popen[str]
        with log.open("w") as file:
            if environment is None and forked.can(forked.TTUN):
                process = forked.start(forked.TTUN, arguments, file, namespace=pair.names[host])
            else:
                process = pair.start(
                    host, [*PROGRAM, *arguments], stdout=file, stderr=file,
                    environment=netns.environment(**(environment or {})),
                )  # fmt: skip
        super().__init__(process, log)

    def status(self) -> dict[str, Any]:
        """What it answers to ttun show."""

        def mine() -> list[dict[str, Any]]:
            tunnels = query.ask(runtime.directories()).tunnels
            return [tunnel for tunnel in tunnels if tunnel["pid"] == self.process.pid]

        return eventually(mine, f"an answer of {self.process.pid}")[0]

    def socket(self) -> Path:
        """Where it answers. It does so once it can be ended by signals."""
        self.status()
        name = f"*.{self.process.pid}.sock"
        return eventually(lambda: [*runtime.SYSTEM.rglob(name)], f"{name} in /run/ttun")[0]


class Bench:
    """Two hosts, and whatever a test starts on them; all of it is ended with the test."""

    def __init__(self, pair: Hosts, directory: Path, wire: str, options: list[str]) -> None:
        self.pair, self.directory = pair, directory
        self.wire, self.cipher = wire, BEST[wire]
        self.options = options + (["--wire", "v1"] if wire == "v1" else [])
        self.forks = True  # else each end is started as its users do
        self.ends: list[End] = []
        self.helpers: list[subprocess.Popen[str]] = []

    def start(self, host: str, *arguments: str, environment: dict[str, str] | None = None) -> End:
        log = self.directory / f"{len(self.ends)}.log"
        if environment is None and not self.forks:
            environment = {}
        end = End(self.pair, host, list(arguments), log, environment)
        self.ends.append(end)
        return end

    def server(self, *options: str, key: str = "secret") -> End:
        end = self.start(SERVER, "server", "-k", key, *self.options, *options)
        end.says("listening on")
        return end

    def client(self, *options: str, key: str = "secret", to: str = SERVER_ADDRESS) -> End:
        return self.start(CLIENT, "client", "-k", key, "-s", to, *self.options, *options)

    def tunnel(self, *options: str) -> tuple[End, End]:
        """A server and a client with a session."""
        server, client = self.server(*options), self.client(*options)
        for end in (client, server):
            end.says("authenticated")
            # What comes from the device until this thread runs is dropped.
            eventually(lambda end=end: has_thread(end.process.pid, "ttun-up-seal"), "a session")
        return server, client

    def run(self, host: str, *arguments: str, timeout: float = 120) -> str:
        """Run a command on a host to its end; what it printed."""
        size = len(PROGRAM)
        if [*arguments[:size]] == PROGRAM and forked.can(forked.TTUN):
            return self.forked(forked.TTUN, host, arguments[size:], timeout)
        return subprocess.run(
            self.pair.command(host, arguments), env={**os.environ, **netns.environment()},
            capture_output=True, text=True, check=True, timeout=timeout,
        ).stdout  # fmt: skip

    def traffic(self, host: str, *arguments: str, timeout: float = 120) -> Any:
        """What ttun.traffic measured."""
        if not forked.can(forked.TRAFFIC):
            command = netns.python(forked.TRAFFIC, *arguments)
            return json.loads(self.run(host, *command, timeout=timeout))
        return json.loads(self.forked(forked.TRAFFIC, host, arguments, timeout))

    def forked(self, module: str, host: str, arguments: Sequence[str], timeout: float) -> str:
        name = self.pair.names[host]
        done = forked.run(module, arguments, namespace=name, timeout=timeout)
        done.check_returncode()
        return done.stdout

    def ping(self, host: str, address: str, times: int = 1, size: int = 56) -> int:
        """How many of so many pings were answered. size: bytes of payload. Raises OSError."""
        results = self.on(host, lambda: ping(address, times, 0.01, size))
        return sum(seconds is not None for seconds in results)

    def answers(self, host: str = CLIENT, seconds: float = 20) -> None:
        """Wait until the tunnel carries pings from a host to the other end."""
        address = TUNNEL4[OTHER[host]]

        def answered() -> bool:
            with contextlib.suppress(OSError):  # no device yet
                return self.ping(host, address) == 1
            return False

        eventually(answered, f"ping {address}", seconds)

    def helper(self, host: str, *arguments: str, says: str = "ready") -> subprocess.Popen[str]:
        """Start a program and wait for the first line that it says."""
        process: subprocess.Popen[str]
        *python, module = netns.python(forked.TRAFFIC)
        size = len(python) + 1
        if list(arguments[:size]) == [*python, module] and forked.can(module):
            name = self.pair.names[host]
            process = forked.start(module, arguments[size:], None, namespace=name)
        else:
            process = self.pair.start(
                host, arguments, environment=netns.environment(), stdout=subprocess.PIPE
            )
        self.helpers.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == f"{says}\n"
        return process

    def serve_traffic(self, host: str, address: str, port: int = 5001) -> None:
        self.helper(host, *netns.python("ttun.lab.traffic", "serve", address, str(port)))

    def on(self, host: str, function: Callable[[], T]) -> T:
        """Call function on a thread that is on a host: sockets made there belong to that host."""
        return in_namespace(self.pair.names[host], function)

    @contextlib.contextmanager
    def link_down(self, host: str, link: str | None = None) -> Iterator[None]:
        """Take a link down for a while (default: the one between the hosts)."""
        name, usual = self.pair.names[host], self.pair.links[host]
        netns.ip("-n", name, "link", "set", link or usual, "down")
        try:
            yield
        finally:
            netns.ip("-n", name, "link", "set", link or usual, "up")
            # The kernel removes IPv6 addresses of a link that goes down.
            address = f"{netns.IPV6[host]}/64"
            netns.ip("-n", name, "address", "replace", address, "dev", usual, "nodad")

    def devices(self, host: str) -> list[str]:
        """The names of the TUN devices on a host."""
        names = [name for _, name in self.on(host, socket.if_nameindex)]
        return [name for name in names if name.startswith("ttun")]

    def close(self) -> None:
        for end in self.ends:
            if end.process.poll() is None:
                end.kill()
        for helper in self.helpers:
            helper.kill()
            helper.wait()
            assert helper.stdout is not None
            helper.stdout.close()


def bench(
    pair: Hosts, directory: Path, wire: str, options: list[str], *, forks: bool = True
) -> Iterator[Bench]:
    """The fixture. wire: between two ttun ends. options: of every server and client."""
    made = Bench(pair, directory, wire, options)
    made.forks = forks
    try:
        yield made
    except BaseException:
        made.close()
        raise
    made.close()
    for host in (SERVER, CLIENT):
        eventually(lambda host=host: made.devices(host) == [], f"no device left on {host}", 5)
