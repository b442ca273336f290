"""``ttun doctor``: check what a tunnel needs on this machine, and say how to fix what is missing.

In this order: the packages that ttun imports, another project of the same name, privileges, the TUN
device and its offloads, IPv6, AES in the processor, Multipath TCP, congestion control, toxcore, the
clock, conflicts of the tunnel's addresses, forwarding and reverse path filtering. If a server is
named: whether it accepts connections, the TCP buffers and the path MTU. Nothing is changed: the
device made to try the offloads is never up and is removed again. Without root some items are
skipped.

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
from pathlib import Path

from ttun import privileges, tox
from ttun._codec import ffi, lib
from ttun.address import Address
from ttun.commands.doctor_connection import (
    look_at_congestion_control,
    look_at_forwarding,
    look_at_mptcp,
    look_at_peer,
    look_at_reverse_path,
)
from ttun.commands.finding import FAIL, OK, SKIP, UNREACHED, WARN, Finding
from ttun.errors import TtunError
from ttun.network import default_route
from ttun.network.routes import Route, ipv4_routes, ipv6_routes
from ttun.settings import SERVER, Network

DISTRIBUTION, NAMESAKE = "ttun-tunnel", "ttun"  # ours, and another project's on PyPI
NODE = Path("/dev/net/tun")
TUN_NUMBER = (10, 200)  # Documentation/admin-guide/devices.txt
IFF_TUN, IFF_NO_PI, IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
SIOCGIFCONF, SIOCGIFHWADDR = 0x8912, 0x8927  # linux/sockios.h
ARPHRD_NONE = 0xFFFE  # linux/if_arp.h: of a TUN device
IFREQ_SIZE = struct.calcsize("16sP") + (16 if struct.calcsize("P") == 8 else 12)
MANY_ADDRESSES = 1000
WRITTEN = datetime.date(2026, 1, 1)  # a correct clock is not older than this program
NO_DEVICE = "cannot create a TUN device"
ONE_BY_ONE = "a system call for each packet"
OTHER_ADDRESSES = "set other addresses on both ends: --local4, --peer4, --local6, --peer6"


def run(peer: Address | None) -> int:
    """Print each finding as it is made; return 0 if a tunnel can run here, else 1."""
    if not Path("/proc/self").exists():
        raise TtunError("/proc is not mounted (mount -t proc proc /proc)")
    marks, missing = [], set()
    for finding in look(peer):
        print(finding, flush=True)
        marks.append(finding.mark)
        if finding.mark == FAIL:
            missing.add(finding.effect)
    warnings = marks.count(WARN)
    if missing:
        what = "reach this server" if missing == {UNREACHED} else "run on this machine"
        print(f"\nA tunnel cannot {what}: fix the items marked FAIL.")
        return 1
    some = f", with {warnings} warning{'s' * (warnings > 1)}" if warnings else ""
    print(f"\nA tunnel can run on this machine{some}.")
    return 0


def look(peer: Address | None) -> Iterator[Finding]:
    """Yield the findings, in the order of the report."""
    packages = look_at_packages()
    yield packages
    yield from look_at_namesake()
    yield look_at_privileges()
    node = look_at_node()
    yield node
    if packages.mark == OK:
        if node.mark == OK:
            yield look_at_offloads()
        else:
            yield Finding(SKIP, "offloads", f"not checked: cannot open {NODE}")
    yield look_at_ipv6()
    if packages.mark == OK:
        yield look_at_aes()
    yield look_at_mptcp()
    yield look_at_congestion_control()
    yield look_at_toxcore()
    yield look_at_clock(datetime.datetime.now().date())
    if packages.mark == OK:
        routes4, routes6 = ipv4_routes() + ipv4_addresses(), ipv6_routes()
        own = own_devices([*routes4, *routes6])
        yield look_at_addresses("IPv4 addresses", SERVER.ipv4.network, routes4, own)
        yield look_at_addresses("IPv6 addresses", SERVER.ipv6.network, routes6, own)
        yield look_at_reverse_path(own)
        yield from look_at_rp_filter()
    yield look_at_forwarding()
    if peer is not None:
        yield from look_at_peer(peer)


def look_at_packages() -> Finding:
    """Import what a tunnel imports."""
    try:
        import ttun.device
        import ttun.sodium  # noqa: F401
    except ImportError as error:
        fix = "run make in its directory; elsewhere pip install pynacl cffi python-pytun"
        return Finding(FAIL, "packages", str(error), "ttun does not run", fix)
    except TtunError as error:
        return Finding(FAIL, "packages", str(error), "ttun does not run")
    return Finding(OK, "packages", "codec, PyNaCl and python-pytun load")


def look_at_namesake() -> Iterator[Finding]:
    """Yield a finding if the project that is called ttun on PyPI is installed."""
    try:
        from importlib import metadata

        other = metadata.distribution(NAMESAKE)
    except ImportError:  # not installed, or a Python without importlib.metadata
        return
    found = f"{NAMESAKE} {other.version} in {other.locate_file('')} is another project"
    effect = "package and command have the same names: each overwrites the other's files"
    fix = f"pip uninstall {NAMESAKE}; then reinstall {DISTRIBUTION}"
    yield Finding(WARN, "other ttun", found, effect, fix)


def look_at_privileges() -> Finding:
    """Check whether this process may create a network device."""
    if privileges.has(privileges.NET_ADMIN):
        return Finding(OK, "privileges", "CAP_NET_ADMIN")
    fix = "use sudo; in a container --cap-add NET_ADMIN"
    if not (mine := sorted(prepared_devices())):
        return Finding(FAIL, "privileges", "no CAP_NET_ADMIN", NO_DEVICE, fix)
    found = f"no CAP_NET_ADMIN; prepared for this user: {', '.join(mine)}"
    return Finding(WARN, "privileges", found, f"a tunnel runs with --dev {mine[0]} only")


def prepared_devices() -> Iterator[str]:
    """Yield the TUN devices that this user may attach to (drivers/net/tun.c, tun_attr_owner)."""
    for path in Path("/sys/class/net").glob("*/owner"):
        with contextlib.suppress(OSError):
            if path.read_text().strip() == str(os.geteuid()):
                yield path.parent.name


def look_at_node() -> Finding:
    """Check that /dev/net/tun exists, is the TUN device, and can be opened."""
    make = (
        f"modprobe tun; in a container --device {NODE}, or "
        f"mkdir -p {NODE.parent} && mknod {NODE} c 10 200"
    )
    try:
        found = NODE.stat()
    except OSError as error:
        return Finding(FAIL, str(NODE), error.strerror or str(error), NO_DEVICE, make)
    number = (os.major(found.st_rdev), os.minor(found.st_rdev))
    if not stat.S_ISCHR(found.st_mode) or number != TUN_NUMBER:
        return Finding(FAIL, str(NODE), "not the TUN device", NO_DEVICE, f"rm {NODE}; {make}")
    try:
        os.close(os.open(NODE, os.O_RDWR))
    except OSError as error:
        if error.errno == errno.EACCES:
            fix = f"use sudo, or chmod 666 {NODE}"
            return Finding(FAIL, str(NODE), "permission denied", NO_DEVICE, fix)
        return Finding(FAIL, str(NODE), error.strerror or str(error), NO_DEVICE, make)
    return Finding(OK, str(NODE), "can be opened")


def look_at_offloads() -> Finding:
    """Check which offloads the kernel has at a TUN device."""
    subject = "offloads"
    descriptor = os.open(NODE, os.O_RDWR)
    try:
        features = bytearray(4)
        fcntl.ioctl(descriptor, lib.TUNGETFEATURES, features)
        if not int.from_bytes(features, sys.byteorder) & IFF_VNET_HDR:
            return Finding(WARN, subject, "no vnet header", ONE_BY_ONE, "Linux 2.6.27 or newer")
        try:
            flags = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR
            fcntl.ioctl(descriptor, lib.TUNSETIFF, struct.pack("16sH22x", b"ttun%d", flags))
        except OSError as error:
            why = "requires CAP_NET_ADMIN" if error.errno == errno.EPERM else str(error)
            mark = FAIL if privileges.has(privileges.NET_ADMIN) else SKIP
            effect = NO_DEVICE if mark == FAIL else ""
            fix = "run it in a network namespace of its user namespace" if mark == FAIL else ""
            found = f"vnet header; TCP and UDP not checked: {why}"
            return Finding(mark, subject, found, effect, fix)
        return _offloads_of(descriptor)
    finally:
        os.close(descriptor)


def _offloads_of(descriptor: int) -> Finding:
    from ttun.device import OFFLOADS

    shown = ["vnet header, TCP and UDP", "vnet header, TCP"]
    for (wanted, _), text in zip(OFFLOADS, shown):
        with contextlib.suppress(OSError):
            fcntl.ioctl(descriptor, lib.TUNSETOFFLOAD, wanted)
            if text == shown[0]:
                return Finding(OK, "offloads", text)
            effect = "a system call for each UDP packet, as of QUIC"
            return Finding(WARN, "offloads", f"{text}; no UDP", effect, "Linux 6.2 or newer")
    found = "vnet header; no TCP, no UDP"
    return Finding(WARN, "offloads", found, ONE_BY_ONE, "a kernel with offloads for TUN devices")


def look_at_ipv6() -> Finding:
    """Check whether a new device has IPv6."""
    effect = "the tunnel carries IPv4 only"
    try:
        off = Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").read_text().strip() != "0"
    except OSError:
        return Finding(WARN, "IPv6", "not available", effect, "boot without ipv6.disable=1")
    if off:
        fix = "sysctl net.ipv6.conf.all.disable_ipv6=0 net.ipv6.conf.default.disable_ipv6=0"
        return Finding(WARN, "IPv6", "disabled", effect, fix)
    return Finding(OK, "IPv6", "enabled")


def look_at_aes() -> Finding:
    """Check whether the processor has AES instructions, and libsodium uses them."""
    from ttun import cipher, sodium

    if sodium.HAS_AES:
        with_it = (each.name for each in cipher.CIPHERS.values() if each.without_aes != "fast")
        return Finding(OK, "AES", f"in hardware: {' and '.join(with_it)}")
    effect = f"{cipher.fast()[0].name} is used, at a quarter to a third of the speed"
    words = Path("/proc/cpuinfo").read_text(errors="replace").split()
    if "aes" in words:
        found = "in hardware, but not used by this libsodium"
        fix = "a newer PyNaCl, or pip install --no-binary pynacl pynacl"
        return Finding(WARN, "AES", found, effect, fix)
    fix = "none for this processor; give a virtual machine the host's (qemu: -cpu host)"
    return Finding(WARN, "AES", "not in this processor", effect, fix)


def look_at_toxcore() -> Finding:
    """Check whether toxcore's library is installed."""
    try:
        ffi.dlopen(tox.LIBRARY)
    except OSError:
        effect = "no tunnel through Tox; TCP is not affected"
        return Finding(WARN, "toxcore", f"{tox.LIBRARY} not found", effect, tox.INSTALL)
    return Finding(OK, "toxcore", tox.LIBRARY)


def look_at_clock(today: datetime.date) -> Finding:
    """Check whether the date is plausible."""
    if WRITTEN <= today < WRITTEN.replace(year=WRITTEN.year + 50):
        return Finding(OK, "clock", f"{today}, plausible")
    effect = "wrong dates in the log; pip and apt reject certificates; the tunnel needs no date"
    fix = 'date -s "YYYY-MM-DD hh:mm", then NTP; on a board without a battery fake-hwclock'
    return Finding(WARN, "clock", f"{today}, not plausible", effect, fix)


def look_at_rp_filter() -> Iterator[Finding]:
    """Yield a finding if ``--route default`` is refused, as answers would be dropped."""
    outside = {route.device for route in ipv4_routes() if not route.network.prefixlen}
    if strict := sorted(filter(default_route.is_strict, outside)):
        effect = "ttun client --route default does not start"
        fix = "; ".join(map(default_route.remedy, strict))
        yield Finding(WARN, "rp_filter", f"1 on {', '.join(strict)}", effect, fix)


def ipv4_addresses() -> list[Route]:
    """Return the addresses of all devices, as routes: a /32 has none in the main table."""
    found = array.array("B", bytes(IFREQ_SIZE * MANY_ADDRESSES))
    request = struct.pack("iP", len(found), found.buffer_info()[0])  # struct ifconf
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        size = struct.unpack("iP", fcntl.ioctl(control, SIOCGIFCONF, request))[0]
    routes = []
    for at in range(0, size, IFREQ_SIZE):  # struct ifreq: a name, then struct sockaddr_in
        one = found[at : at + IFREQ_SIZE].tobytes()
        name = os.fsdecode(one[:16].partition(b"\0")[0])
        routes.append(Route(ipaddress.IPv4Network(one[20:24]), name))
    return routes


def own_devices(routes: Iterable[Route]) -> set[str]:
    """Return those devices of routes that running tunnels of this network namespace have.

    A tunnel's answer is the word of its user, so each has to be a device without a link layer too.
    """
    from ttun.commands import show
    from ttun.commands.answer import own_netns

    try:
        said = {tunnel["device"] for tunnel in show.ask(None) if tunnel["netns"] == own_netns()}
    except TtunError:  # none is running, or none that may be asked
        return set()
    return {name for name in {route.device for route in routes} & said if _has_no_link(name)}


def _has_no_link(device: str) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        try:
            found = fcntl.ioctl(control, SIOCGIFHWADDR, struct.pack("40s", os.fsencode(device)))
        except OSError:  # it has just been removed
            return False
    return int.from_bytes(found[16:18], sys.byteorder) == ARPHRD_NONE


def look_at_addresses(
    subject: str, wanted: Network, routes: Iterable[Route], own: Iterable[str] = ()
) -> Finding:
    """Check whether another device than own ones has the tunnel's addresses, or a route to them."""
    mine = set()
    taken: list[Route] = []
    around: list[Route] = []
    for route in routes:
        # A default route is no conflict: the tunnel's route is more specific.
        if route.network.prefixlen and route.network.overlaps(wanted):
            if route.device in own:
                mine.add(route.device)
                continue
            (taken if route.network.prefixlen >= wanted.prefixlen else around).append(route)
    if taken:
        found = f"{wanted}: in use on {', '.join(sorted({route.device for route in taken}))}"
        fix = f"stop the other tunnel, or {OTHER_ADDRESSES}"
        return Finding(WARN, subject, found, "traffic may be misrouted", fix)
    if around:
        other = max(around, key=lambda route: route.network.prefixlen)
        found = f"{wanted}: inside {other.network} on {other.device}"
        effect = f"its hosts in {wanted} are unreachable while the tunnel is up"
        return Finding(WARN, subject, found, effect, OTHER_ADDRESSES)
    whose = f"of the running tunnel {', '.join(sorted(mine))}" if mine else "free"
    return Finding(OK, subject, f"{wanted}: {whose}")
