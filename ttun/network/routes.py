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

from ttun.errors import TtunError, printable, reason
from ttun.network.netlink import NLM_ACK, NLM_CREATE, NO_FAMILY, Netlink, Request, new_route
from ttun.settings import MIN_IPV6_MTU, Address, Network

ENABLE_IPV6 = "sysctl net.ipv6.conf.{}.disable_ipv6=0"
NO_IPV6 = (*NO_FAMILY, errno.EACCES, errno.ENODEV)  # errors of a kernel, or a device, without it


def add(network: Network, device: str) -> None:
    """Add a route through a device that is up. Raises TtunError."""
    try:
        with contextlib.closing(Netlink()) as link:
            kind, _, body = new_route(socket.if_nametoindex(device), network)
            # Not exclusive: it comes before another device's route to the same network.
            link.answers(Request(kind, NLM_ACK | NLM_CREATE, body))
    except OSError as error:
        why = "it already exists" if error.errno == errno.EEXIST else reason(error)
        if network.version == 6 and error.errno in NO_IPV6:
            why = f"{device} has no IPv6 ({ENABLE_IPV6.format('default')})"
        raise TtunError(f"cannot add route {network} through {device}: {why}") from None


def why_no_ipv6(error: OSError, device: str = "default") -> str:
    """Return why a device has no IPv6, and what to do. device: its name, if it was prepared."""
    if error.errno == errno.EMSGSIZE:
        return f"the MTU is below {MIN_IPV6_MTU}"
    if error.errno == errno.EACCES:
        return f"disabled ({ENABLE_IPV6.format(device.replace('.', '/'))}; then restart ttun)"
    return reason(error)


def clash(network: Network, device: str) -> str | None:
    """Return another device with a route to a network of this one, at least as specific."""
    length, other = _longest_other(network[-1], device)
    return printable(other) if length >= network.prefixlen else None


def _longest_other(target: Address, device: str) -> tuple[int, str]:
    """Return the longest prefix length of other devices' routes to an address, or -1, and the
    device.
    """
    lengths = [(-1, "")]
    if target.version == 4:
        for fields in table("/proc/net/route")[1:]:
            # Hexadecimal, in host byte order.
            network, mask = (
                ipaddress.IPv4Address(struct.pack("=I", int(fields[i], 16))) for i in (1, 7)
            )
            route = ipaddress.ip_network(f"{network}/{mask}")
            if fields[0] != device and target in route:
                lengths.append((route.prefixlen, fields[0]))
    else:
        for fields in table("/proc/net/ipv6_route"):
            net6 = ipaddress.ip_network((bytes.fromhex(fields[0]), int(fields[1], 16)))
            if fields[9] not in (device, "lo") and target in net6:
                lengths.append((net6.prefixlen, fields[9]))
    return max(lengths)


def table(path: str) -> list[list[str]]:
    """Return the words in each line of a table of the kernel's; none if it has no such table."""
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError:
        return []
    # As bytes: a device's name may have any of them, and str has more kinds of blanks.
    return [[os.fsdecode(word) for word in line.split()] for line in lines]
