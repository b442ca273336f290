"""Congestion control of the tunnel's connection: which one, and what the kernel knows of the way.

1. start(): a socket begins unpaced, with reno, whatever the system's is. One that asked for pacing
   once is paced by the kernel until its end, and towards a near peer that costs and brings nothing.
2. choose(): once a handshake has measured the round trip, a connection to a peer that is not near
   gets bbr. One TCP connection that takes each lost segment for congestion, as cubic does, carries
   a tenth of such a link (docs/performance.md). What a route says (``congctl`` of ip-route(8))
   stays.
3. Way: round trip, retransmitted share, for the log and for ttun show.

The kernel loads the module of a congestion control only for a process with CAP_NET_ADMIN, so
prepare() asks for it before privileges are dropped. Anybody may choose bbr then, unless an
administrator's net.ipv4.tcp_allowed_congestion_control leaves it out.

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
from typing import NamedTuple

from ttun.errors import TtunError, UsageError

log = logging.getLogger("ttun")

AUTO, SYSTEM = "auto", "system"
FAR = "bbr"
PACING = "bbr"  # how the names of those that pace begin
# Pacing takes a timer for each 64 KiB: at 20 Gbit/s a tenth of two cores.
UNPACED = "reno"  # in every kernel, and anybody's to choose
NEAR = 0.001  # seconds of round trip below which pacing is no use

NAME_MAX = 15  # bytes; TCP_CA_NAME_MAX has a zero behind it
# total_retrans; min_rtt, data_segs_out: all u32, in segments and microseconds
TCP_INFO = struct.Struct("=100xI44xI4xI")


class Way(NamedTuple):
    """What the kernel knows of a connection."""

    control: str  # the name of its congestion control
    min_rtt: float | None  # seconds; None in a kernel too old to tell
    retransmitted: float | None  # of the segments with data that were sent, 0 to 1


def checked(name: str) -> str:
    """Return a name that may be one of a congestion control. Raises UsageError."""
    if not 0 < len(name) <= NAME_MAX or not name.isascii() or not name.isprintable() or " " in name:
        raise UsageError(
            f"unknown congestion control {name!r}: choose {AUTO}, {SYSTEM}, or one of "
            "net.ipv4.tcp_available_congestion_control"
        )
    return name


def start(sock: socket.socket, wanted: str = AUTO) -> None:
    """Have a new socket begin unpaced, a listener's connections too."""
    if wanted != SYSTEM:
        with contextlib.suppress(OSError):  # a socketpair; an administrator who allows others only
            _set(sock, UNPACED)


def prepare(wanted: str) -> None:
    """Have the kernel load what choose() will want. Raises TtunError where that is not known."""
    if wanted == SYSTEM:
        return
    try:
        with socket.socket() as scratch:
            _set(scratch, FAR if wanted == AUTO else wanted)
    except OSError as error:
        if wanted != AUTO and error.errno == errno.ENOENT:
            raise TtunError(f"cannot use {wanted}: {_why(wanted, error)}") from None


def choose(sock: socket.socket, wanted: str = AUTO) -> str | None:
    """Choose for a connection whose handshake is done; return why it cannot have what it should.

    wanted: a name, for every connection; "auto" for bbr where the peer is not near, else the
    system's if that does not pace; "system" to leave it alone.
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
                return None  # a route's
        except OSError:
            return None  # a kernel without the option; a socketpair
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
    """What an endpoint does about it, and what it says of that."""

    def __init__(self, wanted: str) -> None:
        """wanted: as choose() takes it."""
        self._wanted = wanted
        self._lacking: str | None = None  # what was said last

    def prepare(self) -> None:
        """See prepare()."""
        prepare(self._wanted)

    def choose(self, sock: socket.socket) -> None:
        """Choose for a connection, and say once for each reason why it cannot be had."""
        why = choose(sock, self._wanted)
        if why is not None and why != self._lacking:
            log.warning("cannot use congestion control %s (see ttun doctor)", why)
        self._lacking = why
        if (found := way(sock)) is not None:
            rtt = "" if found.min_rtt is None else f", round trip {1000 * found.min_rtt:.1f} ms"
            log.info("congestion control %s%s", found.control, rtt)


def way(sock: socket.socket) -> Way | None:
    """Return what the kernel knows of a connection; None of one that is closed or is not TCP."""
    try:
        name, info = _get(sock), sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO.size)
    except OSError:
        return None
    if len(info) < TCP_INFO.size:
        return Way(name, None, None)
    retransmitted, min_rtt, sent = TCP_INFO.unpack(info)
    return Way(name, min_rtt / 1e6, min(1.0, retransmitted / sent) if sent else None)


def _is_near(sock: socket.socket) -> bool:
    found = way(sock)
    return found is not None and found.min_rtt is not None and found.min_rtt < NEAR


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
