"""Routes through the tunnel, which must not include the tunnel's own connection.

They are added when the device is up, before privileges are dropped; the kernel removes them with
the device. A client rejects a route that would send its own connection into the tunnel, or skips
the server addresses that such a route matches (client.py). A server cannot check this in advance:
a client whose address it routes into the tunnel gets no answer.

Sources: rtnetlink(7), proc(5).
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
import struct
from pathlib import Path
from typing import NamedTuple

from ttun.errors import TtunError, printable, reason
from ttun.network.netlink import NLM_ACK, NLM_CREATE, Netlink, Request, new_route
from ttun.settings import Network

# Errors of a device, or a kernel, without IPv6.
NO_IPV6 = (errno.EACCES, errno.ENODEV, errno.EAFNOSUPPORT, errno.EOPNOTSUPP)


def add(network: Network, device: str) -> None:
    """Add a route through a device that is up. Raises TtunError."""
    try:
        with contextlib.closing(Netlink()) as link:
            kind, _, body = new_route(socket.if_nametoindex(device), network)
            # Not exclusive: it comes before another device's route to the same network.
            link.order(Request(kind, NLM_ACK | NLM_CREATE, body))
    except OSError as error:
        why = "it already exists" if error.errno == errno.EEXIST else reason(error)
        if network.version == 6 and error.errno in NO_IPV6:
            why = f"{device} has no IPv6 (sysctl net.ipv6.conf.default.disable_ipv6=0)"
        raise TtunError(f"cannot add route {network} through {device}: {why}") from None


class Route(NamedTuple):
    """A route of this machine, or one of its addresses."""

    network: Network
    device: str


def clash(network: Network, device: str) -> str | None:
    """Return another device with a route to a network of this one, at least as specific."""
    others = [
        (route.network.prefixlen, route.device)
        for route in (ipv4_routes() if network.version == 4 else ipv6_routes())
        if route.device != device and network[-1] in route.network
    ]
    length, other = max(others, default=(-1, ""))
    return printable(other) if length >= network.prefixlen else None


def ipv4_routes() -> list[Route]:
    """Return the routes of the main table."""
    routes = []
    for words in _table("/proc/net/route")[1:]:
        # Hexadecimal, in host byte order.
        network, mask = (
            ipaddress.IPv4Address(struct.pack("=I", int(words[i], 16))) for i in (1, 7)
        )
        routes.append(Route(ipaddress.IPv4Network(f"{network}/{mask}"), words[0]))
    return routes


def ipv6_routes() -> list[Route]:
    """Return the routes of all tables, without the kernel's own on lo."""
    return [
        Route(ipaddress.IPv6Network((bytes.fromhex(words[0]), int(words[1], 16))), words[9])
        for words in _table("/proc/net/ipv6_route")
        if words[9] != "lo"
    ]


def _table(path: str) -> list[list[str]]:
    """Return the words in each line of a table of the kernel's; none if it has no such table."""
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError:
        return []
    # As bytes: a device's name may have any of them, and str has more kinds of blanks.
    return [[os.fsdecode(word) for word in line.split()] for line in lines]
