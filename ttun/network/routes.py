"""Routes through the tunnel, which must not include the tunnel's own connection.

They are added when the device is up, before privileges are dropped; the kernel removes them with
the device. A client rejects a route that would send its own connection into the tunnel, or skips
the server addresses that such a route matches (client.py). A server cannot check this in advance:
a client whose address it routes into the tunnel gets no answer.

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

from ttun._codec import ffi
from ttun.errors import TtunError, printable
from ttun.settings import Address, Network

SIOCADDRT = 0x890B  # linux/sockios.h
RTF_UP = 0x0001  # linux/route.h
NO_IPV6 = (errno.EACCES, errno.ENODEV, errno.EAFNOSUPPORT)  # errors of a kernel without IPv6
METRIC = 1024  # the kernel's default for IPv6 routes


def add(network: Network, device: str) -> None:
    """Add a route through a device that is up. Raises TtunError."""
    try:
        if network.version == 4:
            _add_ipv4(network, device)
        else:
            _add_ipv6(network, device)
    except OSError as error:
        why = "it already exists" if error.errno == errno.EEXIST else error.strerror
        if network.version == 6 and error.errno in NO_IPV6:
            why = f"{device} has no IPv6 (sysctl net.ipv6.conf.default.disable_ipv6=0)"
        raise TtunError(f"cannot add route {network} through {device}: {why}") from None


def _add_ipv4(network: Network, device: str) -> None:
    def sockaddr(address: bytes) -> bytes:
        return struct.pack("=H2x4s8x", socket.AF_INET, address)

    name = ffi.from_buffer(device.encode() + b"\0")
    places = network.network_address, ipaddress.IPv4Address(0), network.netmask
    addresses = (sockaddr(place.packed) for place in places)  # destination, gateway, mask
    address = int(ffi.cast("uintptr_t", name))
    # struct rtentry
    entry = struct.pack("@L16s16s16sHhLPhPLLH", 0, *addresses, RTF_UP, 0, 0, 0, 0, address, 0, 0, 0)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, SIOCADDRT, entry)


def _add_ipv6(network: Network, device: str) -> None:
    request = struct.pack(
        "@16s16s16sIHHILIi",
        network.network_address.packed,
        bytes(16),  # any source
        bytes(16),  # no gateway
        0,
        network.prefixlen,
        0,
        METRIC,
        0,
        RTF_UP,
        socket.if_nametoindex(device),
    )
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, SIOCADDRT, request)


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
