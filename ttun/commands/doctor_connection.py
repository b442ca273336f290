"""``ttun doctor`` on the network: forwarding, what the kernel has for the tunnel's connection, and
the path to a server.

Sources: ip-sysctl.rst, net/ipv4/tcp_cong.c, tcp(7) for tcp_rmem and tcp_wmem,
Documentation/networking/mptcp.rst.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path

from ttun import congestion, tcp
from ttun.address import Address
from ttun.commands import path_mtu
from ttun.commands.finding import FAIL, OK, SKIP, UNREACHED, WARN, Finding
from ttun.errors import reason
from ttun.flag import Flag
from ttun.network import resolver
from ttun.network.default_route import is_strict
from ttun.network.routes import ipv6_routes

SYSCTL = Path("/proc/sys/net/ipv4")
FAST = 200e6  # bit/s that the buffers should allow
LEAST_RTT = 0.001  # seconds; below this no buffer is a limit


def look_at_mptcp() -> Finding:
    """Check whether the kernel opens a Multipath TCP socket."""
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, tcp.IPPROTO_MPTCP).close()
    except OSError as error:
        off = Path("/proc/sys/net/mptcp/enabled").exists()
        found = "disabled" if off else f"not in this kernel ({error.strerror})"
        effect = "-mptcp uses plain TCP: the connection does not survive the loss of its path"
        fix = "sysctl net.mptcp.enabled=1" if off else "Linux 5.6 or newer, with CONFIG_MPTCP"
        return Finding(WARN, "Multipath TCP", found, effect, fix)
    return Finding(OK, "Multipath TCP", "available")


def look_at_congestion_control() -> Finding:
    """Check whether the tunnel's connection can use bbr, also once privileges are dropped."""
    subject = "congestion"
    system = "".join(_sysctl("tcp_congestion_control"))
    effect = (
        f"{system} treats each lost segment as congestion: at 50 Mbit/s, 40 ms and 1 % loss the "
        "tunnel carries 3 Mbit/s instead of 38"
    )
    try:
        with socket.socket() as scratch:
            scratch.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, congestion.FAR.encode())
    except OSError as error:
        if error.errno != errno.EPERM:
            fix = "modprobe tcp_bbr, also at boot; on OpenWrt the package kmod-tcp-bbr"
            return Finding(WARN, subject, "bbr not in this kernel, or not loaded", effect, fix)
    allowed = _sysctl("tcp_allowed_congestion_control")
    if allowed and congestion.FAR not in allowed:
        fix = f'sysctl net.ipv4.tcp_allowed_congestion_control="{" ".join(allowed)} bbr"'
        return Finding(WARN, subject, "bbr for root only", effect, fix)
    return Finding(OK, subject, "bbr")


def _sysctl(name: str) -> list[str]:
    try:
        return (SYSCTL / name).read_text().split()
    except OSError:  # not in this container
        return []


def look_at_forwarding() -> Finding:
    """Check whether this machine forwards packets of networks behind it."""
    off = []
    for name in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
        if _sysctl(f"../{name}") == ["0"]:
            off.append(f"net.{name.replace('/', '.')}")
    if not off:
        return Finding(OK, "forwarding", "enabled")
    # Unless accept_ra is 2, a router drops the default route of a router advertisement.
    advertised = {
        route.device.replace(".", "/")
        for route in ipv6_routes()
        if "ipv6" in off[-1] and route.network.prefixlen == 0 and route.advertised
    }
    settings = [f"net.ipv6.conf.{name}.accept_ra=2" for name in sorted(advertised)]
    settings += [f"{name}=1" for name in off]
    found = f"disabled: {' and '.join(f'{name}=0' for name in off)}"
    effect = "networks behind this machine cannot use the tunnel, only the machine itself"
    fix = f"if it routes for others: sysctl {' '.join(settings)}"
    return Finding(WARN, "forwarding", found, effect, fix)


def look_at_reverse_path(devices: Iterable[str]) -> Finding:
    """Check whether the kernel drops packets from the tunnel whose source is routed elsewhere.

    devices: of running tunnels.
    """
    subject = "reverse path"
    strict = sorted(filter(is_strict, [*devices] or ["default"]))
    if not strict:
        return Finding(OK, subject, "not filtered strictly")
    # sysctl(8): a slash stands for a dot in the name of a device.
    which = ["all"] if is_strict("all") else [name.replace(".", "/") for name in strict]
    names = [f"net.ipv4.conf.{name}.rp_filter" for name in which]
    rows = [row.split() for row in Path("/proc/net/netstat").read_text().splitlines()[:2]]
    dropped = dict(zip(*rows)).get("IPReversePathFilter", "0")
    found = f"strict: {'=1, '.join(names)}=1 ({dropped} packets dropped since boot)"
    effect = "packets from the tunnel are silently dropped if their source is routed elsewhere"
    fix = f"sysctl {'=2 '.join(names)}=2, or --route for each network behind the peer"
    return Finding(WARN, subject, found, effect, fix)


def look_at_buffers(rtt: float) -> Finding:
    """Check which rate the kernel's largest TCP buffers allow at a round-trip time in seconds."""
    most = []
    for name in ("tcp_wmem", "tcp_rmem"):
        size = int(_sysctl(name)[2])
        # About half of a buffer is bookkeeping: tcp_adv_win_scale of 1.
        most.append((size / 2 * 8 / max(rtt, LEAST_RTT), name, size))
    rate, name, size = min(most)
    found = f"{rate / 1e6:.0f} Mbit/s at {1000 * rtt:.1f} ms ({name}: {size})"
    if rate >= FAST:
        return Finding(OK, "TCP buffers", found)
    needed = 1 << int(FAST / 8 * rtt * 2).bit_length()
    words = " ".join(_sysctl(name)[:2])
    fix = f'sysctl net.ipv4.{name}="{words} {needed}", on both ends'
    return Finding(WARN, "TCP buffers", found, "limits the throughput to this server", fix)


def look_at_peer(peer: Address) -> Iterator[Finding]:
    """Check whether a server accepts connections, and the path to it."""
    subject = "server"
    try:
        targets = resolver.look_up(peer.host, peer.port, Flag())
    except (OSError, UnicodeError) as error:  # the latter for a malformed name
        found, fix = f"{peer.host}: {reason(error)}", "check the name, and /etc/resolv.conf"
        yield Finding(FAIL, subject, found, UNREACHED, fix)
        yield Finding(SKIP, "path MTU", "not checked: no address")
        return
    family, address = targets[0]
    try:
        with tcp.dial(peer, None, Flag()) as sock:
            family, address = sock.family, sock.getpeername()
            yield Finding(OK, subject, f"{tcp.show(address)} accepts connections")
            way = congestion.tcp_stats(sock)
            if way is not None and way.min_rtt is not None and _sysctl("tcp_wmem"):
                yield look_at_buffers(way.min_rtt)
    except OSError as error:
        fix = "start ttun server there, and open its port in the firewalls between"
        if os.strerror(errno.ENETUNREACH) in str(error):
            fix = "check this machine's addresses and gateway (ip address, ip route)"
        yield Finding(FAIL, subject, str(error), UNREACHED, fix)
    try:
        yield look_at_path(family, address)
    except OSError as error:
        yield Finding(SKIP, "path MTU", f"not checked: {reason(error)}")


def look_at_path(family: int, address: tuple[object, ...]) -> Finding:
    """Measure the path MTU to the server."""
    with path_mtu.Probe(family, address) as probe:
        passes, known = path_mtu.measure(probe)
    if passes == 0:
        found = f"{known} bytes according to the kernel; the server answers no probe"
        return Finding(SKIP, "path MTU", found)
    if passes == known:
        return Finding(OK, "path MTU", f"{known} bytes")
    found = f"{passes} bytes; larger packets, up to {known}, are silently dropped"
    effect = "connections hang when they send full-size packets"
    fix = "sysctl net.ipv4.tcp_mtu_probing=1 on both ends"
    return Finding(WARN, "path MTU", found, effect, fix)
