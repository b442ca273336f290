"""``ttun doctor`` on the tunnel's connection: what this kernel has for it, and the way to a peer.

Sources: net/ipv4/tcp_cong.c, tcp(7) for tcp_rmem and tcp_wmem, Documentation/networking/mptcp.rst.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from pathlib import Path

from ttun import congestion, tcp
from ttun.address import Address
from ttun.commands import path_mtu
from ttun.commands.finding import LESS, NO, OK, UNREACHED, UNSEEN, Finding
from ttun.flag import Flag

SYSCTL = Path("/proc/sys/net/ipv4")
FAST = 200e6  # bit/s that the windows should let through
UNSEEN_RTT = 0.001  # seconds; nearer than this no window matters


def look_at_mptcp() -> Finding:
    """Does the kernel open a Multipath TCP socket?"""
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, tcp.IPPROTO_MPTCP).close()
    except OSError as error:
        off = Path("/proc/sys/net/mptcp/enabled").exists()
        return Finding(
            LESS,
            "Multipath TCP",
            "switched off" if off else f"not in this kernel ({error.strerror})",
            "-mptcp is plain TCP: the connection ends with its path",
            "sysctl net.mptcp.enabled=1" if off else "a Linux from 5.6 on, with CONFIG_MPTCP",
        )
    return Finding(OK, "Multipath TCP", "in this kernel")


def look_at_congestion_control() -> Finding:
    """May the tunnel's connection have bbr, after the drop of privileges too?"""
    subject = "congestion"
    system = "".join(_sysctl("tcp_congestion_control"))
    cost = (
        f"{system} takes each lost segment for congestion: at 50 Mbit/s, 40 ms and 1 % lost the "
        "tunnel carries 3 Mbit/s in place of 38"
    )
    try:
        with socket.socket() as scratch:
            scratch.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, congestion.FAR.encode())
    except OSError as error:
        if error.errno != errno.EPERM:
            fix = "modprobe tcp_bbr, also at boot; on OpenWrt: the package kmod-tcp-bbr"
            return Finding(LESS, subject, "no bbr in this kernel, or not loaded", cost, fix)
    allowed = _sysctl("tcp_allowed_congestion_control")
    if allowed and congestion.FAR not in allowed:
        fix = f'sysctl net.ipv4.tcp_allowed_congestion_control="{" ".join(allowed)} bbr"'
        return Finding(LESS, subject, "bbr, but only for root", cost, fix)
    return Finding(OK, subject, "bbr")


def _sysctl(name: str) -> list[str]:
    try:
        return (SYSCTL / name).read_text().split()
    except OSError:  # a container without it
        return []


def look_at_windows(rtt: float) -> Finding:
    """What do the kernel's largest windows let through in a round trip?"""
    most = []
    for name in ("tcp_wmem", "tcp_rmem"):
        size = int(_sysctl(name)[2])
        # About half of a buffer is bookkeeping: tcp_adv_win_scale of 1.
        most.append((size / 2 * 8 / max(rtt, UNSEEN_RTT), name, size))
    rate, name, size = min(most)
    found = f"{rate / 1e6:.0f} Mbit/s at {1000 * rtt:.1f} ms ({name}: {size})"
    if rate >= FAST:
        return Finding(OK, "windows", found)
    needed = 1 << int(FAST / 8 * rtt * 2).bit_length()
    words = " ".join(_sysctl(name)[:2])
    return Finding(
        LESS,
        "windows",
        found,
        "the tunnel carries no more than that to this peer",
        f'sysctl net.ipv4.{name}="{words} {needed}", on both ends',
    )


def look_at_peer(peer: Address) -> Iterator[Finding]:
    """Does a server answer there, and how large a packet gets through?"""
    subject = "server"
    try:
        sock = tcp.dial(peer, None, Flag())
    except (OSError, UnicodeError) as error:
        fix = "start ttun server there, and let its port through the firewalls in between"
        yield Finding(NO, subject, str(error), UNREACHED, fix)
    else:
        with sock:
            name = tcp.show(sock.getpeername())
            yield Finding(OK, subject, f"{name} takes connections")
            way = congestion.tcp_stats(sock)
            if way is not None and way.min_rtt is not None and _sysctl("tcp_wmem"):
                yield look_at_windows(way.min_rtt)
    try:
        family, _, _, _, address = socket.getaddrinfo(peer.host, peer.port, type=socket.SOCK_DGRAM)[
            0
        ]
        yield look_at_path(family, address)
    except (OSError, UnicodeError) as error:  # the latter of a name that cannot be one
        why = getattr(error, "strerror", None) or error
        yield Finding(UNSEEN, "path MTU", f"not looked at: {why}")


def look_at_path(family: int, address: tuple[object, ...]) -> Finding:
    """How large a packet gets to the peer?"""
    with path_mtu.Probe(family, address) as probe:
        passes, known = path_mtu.measure(probe)
    if passes == 0:
        found = f"{known} bytes as far as this kernel knows: the peer answers no probe"
        return Finding(UNSEEN, "path MTU", found)
    if passes == known:
        return Finding(OK, "path MTU", f"{known} bytes get there")
    return Finding(
        LESS,
        "path MTU",
        f"{passes} bytes get there, {known} are lost without a word",
        "connections hang once they send full packets",
        "sysctl net.ipv4.tcp_mtu_probing=1 on both ends",
    )
