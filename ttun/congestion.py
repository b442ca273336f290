"""Congestion control of the tunnel's connection, and its statistics.

1. start(): a socket starts with reno, whatever the system default. The kernel paces a socket until
   it is closed once any congestion control has asked for pacing, and on a low-latency path pacing
   costs CPU time for no gain.
2. choose(): after the handshake has measured the round-trip time, select bbr unless the peer is
   near. A congestion control that treats every lost segment as congestion, as cubic does, reaches
   a tenth of the rate of a lossy link (docs/performance.md). A ``congctl`` in the route
   (ip-route(8)) takes precedence.
3. TcpStats: round-trip time and retransmissions, for the log and ttun show.

The kernel loads a congestion control module only for a process with CAP_NET_ADMIN, so prepare()
requests it before privileges are dropped. After that, an unprivileged process can select bbr unless
net.ipv4.tcp_allowed_congestion_control excludes it.

Sources: tcp(7), struct tcp_info of linux/tcp.h, net/ipv4/tcp_cong.c,
https://github.com/google/bbr/blob/master/README.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import struct
from typing import Callable, NamedTuple

from ttun.errors import TtunError, UsageError

log = logging.getLogger("ttun")

AUTO, SYSTEM = "auto", "system"
FAR = "bbr"
PACING = "bbr"  # name prefix of congestion controls that pace
# Pacing sets a timer for each 64 KiB: at 20 Gbit/s that takes a tenth of two cores.
UNPACED = "reno"  # in every kernel, and always allowed
NEAR = 0.001  # seconds of round-trip time below which pacing does not help

NAME_MAX = 15  # bytes; TCP_CA_NAME_MAX includes a trailing zero
# struct tcp_info: total_retrans, min_rtt (microseconds), data_segs_out; each u32
TCP_INFO = struct.Struct("=100xI44xI4xI")


class TcpStats(NamedTuple):
    """The kernel's statistics of a connection."""

    control: str  # congestion control
    min_rtt: float | None  # seconds; None where the kernel does not report it
    retransmitted: float | None  # share of the data segments sent, 0 to 1


def checked(name: str) -> str:
    """Return name if it is valid for a congestion control. Raises UsageError."""
    if not 0 < len(name) <= NAME_MAX or not name.isascii() or not name.isprintable() or " " in name:
        raise UsageError(
            f"unknown congestion control {name!r}: choose {AUTO}, {SYSTEM}, or one of "
            "net.ipv4.tcp_available_congestion_control"
        )
    return name


def start(sock: socket.socket, wanted: str = AUTO) -> None:
    """Start a new socket, or a listener's connections, without pacing."""
    if wanted != SYSTEM:
        with contextlib.suppress(OSError):  # a socketpair, or reno is not allowed
            _set(sock, UNPACED)


def prepare(wanted: str) -> None:
    """Have the kernel load the module that choose() needs. Raises TtunError if it has none."""
    if wanted == SYSTEM:
        return
    try:
        with socket.socket() as scratch:
            _set(scratch, FAR if wanted == AUTO else wanted)
    except OSError as error:
        if wanted != AUTO and error.errno == errno.ENOENT:
            raise TtunError(f"cannot use {wanted}: {_why(wanted, error)}") from None


def choose(sock: socket.socket, wanted: str = AUTO) -> str | None:
    """Set the congestion control after the handshake; return an error text or None.

    wanted: a name; "auto" for bbr unless the peer is near, else the system default unless that
    paces; "system" for no change.
    """
    if wanted == SYSTEM:
        return None
    try:
        fresh = socket.socket(sock.family, socket.SOCK_STREAM)
    except OSError as error:  # no descriptor, no memory
        return f"{FAR if wanted == AUTO else wanted}: {os.strerror(error.errno or 0)}"
    with fresh:
        try:
            system = _get(fresh)
            start(fresh)
            if _get(sock) != _get(fresh):
                return None  # set by a route
        except OSError:
            return None  # a kernel without the option, or a socketpair
    if wanted == AUTO:
        near = _is_near(sock)
        wanted = (UNPACED if system.startswith(PACING) else system) if near else FAR
    try:
        _set(sock, wanted)
    except OSError as error:
        with contextlib.suppress(OSError):
            _set(sock, system)
        return f"{wanted}: {_why(wanted, error)}"
    return None


class Choice:
    """Apply an endpoint's congestion control option, and log the result."""

    def __init__(self, wanted: str) -> None:
        """wanted: see choose()."""
        self._wanted = wanted
        self._lacking: str | None = None  # the last error logged

    def choose(self, sock: socket.socket, say: Callable[..., object]) -> None:
        """Choose for a connection; log each error once. say: logs the result, like log.log."""
        why = choose(sock, self._wanted)
        if why is not None and why != self._lacking:
            log.warning("cannot use congestion control %s (see ttun doctor)", why)
        self._lacking = why
        if (stats := tcp_stats(sock)) is not None:
            rtt = "" if stats.min_rtt is None else f", round trip {1000 * stats.min_rtt:.2f} ms"
            say(logging.INFO, "congestion control %s%s", stats.control, rtt)


def tcp_stats(sock: socket.socket) -> TcpStats | None:
    """Return the statistics of a TCP connection; None if it is closed or not TCP."""
    try:
        name, info = _get(sock), sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO.size)
    except OSError:
        return None
    if len(info) < TCP_INFO.size:
        return TcpStats(name, None, None)
    retransmitted, min_rtt, sent = TCP_INFO.unpack(info)
    return TcpStats(name, min_rtt / 1e6, min(1.0, retransmitted / sent) if sent else None)


def _is_near(sock: socket.socket) -> bool:
    stats = tcp_stats(sock)
    return stats is not None and stats.min_rtt is not None and stats.min_rtt < NEAR


def _get(sock: socket.socket) -> str:
    name = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, NAME_MAX + 1)
    return name.partition(b"\0")[0].decode(errors="replace")


def _set(sock: socket.socket, name: str) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode())


def _why(name: str, error: OSError) -> str:
    if error.errno == errno.ENOENT:
        return f"not in this kernel, or module not loaded (modprobe tcp_{name})"
    if error.errno == errno.EPERM:
        return "not in net.ipv4.tcp_allowed_congestion_control"
    return os.strerror(error.errno or 0)
