"""The TUN device: opened through python-pytun, with addresses and an MTU, and no routes.

python-pytun opens the device and sets its IPv4 address and MTU; an IPv6 address takes one ioctl.
Source: Documentation/networking/tuntap.rst, linux/ipv6.h (struct in6_ifreq), netdevice(7).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import ipaddress
import logging
import os
import select
import socket
import struct
from collections.abc import Sequence
from typing import Any

import pytun

from ttun import privileges, routes
from ttun._codec import lib
from ttun.errors import TtunError
from ttun.settings import MIN_IPV6_MTU, NORMAL, Addresses, Network, Settings

log = logging.getLogger("ttun")

SIOCSIFADDR, SIOCSIFTXQLEN = 0x8916, 0x8943  # linux/sockios.h
TUNSETOFFLOAD = 0x400454D0  # linux/if_tun.h, as are these
TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_USO4, TUN_F_USO6 = 0x01, 0x02, 0x04, 0x20, 0x40
# What to ask of the kernel, the most first, and what the codec may then do.
OFFLOAD_TCP = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6
OFFLOADS = [
    (  # Linux 6.2
        OFFLOAD_TCP | TUN_F_USO4 | TUN_F_USO6,
        lib.TTUN_OFFLOAD_VNET | lib.TTUN_OFFLOAD_TCP | lib.TTUN_OFFLOAD_UDP,
    ),
    (OFFLOAD_TCP, lib.TTUN_OFFLOAD_VNET | lib.TTUN_OFFLOAD_TCP),
]
STALE_PACKETS = 10_000  # more than any queue of a TUN device is set to hold


class Device:
    """An open TUN device. It is gone when it is closed, or with the process.

    ``offload`` has the TTUN_OFFLOAD bits of what it can do, for the codec. ``name`` is what it was
    called when it was made, or when a DeviceWatch looked last; ``index`` is the kernel's number for
    it. ``addresses``, ``mtu`` and ``networks`` are what it was given, ``has_ipv6`` whether it got
    an IPv6 address, ``default_route`` whether default_route.py routes packets through it.
    """

    def __init__(
        self,
        addresses: Addresses,
        mtu: int,
        offload: bool = True,
        name: str = Settings.device,
        networks: Sequence[Network] = (),
        *,
        queue: int = NORMAL.queue,
    ) -> None:
        """Open a device, bring it up, and route networks through it. Raises TtunError."""
        privileges.check()
        self.addresses, self.mtu, self.networks = addresses, mtu, list(networks)
        self.has_ipv6 = self.default_route = False
        try:
            self._tun, self.offload = _open(name, offload)
        except OSError as error:
            if _is_taken(name):
                raise TtunError(f"there is a device {name} already: choose another name") from None
            raise TtunError(_why_no_device(error)) from None
        try:
            self.name: str = self._tun.name
            self.index = socket.if_nametoindex(self.name)
            os.set_inheritable(self.fileno(), False)
            os.set_blocking(self.fileno(), False)
            self._configure(addresses, mtu, queue)
            for network in networks:
                routes.add(network, self.name)
        except TtunError:
            self.close()
            raise
        except OSError as error:
            self.close()
            raise TtunError(f"cannot set up {self.name}: {error.strerror or error}") from None

    def _configure(self, addresses: Addresses, mtu: int, queue: int) -> None:
        self._tun.mtu = mtu
        self._tun.addr = str(addresses.ipv4.ip)
        if addresses.peer4 is not None:
            self._tun.dstaddr = str(addresses.peer4)
        self._tun.netmask = str(addresses.ipv4.netmask)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            request = struct.pack("=16si20x", self.name.encode(), queue)  # struct ifreq
            with contextlib.suppress(PermissionError):  # root of a user namespace may not
                fcntl.ioctl(control, SIOCSIFTXQLEN, request)
        self._tun.up()
        shown = [str(addresses.ipv4)]
        if mtu < MIN_IPV6_MTU:
            log.info("no IPv6 in the tunnel: it needs an MTU of %d or more", MIN_IPV6_MTU)
        else:
            try:
                self._add_ipv6(addresses.ipv6)
                if addresses.peer6 is not None:
                    routes.add(ipaddress.ip_network(addresses.peer6), self.name)
                shown.append(str(addresses.ipv6))
                self.has_ipv6 = True
            except OSError as error:
                log.info("no IPv6 in the tunnel: %s", error.strerror or error)
        log.info("tun %s up: %s mtu %d", self.name, " ".join(shown), mtu)

    def _add_ipv6(self, address: ipaddress.IPv6Interface) -> None:
        """Add an IPv6 address: SIOCSIFADDR with struct in6_ifreq on an IPv6 socket."""
        request = struct.pack("=16sIi", address.ip.packed, address.network.prefixlen, self.index)
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as control:
            fcntl.ioctl(control, SIOCSIFADDR, request)

    def fileno(self) -> int:
        """Return the descriptor, non-blocking."""
        descriptor: int = self._tun.fileno()
        return descriptor

    def is_gone(self) -> bool:
        """Return whether somebody removed the device: its descriptor is in error then, for ever."""
        waiting = select.poll()
        waiting.register(self.fileno(), 0)
        return any(events & select.POLLERR for _, events in waiting.poll(0))

    def drain(self) -> int:
        """Drop the packets that wait in the device, and return how many those were."""
        drained: int = lib.ttun_drain(self.fileno(), STALE_PACKETS)
        return drained

    def close(self) -> None:
        """Close the device; the kernel removes it."""
        self._tun.close()


def _open(name: str, offload: bool) -> tuple[Any, int]:
    """Open a device with the most offload that this kernel has; return it and what that is."""
    flags = pytun.IFF_TUN | pytun.IFF_NO_PI
    if offload:
        try:
            tun = pytun.TunTapDevice(name=name, flags=flags | pytun.IFF_VNET_HDR)
        except OSError as error:
            if error.errno != errno.EINVAL or _is_taken(name):
                raise
            log.info("no offload: this kernel has no vnet header")
        else:
            for wanted, bits in OFFLOADS:
                with contextlib.suppress(OSError):
                    fcntl.ioctl(tun, TUNSETOFFLOAD, wanted)
                    return tun, bits
            return tun, lib.TTUN_OFFLOAD_VNET
    return pytun.TunTapDevice(name=name, flags=flags), 0


def _is_taken(name: str) -> bool:
    return name in (other for _, other in socket.if_nameindex())


def _why_no_device(error: OSError) -> str:
    node = "/dev/net/tun"
    if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        return (
            f"there is no {node}: modprobe tun, or in a container: "
            f"mkdir -p /dev/net && mknod {node} c 10 200"
        )
    if error.errno == errno.EACCES:
        return f"{node} may not be opened by this user: run it with sudo"
    if error.errno == errno.EPERM:
        return "the kernel refuses a TUN device here: it needs CAP_NET_ADMIN over this network"
    return f"cannot open {node}: {error.strerror or error}"
