"""Routes through the tunnel, which must not include the tunnel's own connection.

They are added when the device is up, before privileges are dropped; the kernel removes them with
the device. A client rejects a route that would send its own connection into the tunnel, or skips
the server addresses that such a route matches (client.py). A server cannot check this in advance:
a client whose address it routes into the tunnel gets no answer.

Sources: linux/route.h (struct rtentry), linux/ipv6_route.h (struct in6_rtmsg).
"""

from __future__ import annotations

import errno
import fcntl
import ipaddress
import socket
import struct

from ttun._codec import ffi
from ttun.errors import TtunError
from ttun.settings import Network

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
