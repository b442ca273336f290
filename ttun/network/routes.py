"""Routes through the tunnel, which must not include the tunnel's own connection.

They are added when the device is up, before privileges are dropped, by ioctl, as netlink may be
forbidden (seccomp). The kernel removes them with the device. A client rejects a route that would
send its own connection into the tunnel, or skips the server addresses that such a route matches
(client.py). A server cannot check this in advance: a client whose address it routes into the tunnel
gets no answer.

Sources: linux/route.h (struct rtentry), linux/ipv6_route.h (struct in6_rtmsg), proc(5).
"""

from __future__ import annotations

import errno
import fcntl
import ipaddress
import os
import socket
import struct
from pathlib import Path
from typing import NamedTuple

from ttun._codec import ffi
from ttun.errors import TtunError, printable, reason
from ttun.network.netlink import NO_FAMILY
from ttun.settings import MIN_IPV6_MTU, Network

SIOCADDRT = 0x890B  # linux/sockios.h
RTF_UP = 0x0001  # linux/route.h
RTF_ADDRCONF = 0x40000  # linux/ipv6_route.h: a route of a router advertisement
UNUSED = 0  # of fields that the kernel ignores here
METRIC = 1024  # the kernel's default for IPv6 routes
ENABLE_IPV6 = "sysctl net.ipv6.conf.{}.disable_ipv6=0"
NO_IPV6 = (*NO_FAMILY, errno.EACCES, errno.ENODEV)  # errors of a device, or a kernel, without IPv6


def add(network: Network, device: str) -> None:
    """Add a route through a device that is up. Raises TtunError."""
    try:
        if network.version == 4:
            _add_ipv4(network, device)
        else:
            _add_ipv6(network, device)
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


def _add_ipv4(network: Network, device: str) -> None:
    def sockaddr(address: bytes) -> bytes:
        return struct.pack("=H2x4s8x", socket.AF_INET, address)

    name = ffi.from_buffer(device.encode() + b"\0")
    places = network.network_address, ipaddress.IPv4Address(0), network.netmask
    addresses = (sockaddr(place.packed) for place in places)  # destination, gateway, mask
    address = int(ffi.cast("uintptr_t", name))
    # struct rtentry
    entry = struct.pack(
        "@L16s16s16sHhLPhPLLH",
        UNUSED,
        *addresses,
        RTF_UP,
        *(UNUSED, UNUSED, UNUSED, UNUSED),
        address,
        *(UNUSED, UNUSED, UNUSED),
    )
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, SIOCADDRT, entry)


def _add_ipv6(network: Network, device: str) -> None:
    request = struct.pack(
        "@16s16s16sIHHILIi",
        network.network_address.packed,
        b"",  # any source
        b"",  # no gateway
        UNUSED,
        network.prefixlen,
        UNUSED,
        METRIC,
        UNUSED,
        RTF_UP,
        socket.if_nametoindex(device),
    )
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, SIOCADDRT, request)


class Route(NamedTuple):
    """A route of this machine, or one of its addresses."""

    network: Network
    device: str
    advertised: bool = False  # by a router (IPv6)


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
    routes = []
    for words in _table("/proc/net/ipv6_route"):
        network = ipaddress.IPv6Network((bytes.fromhex(words[0]), int(words[1], 16)))
        if words[9] != "lo":
            routes.append(Route(network, words[9], bool(int(words[8], 16) & RTF_ADDRCONF)))
    return routes


def _table(path: str) -> list[list[str]]:
    """Return the words in each line of a table of the kernel's; none if it has no such table."""
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError:
        return []
    # As bytes: a device's name may have any of them, and str has more kinds of blanks.
    return [[os.fsdecode(word) for word in line.split()] for line in lines]
