"""The TUN device: open it, set addresses, MTU and queue length, add routes.

A device that exists is one that an administrator prepared, perhaps for an unprivileged user: attach
to it, and add what it lacks as far as this process may. DeviceWatch reports the rest.

python-pytun opens the device and sets its IPv4 address and MTU; the rest are ioctls, and for a
prepared device netlink.
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
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import pytun

from ttun import privileges
from ttun._codec import lib
from ttun.errors import TtunError
from ttun.network import netlink, routes
from ttun.settings import MIN_IPV6_MTU, NORMAL, Addresses, Network, Settings

log = logging.getLogger("ttun")

SIOCSIFADDR, SIOCSIFTXQLEN = 0x8916, 0x8943  # linux/sockios.h
# linux/if_tun.h
TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_USO4, TUN_F_USO6 = 0x01, 0x02, 0x04, 0x20, 0x40
VNET_SIZE = 10  # bytes: struct virtio_net_hdr
# What to request from the kernel, most capable first, and the matching codec flags.
OFFLOAD_TCP = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6
OFFLOADS = [
    (  # Linux 6.2
        OFFLOAD_TCP | TUN_F_USO4 | TUN_F_USO6,
        lib.TTUN_OFFLOAD_VNET | lib.TTUN_OFFLOAD_TCP | lib.TTUN_OFFLOAD_UDP,
    ),
    (OFFLOAD_TCP, lib.TTUN_OFFLOAD_VNET | lib.TTUN_OFFLOAD_TCP),
]
PREPARE = "sudo ip tuntap add dev {name} mode tun user {user}"
STALE_PACKETS = 10_000  # more than any device queue holds


class Device:
    """An open TUN device. The kernel removes it when it is closed or the process ends, except if it
    existed before (``prepared``).

    ``offload`` holds the codec's TTUN_OFFLOAD bits. ``name`` is the last known name (DeviceWatch
    follows renames), ``index`` the interface index. ``addresses``, ``mtu`` (bytes) and ``networks``
    are the configured values; ``has_ipv6`` says whether an IPv6 address could be set, ``outside``
    which users' packets default_route.py does not route through it, if it routes any.
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
        self.prepared = _is_taken(name)
        if not self.prepared:
            prepare = f", or prepare it: {PREPARE.format(name=name, user=os.geteuid())}"
            privileges.check("" if "%" in name else prepare)
        self.addresses, self.mtu, self.networks = addresses, mtu, list(networks)
        self.has_ipv6 = False
        self.outside: Sequence[int] = ()
        try:
            self._tun, self.offload = _open(name, offload)
        except OSError as error:
            if self.prepared and error.errno != errno.EACCES:  # that one is of the node
                why = _why_not_attached(error).format(name=name, user=os.geteuid())
                raise TtunError(f"device {name} {why}") from None
            raise TtunError(_why_no_device(error)) from None
        try:
            self.name: str = self._tun.name
            self.index = socket.if_nametoindex(self.name)
            os.set_inheritable(self.fileno(), False)
            os.set_blocking(self.fileno(), False)
            if self.prepared:
                self._complete()
            else:
                self._configure(addresses, mtu, queue)
                for network in networks:
                    routes.add(network, self.name)
            self._warn_of_clashes()
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
        try:
            if mtu < MIN_IPV6_MTU:
                raise OSError(errno.EMSGSIZE, "")
            self._add_ipv6(addresses.ipv6)
            if addresses.peer6 is not None:
                routes.add(ipaddress.ip_network(addresses.peer6), self.name)
            shown.append(str(addresses.ipv6))
            self.has_ipv6 = True
        except OSError as error:
            self._tell_no_ipv6(error)
        log.info("tun %s up: %s mtu %d", self.name, " ".join(shown), mtu)

    def _warn_of_clashes(self) -> None:
        networks: list[Network] = [self.addresses.ipv4.network]
        if self.has_ipv6:
            networks.append(self.addresses.ipv6.network)
        for network in networks:
            if other := routes.clash(network, self.name):
                log.warning(
                    "%s is also routed through %s, so traffic may be misrouted (choose other "
                    "addresses: --local%d, --peer%d)",
                    network, other, network.version, network.version,
                )  # fmt: skip

    def _complete(self) -> None:
        """Add what a prepared device lacks; without the privileges, nothing."""
        mine = self.addresses
        if self._tun.mtu != self.mtu:
            with _permitted():
                self._tun.mtu = self.mtu
        with _permitted():
            self._tun.up()
        with contextlib.closing(netlink.Netlink()) as kernel:
            fine = (errno.EEXIST, errno.EPERM)
            kernel.order(netlink.new_address(self.index, mine.ipv4, mine.peer4), fine)
            try:
                if self.mtu < MIN_IPV6_MTU:
                    raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
                kernel.order(netlink.new_address(self.index, mine.ipv6, None), fine)
                self.has_ipv6 = True
            except OSError as error:
                self._tell_no_ipv6(error, self.name)
            wanted = [*self.networks]
            if self.has_ipv6 and mine.peer6 is not None:
                wanted.append(ipaddress.ip_network(mine.peer6))
            for network in wanted:
                try:
                    kernel.order(netlink.new_route(self.index, network), fine)
                except OSError as error:
                    raise OSError(error.errno, f"route {network}: {error.strerror}") from None
        log.info("attached to %s, which existed", self.name)

    @staticmethod
    def _tell_no_ipv6(error: OSError, name: str = "default") -> None:
        level = logging.INFO if error.errno == errno.EMSGSIZE else logging.WARNING
        log.log(level, "no IPv6 in the tunnel: %s", routes.why_no_ipv6(error, name))

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
        """Close the device; the kernel removes it, unless it was prepared."""
        if self.prepared:  # what attaches next may want no offload
            with contextlib.suppress(OSError):
                fcntl.ioctl(self._tun, lib.TUNSETOFFLOAD, 0)
        self._tun.close()

    def keep_from_children(self) -> None:
        """Close it in each process that this one forks from now on, or they would keep it."""
        _kept.add(self)


_kept: weakref.WeakSet[Device] = weakref.WeakSet()


def _close_in_child() -> None:
    for device in _kept:
        device._tun.close()


os.register_at_fork(after_in_child=_close_in_child)


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
            with contextlib.suppress(OSError):  # a prepared device keeps what another program set
                fcntl.ioctl(tun, lib.TUNSETVNETHDRSZ, struct.pack("=i", VNET_SIZE))
            for wanted, bits in OFFLOADS:
                with contextlib.suppress(OSError):
                    fcntl.ioctl(tun, lib.TUNSETOFFLOAD, wanted)
                    return tun, bits
            return tun, lib.TTUN_OFFLOAD_VNET
    tun = pytun.TunTapDevice(name=name, flags=flags)
    with contextlib.suppress(OSError):
        fcntl.ioctl(tun, lib.TUNSETOFFLOAD, 0)  # of a prepared device, after another program
    return tun, 0


@contextlib.contextmanager
def _permitted() -> Iterator[None]:
    """Suppress the error of a missing privilege; pytun's is not a PermissionError."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EPERM:
            raise


def _is_taken(name: str) -> bool:
    try:
        return socket.if_nametoindex(name) > 0  # an ioctl: netlink may be blocked
    except OSError:
        return False


def _why_not_attached(error: OSError) -> str:
    if error.errno == errno.EPERM:
        return f"belongs to another user (sudo ip link delete {{name}}; {PREPARE})"
    if error.errno == errno.EBUSY:
        return "is used by another program (choose another name)"
    if error.errno == errno.EINVAL:
        return "is not a plain TUN device: tap, multi_queue or other (choose another name)"
    return f"cannot be attached to: {error.strerror or error}"


def _why_no_device(error: OSError) -> str:
    node = "/dev/net/tun"
    if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        return (
            f"{node} not found (modprobe tun; in a container: "
            f"mkdir -p /dev/net && mknod {node} c 10 200)"
        )
    if error.errno == errno.EACCES:
        return f"cannot open {node}: permission denied (run with sudo, or chmod 666 {node})"
    if error.errno == errno.EPERM:
        return "cannot create a TUN device: CAP_NET_ADMIN required in this network namespace"
    return f"cannot open {node}: {error.strerror or error}"
