"""Two hosts on this machine, to run both ends of a tunnel: network namespaces and a veth pair.

    server's host 192.0.2.1 ---- veth ---- 192.0.2.2 client's host      (RFC 5737 addresses)

For the demo, the benchmark and the tests. Nothing of it can reach another machine, and all of it
is removed again, also after a failure; what a killed run left behind, the next run removes.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

from ttun import privileges
from ttun.errors import TtunError

SERVER, CLIENT = "server", "client"
PREFIX = "ttun"
IPV4 = {SERVER: "192.0.2.1", CLIENT: "192.0.2.2"}
IPV6 = {SERVER: "2001:db8::1", CLIENT: "2001:db8::2"}  # RFC 3849
INSIDE = "TTUN_IN_USER_NAMESPACE"
Self = TypeVar("Self", bound="Namespaces")  # typing.Self from Python 3.11 on


class LinkEnd(NamedTuple):
    """What a host has of a link."""

    host: str
    device: str
    addresses: Sequence[str]  # with their lengths


class Namespaces:
    """Some hosts. A context manager: made on entry, removed on exit with all that runs there."""

    def __init__(self, *hosts: str) -> None:
        """Choose names that no other process has. hosts: letters, digits, underscores."""
        self.names = {host: f"{PREFIX}-{os.getpid()}-{host}" for host in hosts}

    def __enter__(self: Self) -> Self:
        """Make them."""
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
        """Remove them."""
        for name in self.names.values():
            _remove(name)

    def _join(self) -> None:
        """Make the links between them."""

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
        """Start a program on a host. ``ip netns exec`` becomes it, so its process is the one."""
        return subprocess.Popen(
            self.command(host, arguments),
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            text=True,
        )


class Hosts(Namespaces):
    """The two hosts, joined."""

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
    """Return the command line of a module of this package, in this Python."""
    return [sys.executable, "-m", module, *arguments]


def environment(**more: str) -> dict[str, str]:
    """Return what such a module needs in its environment to be found from any directory."""
    home = str(Path(__file__).resolve().parents[2])
    return {"PYTHONPATH": home, "PYTHONUNBUFFERED": "1", **more}


def ip(*arguments: str) -> str:
    """Run iproute2's ip. Raises TtunError with what it said."""
    try:
        done = subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise TtunError("the ip command is missing: apt install iproute2") from None
    except subprocess.CalledProcessError as error:
        raise TtunError(f"ip {' '.join(arguments)}: {error.stderr.strip()}") from None
    return done.stdout


def may_make_hosts() -> bool:
    """Return whether this process may make namespaces and devices: root, as a rule."""
    return privileges.has(privileges.NET_ADMIN) and privileges.has(privileges.SYS_ADMIN)


def enter_user_namespace(arguments: Sequence[str]) -> None:
    """Run a command line anew as root of a user namespace, in place of this process.

    Returns only where the kernel does not allow that, with TtunError. ``ip netns`` keeps its names
    in /run, which is a fresh tmpfs there.
    """
    node = "/dev/net/tun"
    if os.path.exists(node) and not os.access(node, os.R_OK | os.W_OK):
        raise TtunError(f"this needs root, as {node} may not be opened by this user: use sudo")
    namespace = ["unshare", "--user", "--map-root-user", "--net", "--mount"]
    if os.environ.get(INSIDE) or not shutil.which("unshare"):
        raise TtunError("this needs root: run it with sudo")
    script = 'mount -t tmpfs none /run && ip link set lo up && exec "$@"'
    wrapped = [*namespace, "sh", "-c", script, "sh"]
    if subprocess.run([*wrapped, "true"], capture_output=True, check=False).returncode != 0:
        raise TtunError("this needs root, and this kernel allows no user namespace: use sudo")
    os.environ.update(environment(), **{INSIDE: "1"})
    os.execvp(wrapped[0], [*wrapped, *arguments])


def _remove(name: str) -> None:
    """Kill what runs in a namespace and remove it; its devices go with it."""
    with contextlib.suppress(TtunError):
        for pid in ip("netns", "pids", name).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        ip("netns", "delete", name)


def _sweep() -> None:
    """Remove what processes that are gone have left."""
    for line in ip("netns", "list").splitlines():
        match = re.match(rf"{PREFIX}-(\d+)-\w+", line)
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
