"""Bootstrap nodes, through which we join the Tox network.

They come from a file in the format of nodes.tox.chat/json: ``-b FILE``, else
/etc/tuntox/nodes.json, else the list in this package. Hosts on the same private network find each
other without a node if they use a UDP port of toxcore's local discovery (instance.LAN_PORTS).
"""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import json
import pkgutil
import random
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ttun.errors import TtunError
from ttun.process import files
from ttun.tox.loop import Loop
from ttun.tox.toxcore import PUBLIC_KEY_SIZE

SYSTEM_FILE = Path("/etc/tuntox/nodes.json")
PACKAGED_FILE = Path(__file__).with_name("nodes.json")  # inside a zip file, in a wheel
MAX_SIZE = 16 << 20  # bytes in a file of nodes
INTERVAL, AT_ONCE = 10.0, 8  # seconds between attempts, and nodes per attempt


class Node(NamedTuple):
    """A bootstrap node: its host, UDP port, public key, and TCP relay ports."""

    host: str
    port: int
    key: bytes
    relay_ports: tuple[int, ...]


def load(path: Path | None, *, proxied: bool = False) -> list[Node]:
    """Return the nodes in a file; None for the system's file, or else the packaged one.

    proxied: without those given by name. toxcore passes addresses to a proxy, so this host would
    look up the names. Entries without a usable address and key are skipped. Raises TtunError.
    """
    if path is None:
        path = SYSTEM_FILE if SYSTEM_FILE.exists() else PACKAGED_FILE
    try:
        if path == PACKAGED_FILE:
            raw = pkgutil.get_data(__name__, path.name) or b""
        else:
            raw = files.read(path, MAX_SIZE)
        document = json.loads(raw.decode())
        entries = document["nodes"]
        nodes = [node for entry in entries for node in _nodes(entry)]
    except OSError as error:
        raise TtunError(f"cannot read the bootstrap nodes in {path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise TtunError(
            f"{path} is not a list of bootstrap nodes (expected: as https://nodes.tox.chat/json)"
        ) from None
    if not nodes:
        raise TtunError(f"no usable bootstrap node in {path}")
    if proxied:
        nodes = [node for node in nodes if _is_numeric(node.host)]
        if not nodes:
            raise TtunError(f"only names of nodes in {path} (behind a proxy, use IP addresses)")
    return nodes


def _is_numeric(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _nodes(entry: dict[str, Any]) -> list[Node]:
    """Return a node for each of an entry's addresses."""
    try:
        key = bytes.fromhex(entry["public_key"])
        port = int(entry["port"])
        relay_ports = tuple(int(relay_port) for relay_port in entry.get("tcp_ports") or ())
    except (KeyError, ValueError, TypeError):
        return []
    ports = (port, *relay_ports)
    if len(key) != PUBLIC_KEY_SIZE or not all(0 < each < 65536 for each in ports):
        return []
    hosts = [entry.get("ipv4"), entry.get("ipv6")]
    return [
        Node(host, port, key, relay_ports)
        for host in hosts
        if isinstance(host, str) and host != "-"
    ]


class Bootstrap:
    """Bootstraps toxcore. Node names are looked up on a thread, so that the loop is not blocked."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._next = 0.0
        self._busy = False

    def try_some(self, nodes: Sequence[Node], now: float) -> None:
        """Try some nodes, unless an attempt is running or less than INTERVAL ago."""
        if now < self._next:
            return
        self._next = now + INTERVAL
        if not self._busy:
            some = random.sample(nodes, min(len(nodes), AT_ONCE))
            some.sort(key=lambda node: not _is_numeric(node.host))  # names may take long
            look_up = functools.partial(self._look_up, some)
            with contextlib.suppress(RuntimeError):  # cannot start a thread: try again later
                threading.Thread(target=look_up, name="ttun-nodes", daemon=True).start()
                self._busy = True

    def _look_up(self, nodes: Sequence[Node]) -> None:
        """Look up each node and have toxcore bootstrap from it."""
        for node in nodes:
            with contextlib.suppress(OSError, UnicodeError):
                found = socket.getaddrinfo(node.host, None, type=socket.SOCK_DGRAM)
                for host in {str(address[0]) for _, _, _, _, address in found}:
                    self._loop.call(functools.partial(self._loop.tox.bootstrap, host, *node[1:]))
        self._loop.call(self._done)

    def _done(self) -> None:
        self._busy = False
