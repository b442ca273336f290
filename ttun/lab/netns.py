"""Two hosts on this machine, for both ends of a tunnel: network namespaces and a veth pair.

    server's host 192.0.2.1 ---- veth ---- 192.0.2.2 client's host      (RFC 5737 addresses)

For the demo, the benchmark and the tests. They cannot reach any other machine. They are removed
afterwards, also after a failure; the next run removes what a killed run left behind.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

from ttun import privileges, proxy
from ttun.commands import key
from ttun.errors import TtunError
from ttun.process import syslog
from ttun.process.signals import ENDING

SERVER, CLIENT = "server", "client"
PREFIX = "ttun"
IPV4 = {SERVER: "192.0.2.1", CLIENT: "192.0.2.2"}
IPV6 = {SERVER: "2001:db8::1", CLIENT: "2001:db8::2"}  # RFC 3849
INSIDE = "TTUN_IN_USER_NAMESPACE"
# Unlike -m: with nothing of the directory that the program was started in, where others may write.
RUN = "import sys; sys.path[:] = filter(None, sys.path); import runpy; \
runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
_numbers = itertools.count()
Self = TypeVar("Self", bound="Namespaces")  # typing.Self from Python 3.11 on


class LinkEnd(NamedTuple):
    """One end of a link."""

    host: str
    device: str
    addresses: Sequence[str]  # with prefix lengths


class Namespaces:
    """Hosts. A context manager: made on entry, removed on exit with all processes in them."""

    def __init__(self, *hosts: str) -> None:
        """Choose names that nobody else has. hosts: letters, digits, underscores."""
        number = next(_numbers)
        self.names = {host: f"{PREFIX}-{os.getpid()}-{host}{number}" for host in hosts}

    def __enter__(self: Self) -> Self:
        """Make the hosts."""
        _sweep()
        try:
            for name in self.names.values():
                ip("netns", "add", name)
                ip("-n", name, "link", "set", "lo", "up")
            self._join()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *what: object) -> None:
        """Remove the hosts."""
        with _undisturbed():
            for name in self.names.values():
                _remove(name)

    def _join(self) -> None:
        """Make the links between the hosts."""

    def link(self, first: LinkEnd, second: LinkEnd) -> None:
        """Join two hosts with a veth pair."""
        ip("link", "add", first.device, "netns", self.names[first.host], "type", "veth",
           "peer", "name", second.device, "netns", self.names[second.host])  # fmt: skip
        for host, device, addresses in (first, second):
            for address in addresses:
                nodad = ["nodad"] if ":" in address else []
                ip("-n", self.names[host], "address", "add", address, "dev", device, *nodad)
            ip("-n", self.names[host], "link", "set", device, "up")

    def command(self, host: str, arguments: Sequence[str]) -> list[str]:
        """Return the command line that runs arguments on a host."""
        return ["ip", "netns", "exec", self.names[host], *arguments]

    def start(
        self,
        host: str,
        arguments: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
    ) -> subprocess.Popen[str]:
        """Start a program on a host. ``ip netns exec`` execs it, so this is its process."""
        return subprocess.Popen(
            self.command(host, arguments),
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            text=True,
        )


class Hosts(Namespaces):
    """The two hosts, joined by a veth pair."""

    def __init__(self) -> None:
        """Choose names."""
        super().__init__(SERVER, CLIENT)
        self.links = {host: f"v{host}" for host in (SERVER, CLIENT)}

    def _join(self) -> None:
        server, client = (
            LinkEnd(host, self.links[host], [f"{IPV4[host]}/24", f"{IPV6[host]}/64"])
            for host in (SERVER, CLIENT)
        )
        self.link(server, client)


def python(module: str, *arguments: str) -> list[str]:
    """Return the command line that runs a module of this package with this Python."""
    return [sys.executable, "-c", RUN, module, *arguments]


def environment(**more: str) -> dict[str, str]:
    """Return the environment in which Python finds this package from any directory."""
    home = str(Path(__file__).resolve().parents[2])
    return {"PYTHONPATH": home, "PYTHONUNBUFFERED": "1", **more}


def environment_of_ends() -> dict[str, str]:
    """Return the environment of both ends of a tunnel: a new key, and nothing of the user's own."""
    return environment(TTUN_PSK=key.generate(), **{proxy.VARIABLE: "", syslog.VARIABLE: ""})


def end_as_by_ctrl_c() -> None:
    """Have SIGTERM, and SIGHUP of a terminal that closes, raise KeyboardInterrupt.

    Hosts are removed then. A signal that was ignored at the start stays ignored (nohup).
    """
    for number in ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)


def ip(*arguments: str) -> str:
    """Run ip(8) and return its output. Raises TtunError with its error message."""
    try:
        done = subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise TtunError("the ip command is missing: apt install iproute2") from None
    except subprocess.CalledProcessError as error:
        raise TtunError(f"ip {' '.join(arguments)}: {error.stderr.strip()}") from None
    return done.stdout


def may_make_hosts() -> bool:
    """Return whether this process may make namespaces and devices, as root usually may."""
    return privileges.has(privileges.NET_ADMIN) and privileges.has(privileges.SYS_ADMIN)


def enter_user_namespace(arguments: Sequence[str]) -> None:
    """Replace this process by a command line that runs as root of a user namespace.

    Raises TtunError where that is not possible. /run is a new tmpfs there, as ``ip netns`` keeps
    its names in it.
    """
    node = "/dev/net/tun"
    if os.path.exists(node) and not os.access(node, os.R_OK | os.W_OK):
        raise TtunError(f"this needs root: the user may not open {node} (use sudo)")
    namespace = ["unshare", "--user", "--map-root-user", "--net", "--mount"]
    if os.environ.get(INSIDE) or not shutil.which("unshare"):
        raise TtunError("this needs root (use sudo)")
    script = 'mount -t tmpfs none /run && ip link set lo up && exec "$@"'
    wrapped = [*namespace, "sh", "-c", script, "sh"]
    if subprocess.run([*wrapped, "true"], capture_output=True, check=False).returncode != 0:
        raise TtunError("this needs root: the kernel allows no user namespaces (use sudo)")
    os.environ.update(environment(), **{INSIDE: "1"})
    os.execvp(wrapped[0], [*wrapped, *arguments])


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Put signals off to the end of the block: a second Ctrl-C would leave something behind.

    The mask is for ip(8), which the terminal would end too; the handlers for this process, where
    another thread may receive what the main thread blocks.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    taken = [number for number in ENDING if callable(signal.getsignal(number))]
    before = {number: signal.signal(number, lambda n, _: came.append(n)) for number in taken}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def _remove(name: str) -> None:
    """Kill all processes in a namespace and remove it, with its devices."""
    with contextlib.suppress(TtunError):
        for pid in ip("netns", "pids", name).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        ip("netns", "delete", name)


def _sweep() -> None:
    """Remove the namespaces of processes that no longer run."""
    for line in ip("netns", "list").splitlines():
        match = re.fullmatch(rf"{PREFIX}-(\d+)-\w*\d", line.partition(" ")[0])
        if match and not _is_running(int(match[1])):
            _remove(match[0])


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
