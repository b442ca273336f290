"""The TUN device: open it, set addresses, MTU and queue length, add routes.

python-pytun opens the device and sets its IPv4 address and MTU; the rest are ioctls.
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
# What to request from the kernel, most capable first, and the matching codec flags.
OFFLOAD_TCP = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6
OFFLOADS = [
    (  # Linux 6.2
        OFFLOAD_TCP | TUN_F_USO4 | TUN_F_USO6,
        lib.TTUN_OFFLOAD_VNET | lib.TTUN_OFFLOAD_TCP | lib.TTUN_OFFLOAD_UDP,
    ),
    (OFFLOAD_TCP, lib.TTUN_OFFLOAD_VNET | lib.TTUN_OFFLOAD_TCP),
]
STALE_PACKETS = 10_000  # more than any device queue holds


class Device:
    """An open TUN device. The kernel removes it when it is closed or the process ends.

    ``offload`` holds the codec's TTUN_OFFLOAD bits. ``name`` is the last known name (DeviceWatch
    follows renames), ``index`` the interface index. ``addresses``, ``mtu`` (bytes) and ``networks``
    are the configured values; ``has_ipv6`` says whether an IPv6 address could be set,
    ``default_route`` whether default_route.py routes packets through it.
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
        """Open and configure the device, bring it up, add routes. Raises TtunError.

        queue: length of its transmit queue, in packets.
        """
        privileges.check()
        self.addresses, self.mtu, self.networks = addresses, mtu, list(networks)
        self.has_ipv6 = self.default_route = False
        try:
            self._tun, self.offload = _open(name, offload)
        except OSError as error:
            if _is_taken(name):
                raise TtunError(f"device {name} already exists (choose another name)") from None
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
            raise TtunError(f"cannot configure {self.name}: {error.strerror or error}") from None

    def _configure(self, addresses: Addresses, mtu: int, queue: int) -> None:
        self._tun.mtu = mtu
        self._tun.addr = str(addresses.ipv4.ip)
        if addresses.peer4 is not None:
            self._tun.dstaddr = str(addresses.peer4)
        self._tun.netmask = str(addresses.ipv4.netmask)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            request = struct.pack("=16si20x", self.name.encode(), queue)  # struct ifreq
            with contextlib.suppress(PermissionError):  # root in a user namespace
                fcntl.ioctl(control, SIOCSIFTXQLEN, request)
        self._tun.up()
        shown = [str(addresses.ipv4)]
        if mtu < MIN_IPV6_MTU:
            log.info("no IPv6 in the tunnel: the MTU is below %d", MIN_IPV6_MTU)
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
        """Return the non-blocking descriptor."""
        descriptor: int = self._tun.fileno()
        return descriptor

    def is_gone(self) -> bool:
        """Return whether the device was removed: poll() then reports POLLERR."""
        waiting = select.poll()
        waiting.register(self.fileno(), 0)
        return any(events & select.POLLERR for _, events in waiting.poll(0))

    def drain(self) -> int:
        """Discard the packets queued in the device; return their number."""
        drained: int = lib.ttun_drain(self.fileno(), STALE_PACKETS)
        return drained

    def close(self) -> None:
        """Close the device; the kernel removes it."""
        self._tun.close()


def _open(name: str, offload: bool) -> tuple[Any, int]:
    """Open a device with the best offload of this kernel; return it and its TTUN_OFFLOAD bits."""
    flags = pytun.IFF_TUN | pytun.IFF_NO_PI
    if offload:
        try:
            tun = pytun.TunTapDevice(name=name, flags=flags | pytun.IFF_VNET_HDR)
        except OSError as error:
            if error.errno != errno.EINVAL or _is_taken(name):
                raise
            log.info("no offload: this kernel lacks IFF_VNET_HDR")
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
            f"{node} not found (modprobe tun; in a container: "
            f"mkdir -p /dev/net && mknod {node} c 10 200)"
        )
    if error.errno == errno.EACCES:
        return f"cannot open {node}: permission denied (run with sudo)"
    if error.errno == errno.EPERM:
        return "cannot create a TUN device: CAP_NET_ADMIN required in this network namespace"
    return f"cannot open {node}: {error.strerror or error}"
