"""Nodes to bootstrap from: where the Tox network is entered.

A file in the form of nodes.tox.chat/json: ``-b FILE``, else /etc/tuntox/nodes.json, else the list
in this package. Hosts on the same private network find each other without any, if they have one of
the UDP ports where toxcore looks (instance.LAN_PORTS).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from ttun.errors import TtunError
from ttun.process import files
from ttun.tox.toxcore import PUBLIC_KEY_SIZE

SYSTEM_FILE = Path("/etc/tuntox/nodes.json")
PACKAGED_FILE = Path(__file__).with_name("nodes.json")
MAX_SIZE = 16 << 20  # bytes of a file of nodes


class Node(NamedTuple):
    """A node: where it answers over UDP, its key, and the TCP ports where it relays."""

    host: str
    port: int
    key: bytes
    relay_ports: tuple[int, ...]


def find(given: Path | None) -> list[Node]:
    """Return the nodes to use. Raises TtunError if the file that was named cannot be used."""
    if given is not None:
        return read(given)
    return read(SYSTEM_FILE if SYSTEM_FILE.exists() else PACKAGED_FILE)


def read(path: Path) -> list[Node]:
    """Return the nodes in a file; entries without a usable address and key are left out."""
    try:
        document = json.loads(files.read(path, MAX_SIZE).decode())
        entries = document["nodes"]
        nodes = [node for entry in entries for node in _nodes(entry)]
    except OSError as error:
        raise TtunError(f"cannot read the bootstrap nodes in {path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise TtunError(
            f"{path} is no list of bootstrap nodes: it looks like https://nodes.tox.chat/json"
        ) from None
    if not nodes:
        raise TtunError(f"there is no usable bootstrap node in {path}")
    return nodes


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
