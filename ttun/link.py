"""The TCP connection: addresses, listening, dialling, options, Multipath TCP.

Sources: tcp(7), socket(7), Documentation/networking/mptcp.rst, linux/mptcp.h.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import queue
import select
import socket
import sys
import threading
from typing import Callable, NamedTuple

from ttun.errors import TtunError, UsageError
from ttun.stop import StopFlag

log = logging.getLogger("ttun")

DEFAULT_PORT = 20203
BACKLOG = 128
DIAL_TIMEOUT = 4.0  # seconds for each address: TCP's first three SYNs
KEEPALIVE_IDLE, KEEPALIVE_INTERVAL, KEEPALIVE_COUNT = 15, 5, 4  # seconds, seconds, probes
USER_TIMEOUT = 35_000  # ms without an acknowledgement: as long as keepalive takes

NOTSENT_LOWAT = 32768  # bytes that wait in the socket before the device has to

# Pacing takes a timer for each 64 KiB: at 20 Gbit/s a tenth of two cores.
PACING = "bbr"  # how the names of the congestion controls that pace begin
UNPACED = "reno"  # in every kernel, and anybody's to choose
NEAR = 1000  # microseconds of round trip below which pacing is no use
TCP_INFO_MIN_RTT = 148  # offset in struct tcp_info of linux/tcp.h, a u32 of microseconds

IPPROTO_MPTCP = 262  # socket.IPPROTO_MPTCP from Python 3.10 on
SOL_MPTCP, MPTCP_INFO = 284, 1


class Address(NamedTuple):
    """A host (a name, an IPv4 or an IPv6 address; empty: every one of ours) and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        """Return it as it is written on the command line."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str, *, listening: bool) -> Address:
    """Read HOST:PORT, [IPv6]:PORT and, when listening, :PORT. Raises UsageError."""
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or not host:
            raise UsageError(f"{text!r}: an IPv6 address looks like [2001:db8::1]:{DEFAULT_PORT}")
    else:
        host, colon, port = text.partition(":")
        rest = colon + port
        if ":" in port:
            raise UsageError(f"{text!r}: put an IPv6 address in brackets, as in [2001:db8::1]:PORT")
    if not host and not listening:
        raise UsageError(f"{text!r}: a host is missing before the colon")
    if not rest:
        rest = f":{DEFAULT_PORT}"
    port = rest[1:]
    least = 0 if listening else 1
    if rest[0] != ":" or not (port.isascii() and port.isdigit() and least <= int(port) <= 65535):
        raise UsageError(f"{text!r}: the port is a number from {least} to 65535")
    return Address(host, int(port))


def listen(address: Address, mptcp: bool | None) -> socket.socket:
    """Return a listening socket. mptcp: True or None take both kinds of peer where they can."""
    try:
        info = socket.getaddrinfo(
            address.host or None,
            address.port,
            type=socket.SOCK_STREAM,
            flags=socket.AI_PASSIVE,
            family=socket.AF_UNSPEC if address.host or _has_ipv6() else socket.AF_INET,
        )
    except (OSError, UnicodeError) as error:
        raise TtunError(f"cannot listen on {address}: {_reason(error)}") from None
    family, bind_to = info[0][0], info[0][4]
    dual = not address.host and _has_ipv6()
    if dual:
        family, bind_to = socket.AF_INET6, ("::", address.port)
    try:
        listener = _open(family, mptcp is not False, quietly=mptcp is None)
    except OSError as error:
        raise TtunError(f"cannot listen on {address}: {_reason(error)}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(not dual))
        listener.bind(bind_to)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise TtunError(f"cannot listen on {address}: {_why_not_bound(error)}") from None
    listener.setblocking(False)
    return listener


def _has_ipv6() -> bool:
    """Return whether this kernel has IPv6; Python only knows what it was compiled with."""
    try:
        socket.socket(socket.AF_INET6, socket.SOCK_STREAM).close()
    except OSError:
        return False
    return True


def dial(
    address: Address,
    mptcp: bool | None,
    stop: StopFlag,
    why_not: Callable[[str], str | None] = lambda _: None,
) -> socket.socket:
    """Return a socket connected to one of the addresses of a name, looked up now.

    why_not: gives a reason for an address that is not to be dialled. Raises OSError with a line
    that names what was tried; InterruptedError when stop was set.
    """
    failures = []
    for family, target in _look_up(address, stop):
        if reason := why_not(target[0]):
            failures.append(reason)
            continue
        try:
            return _connect(family, target, mptcp is True, stop)
        except InterruptedError:
            raise
        except OSError as error:
            failures.append(f"{show(target)}: {_reason(error)}")
    raise OSError("; ".join(failures) or f"{address.host} has no address")


def _look_up(address: Address, stop: StopFlag) -> list[tuple[int, tuple[str, int]]]:
    """Resolve a name on a thread of its own: getaddrinfo cannot be interrupted, we can."""
    answers: queue.SimpleQueue[list[tuple[int, tuple[str, int]]] | Exception]
    answers = queue.SimpleQueue()

    def look_up() -> None:
        try:
            found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
            answers.put([(family, target) for family, _, _, _, target in found])  # type: ignore[misc]
        except (OSError, UnicodeError) as error:
            answers.put(error)

    threading.Thread(target=look_up, name="ttun-lookup", daemon=True).start()
    while not stop.is_set():
        with contextlib.suppress(queue.Empty):
            answer = answers.get(timeout=0.1)
            if isinstance(answer, Exception):
                raise OSError(f"{address.host}: {_reason(answer)}")
            return answer
    raise InterruptedError


def _connect(family: int, target: tuple[str, int], mptcp: bool, stop: StopFlag) -> socket.socket:
    sock = _open(family, mptcp, quietly=False)
    try:
        sock.setblocking(False)
        error = sock.connect_ex(target)
        if error == errno.EINPROGRESS:
            waiting = select.poll()
            waiting.register(sock, select.POLLOUT)
            waiting.register(stop, select.POLLIN)
            ready = waiting.poll(DIAL_TIMEOUT * 1000)
            if stop.is_set():
                raise InterruptedError
            if not ready:
                raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
            error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise OSError(error, os.strerror(error))
        return sock
    except BaseException:
        sock.close()
        raise


def _open(family: int, mptcp: bool, *, quietly: bool) -> socket.socket:
    """Open a stream socket: Multipath TCP if wanted and in this kernel, else plain TCP."""
    sock = None
    if mptcp:
        try:
            sock = socket.socket(family, socket.SOCK_STREAM, IPPROTO_MPTCP)
        except OSError as error:
            if error.errno == errno.EAFNOSUPPORT:
                raise
            if not quietly:
                log.info("no Multipath TCP in this kernel (%s): plain TCP", _reason(error))
    sock = sock or socket.socket(family, socket.SOCK_STREAM)
    # Where a congestion control asked for pacing once, the kernel paces until the socket's end.
    with contextlib.suppress(OSError):
        if _congestion_control(sock).startswith(PACING):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, UNPACED.encode())
    return sock


def tune(sock: socket.socket) -> None:
    """Set the options of a connection: no delay, keepalive, a bound on unanswered data."""
    options = [
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_COUNT),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT),
        (socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, NOTSENT_LOWAT),
    ]
    for level, option, value in options:
        # MPTCP sockets lack some of them (ENOPROTOOPT); a socketpair has none.
        with contextlib.suppress(OSError):
            sock.setsockopt(level, option, value)


def choose_congestion_control(sock: socket.socket) -> None:
    """Give a connection the system's congestion control, now that a handshake measured the way.

    Only where that one paces and the peer is nearer than NEAR, the connection stays unpaced. What
    a route says (``congctl`` of ip-route(8)) stays too.
    """
    with contextlib.suppress(OSError):  # a kernel without the option; a socketpair
        if _congestion_control(sock) != UNPACED:
            return
        with socket.socket(sock.family, socket.SOCK_STREAM) as fresh:
            system = _congestion_control(fresh)
        if system.startswith(PACING) and not (transport(sock) == "tcp" and _min_rtt(sock) < NEAR):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, system.encode())


def _congestion_control(sock: socket.socket) -> str:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0").decode()


def _min_rtt(sock: socket.socket) -> int:
    """Return the shortest round trip so far in microseconds; NEAR where the kernel is too old."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_MIN_RTT + 4)
    if len(info) < TCP_INFO_MIN_RTT + 4:
        return NEAR
    return int.from_bytes(info[TCP_INFO_MIN_RTT:], sys.byteorder)


def transport(sock: socket.socket) -> str:
    """Return what a connection really is: ``mptcp``, or ``tcp`` also where MPTCP fell back, or
    ``tox``: one end of a socketpair whose other end is a Tox stream.
    """
    if sock.family == socket.AF_UNIX:
        return "tox"
    try:
        sock.getsockopt(SOL_MPTCP, MPTCP_INFO, 4)
        return "mptcp"
    except OSError:
        return "tcp"


def show(sockaddr: tuple[str, int]) -> str:
    """Return a socket address as people write it; an IPv4 one without its IPv6 disguise."""
    return str(Address(sockaddr[0].removeprefix("::ffff:"), sockaddr[1]))


def _reason(error: Exception) -> str:
    if isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN:
        return "temporary failure in name resolution"  # glibc's words; musl's are «Try again»
    return getattr(error, "strerror", None) or str(error)


def _why_not_bound(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "another program has that port; stop it or choose another"
    if error.errno == errno.EADDRNOTAVAIL:
        return "this machine has no such address"
    if error.errno == errno.EACCES:
        return "ports below 1024 need root"
    return _reason(error)
