"""``ttun doctor``: what of this machine a tunnel can use, what a lack costs, how to mend it.

It looks, in this order, at what ttun itself needs, another project of its name, the rights of this
process, the device and its offloads, IPv6, the processor, Multipath TCP, congestion control,
toxcore, the clock, and the tunnel's addresses; with a peer named, at whether that answers, what the
windows let through and how large a packet gets there. It changes nothing: for the offloads a device
is made and removed again, never up. Without root it says what it could not see.

Sources: linux/if_tun.h, proc(5), netdevice(7).
"""

from __future__ import annotations

import array
import contextlib
import datetime
import errno
import fcntl
import ipaddress
import os
import socket
import stat
import struct
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Union

from ttun import default_route, privileges, tox
from ttun._codec import ffi
from ttun.address import Address
from ttun.commands.doctor_connection import look_at_congestion_control, look_at_mptcp, look_at_peer
from ttun.commands.finding import LESS, NO, OK, UNREACHED, UNSEEN, Finding
from ttun.errors import TtunError, printable

Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]

DISTRIBUTION, NAMESAKE = "ttun-tunnel", "ttun"  # ours, and another project's on PyPI
NODE = Path("/dev/net/tun")
TUN_NUMBER = (10, 200)  # Documentation/admin-guide/devices.txt
TUNGETFEATURES, TUNSETIFF = 0x800454CF, 0x400454CA  # linux/if_tun.h, as are these
IFF_TUN, IFF_NO_PI, IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
SIOCGIFCONF = 0x8912  # linux/sockios.h
IFREQ_SIZE = struct.calcsize("16sP") + (16 if struct.calcsize("P") == 8 else 12)
MANY_ADDRESSES = 1000
WRITTEN = datetime.date(2026, 1, 1)  # no clock that is right shows a day before this program


def run(peer: Address | None) -> int:
    """Print what is found, as it is found; return 0 if a tunnel can run here, else 1."""
    if not Path("/proc/self").exists():
        raise TtunError(
            "doctor looks at much in /proc, which is not here: mount -t proc proc /proc"
        )
    marks, missing = [], set()
    for finding in look(peer):
        print("\n".join(map(printable, str(finding).split("\n"))), flush=True)
        marks.append(finding.mark)
        if finding.mark == NO:
            missing.add(finding.cost)
    lacks = marks.count(LESS)
    if missing:
        what = "reach this peer" if missing == {UNREACHED} else "run here"
        print(f"\nNo tunnel can {what} as it is: see the lines with «no».")
        return 1
    print(f"\nA tunnel can run here{f', with {lacks} of the costs above' if lacks else ''}.")
    return 0


def look(peer: Address | None) -> Iterator[Finding]:
    """Yield what is found, in the order of the report."""
    packages = look_at_packages()
    yield packages
    yield from look_at_namesake()
    yield look_at_rights()
    node = look_at_node()
    yield node
    if packages.mark == OK:
        if node.mark == OK:
            yield look_at_offloads()
        else:
            yield Finding(UNSEEN, "offloads", f"not looked at, as {NODE} does not open")
    yield look_at_ipv6()
    if packages.mark == OK:
        yield look_at_aes()
    yield look_at_mptcp()
    yield look_at_congestion_control()
    yield look_at_toxcore()
    yield look_at_clock(datetime.datetime.now().date())
    if packages.mark == OK:
        from ttun.settings import SERVER

        yield look_at_addresses("IPv4 addresses", SERVER.ipv4.network, ipv4_routes())
        yield look_at_addresses("IPv6 addresses", SERVER.ipv6.network, ipv6_routes())
        yield from look_at_rp_filter()
    if peer is not None:
        yield from look_at_peer(peer)


def look_at_packages() -> Finding:
    """Import what a tunnel imports."""
    try:
        import ttun.device
        import ttun.sodium  # noqa: F401
    except ImportError as error:
        return Finding(
            NO,
            "packages",
            str(error),
            "nothing runs",
            "make in its directory; elsewhere pip install pynacl cffi python-pytun",
        )
    except TtunError as error:
        return Finding(NO, "packages", str(error), "nothing runs")
    return Finding(OK, "packages", "the codec, PyNaCl and python-pytun load")


def look_at_namesake() -> Iterator[Finding]:
    """Is the other project installed that PyPI has as ttun? Its package and command are ours."""
    try:
        from importlib import metadata

        other = metadata.distribution(NAMESAKE)
    except ImportError:  # no such distribution, or a Python without what looks for them
        return
    yield Finding(
        LESS,
        "other ttun",
        f"{NAMESAKE} {other.version} in {other.locate_file('')}, another project's",
        "the package and the command have the same names: each overwrites the other's files",
        f"pip uninstall {NAMESAKE}; then install {DISTRIBUTION} again",
    )


def look_at_rights() -> Finding:
    """May this process make a network device?"""
    if privileges.has(privileges.NET_ADMIN):
        return Finding(OK, "rights", "CAP_NET_ADMIN")
    return Finding(
        NO,
        "rights",
        "no CAP_NET_ADMIN",
        "no device can be made",
        "sudo; in a container --cap-add NET_ADMIN",
    )


def look_at_node() -> Finding:
    """Is /dev/net/tun there, the right one, and may it be opened?"""
    make = f"modprobe tun; in a container --device {NODE}, or: mknod {NODE} c 10 200"
    cost = "no device can be made"
    try:
        found = NODE.stat()
    except OSError as error:
        return Finding(NO, str(NODE), error.strerror or str(error), cost, make)
    number = (os.major(found.st_rdev), os.minor(found.st_rdev))
    if not stat.S_ISCHR(found.st_mode) or number != TUN_NUMBER:
        return Finding(NO, str(NODE), "it is something else", cost, f"rm {NODE}; {make}")
    try:
        os.close(os.open(NODE, os.O_RDWR))
    except OSError as error:
        if error.errno == errno.EACCES:
            fix = f"sudo, or chmod 666 {NODE}"
            return Finding(NO, str(NODE), "this user may not open it", cost, fix)
        return Finding(NO, str(NODE), error.strerror or str(error), cost, make)
    return Finding(OK, str(NODE), "opens")


def look_at_offloads() -> Finding:
    """What of large packets the kernel has at the device."""
    subject, every_packet = "offloads", "one system call for each packet of the MTU"
    descriptor = os.open(NODE, os.O_RDWR)
    try:
        features = bytearray(4)
        fcntl.ioctl(descriptor, TUNGETFEATURES, features)
        if not int.from_bytes(features, sys.byteorder) & IFF_VNET_HDR:
            return Finding(LESS, subject, "no vnet header", every_packet, "a Linux from 2.6.27 on")
        try:
            flags = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR
            fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", b"ttun%d", flags))
        except OSError as error:
            why = "it takes CAP_NET_ADMIN" if error.errno == errno.EPERM else str(error)
            mark = NO if privileges.has(privileges.NET_ADMIN) else UNSEEN
            cost = "no device can be made" if mark == NO else ""
            fix = "run it where this process owns the network" if mark == NO else ""
            found = f"vnet header; the rest not looked at: {why}"
            return Finding(mark, subject, found, cost, fix)
        return _offloads_of(descriptor)
    finally:
        os.close(descriptor)


def _offloads_of(descriptor: int) -> Finding:
    from ttun.device import OFFLOADS, TUNSETOFFLOAD

    shown = ["vnet header, TCP and UDP", "vnet header, TCP"]
    for (wanted, _), text in zip(OFFLOADS, shown):
        with contextlib.suppress(OSError):
            fcntl.ioctl(descriptor, TUNSETOFFLOAD, wanted)
            if text == shown[0]:
                return Finding(OK, "offloads", text)
            cost = "large UDP, QUIC for one, goes one packet at a time"
            return Finding(LESS, "offloads", f"{text}; not UDP", cost, "a Linux from 6.2 on")
    cost = "one system call for each packet of the MTU"
    return Finding(LESS, "offloads", "vnet header, neither TCP nor UDP", cost, "another kernel")


def look_at_ipv6() -> Finding:
    """Does a new device get IPv6?"""
    cost = "the tunnel carries IPv4 only"
    try:
        off = Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").read_text().strip() != "0"
    except OSError:
        return Finding(LESS, "IPv6", "not in this kernel", cost, "boot without ipv6.disable=1")
    if off:
        fix = "sysctl net.ipv6.conf.all.disable_ipv6=0 net.ipv6.conf.default.disable_ipv6=0"
        return Finding(LESS, "IPv6", "switched off", cost, fix)
    return Finding(OK, "IPv6", "on")


def look_at_aes() -> Finding:
    """Has the processor AES, and does libsodium use it?"""
    from ttun import cipher, sodium

    if sodium.HAS_AES:
        with_it = (each.name for each in cipher.CIPHERS.values() if each.without_aes != "fast")
        return Finding(OK, "AES", f"in the processor: {' and '.join(with_it)}")
    cost = f"{cipher.fast()[0].name} carries the packets, at a third to a quarter of the speed"
    words = Path("/proc/cpuinfo").read_text(errors="replace").split()
    if "aes" in words:
        found = "in the processor, but this libsodium does not use it"
        fix = "a PyNaCl whose libsodium does: a newer one, or pip install --no-binary pynacl pynacl"
        return Finding(LESS, "AES", found, cost, fix)
    fix = "none for this processor; to a virtual machine give the host's (qemu: -cpu host)"
    return Finding(LESS, "AES", "not in this processor", cost, fix)


def look_at_toxcore() -> Finding:
    """Is toxcore's library installed?"""
    try:
        ffi.dlopen(tox.LIBRARY)
    except OSError:
        cost = "no tunnel through Tox; over TCP nothing is lost"
        return Finding(LESS, "toxcore", f"no {tox.LIBRARY}", cost, tox.INSTALL)
    return Finding(OK, "toxcore", tox.LIBRARY)


def look_at_clock(today: datetime.date) -> Finding:
    """Is the date one that can be?"""
    if WRITTEN <= today < WRITTEN.replace(year=WRITTEN.year + 50):
        return Finding(OK, "clock", f"{today}, which can be")
    return Finding(
        LESS,
        "clock",
        f"{today}, which cannot be",
        "wrong dates in the log, and certificates fail for pip and apt; the tunnel needs no date",
        'date -s "YYYY-MM-DD hh:mm", then NTP; a board without a battery: fake-hwclock',
    )


def look_at_rp_filter() -> Iterator[Finding]:
    """Would ``--route default`` be refused, as answers would be dropped?"""
    outside = {route.device for route in ipv4_routes() if not route.network.prefixlen}
    if strict := sorted(filter(default_route.is_strict, outside)):
        yield Finding(
            LESS,
            "rp_filter",
            f"1 on {', '.join(strict)}",
            "ttun client --route default does not start",
            "; ".join(map(default_route.remedy, strict)),
        )


@dataclass(frozen=True)
class Route:
    """A route of the main table."""

    network: Network
    device: str


def ipv4_routes() -> list[Route]:
    """Read /proc/net/route, and the addresses themselves: one of /32 has no route there."""
    routes = []
    for line in _lines("/proc/net/route")[1:]:
        words = line.split()
        to, mask = (
            socket.inet_ntoa(int(word, 16).to_bytes(4, sys.byteorder))
            for word in (words[1], words[7])
        )
        routes.append(Route(ipaddress.IPv4Network(f"{to}/{mask}"), words[0]))
    return routes + _ipv4_addresses()


def _ipv4_addresses() -> list[Route]:
    """Ask SIOCGIFCONF for an array of struct ifreq: name, then struct sockaddr_in."""
    found = array.array("B", bytes(IFREQ_SIZE * MANY_ADDRESSES))
    request = struct.pack("iP", len(found), found.buffer_info()[0])  # struct ifconf
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        size = struct.unpack("iP", fcntl.ioctl(control, SIOCGIFCONF, request))[0]
    routes = []
    for at in range(0, size, IFREQ_SIZE):
        one = found[at : at + IFREQ_SIZE].tobytes()
        name = one[:16].partition(b"\0")[0].decode(errors="replace")
        routes.append(Route(ipaddress.IPv4Network(one[20:24]), name))
    return routes


def ipv6_routes() -> list[Route]:
    """Read /proc/net/ipv6_route; those of lo are what the kernel itself refuses."""
    routes = []
    for line in _lines("/proc/net/ipv6_route"):
        words = line.split()
        network = ipaddress.IPv6Network((bytes.fromhex(words[0]), int(words[1], 16)))
        if words[-1] != "lo":
            routes.append(Route(network, words[-1]))
    return routes


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="ascii").splitlines()
    except OSError:
        return []  # no IPv6 in this kernel


def look_at_addresses(subject: str, wanted: Network, routes: Iterable[Route]) -> Finding:
    """Does something else have the tunnel's addresses, or a route to them?"""
    taken: list[Route] = []
    around: list[Route] = []
    for route in routes:
        # A default route is no conflict: the tunnel's own is more specific.
        if route.network.prefixlen and route.network.overlaps(wanted):
            (taken if route.network.prefixlen >= wanted.prefixlen else around).append(route)
    if taken:
        names = sorted({route.device for route in taken})
        return Finding(
            LESS,
            subject,
            f"{wanted}: already on {', '.join(names)}",
            "packets for the tunnel may go there, and the other way round",
            "stop the other tunnel, or --local4, --peer4, --local6 and --peer6 on both ends",
        )
    if around:
        other = max(around, key=lambda route: route.network.prefixlen)
        return Finding(
            LESS,
            subject,
            f"{wanted}: inside {other.network} on {other.device}",
            f"the hosts of {wanted} there cannot be reached while the tunnel is up",
            "--local4, --peer4, --local6 and --peer6, with other addresses on both ends",
        )
    return Finding(OK, subject, f"{wanted}: free")
