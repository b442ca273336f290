"""The TCP connection: addresses, listening, dialling, options, Multipath TCP.

Sources: tcp(7), socket(7), Documentation/networking/mptcp.rst, linux/mptcp.h.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import socket

from ttun import congestion, resolver
from ttun.address import Address, parse_host_port
from ttun.errors import TtunError
from ttun.flag import Flag
from ttun.resolver import SocketAddress, Target, reason

log = logging.getLogger("ttun")

DEFAULT_PORT = 20203
BACKLOG = 128
DIAL_TIMEOUT = 4.0  # seconds for each address: TCP's first three SYNs
KEEPALIVE_IDLE, KEEPALIVE_INTERVAL, KEEPALIVE_COUNT = 15, 5, 4  # seconds, seconds, probes
USER_TIMEOUT = 35_000  # ms without an acknowledgement: as long as keepalive takes

NOTSENT_LOWAT = 32768  # bytes that wait in the socket before the device has to

IPPROTO_MPTCP = 262  # socket.IPPROTO_MPTCP from Python 3.10 on
SOL_MPTCP, MPTCP_INFO = 284, 1


def parse_address(text: str, *, listening: bool) -> Address:
    """Read HOST:PORT, [IPv6]:PORT and, when listening, :PORT. Raises UsageError."""
    return parse_host_port(text, DEFAULT_PORT, 0 if listening else 1, any_host=listening)


def listen(
    address: Address,
    mptcp: bool | None,
    stop: Flag | None = None,
    control: str = congestion.AUTO,
) -> socket.socket:
    """Return a listening socket. mptcp: True or None take both kinds of peer where they can.
    control: of congestion, for its connections once their handshakes are done.

    Raises TtunError, InterruptedError when stop was set while a name was looked up.
    """
    stop = stop or Flag()
    dual = not address.host and _has_ipv6()
    try:
        if dual:
            target = Target(socket.AF_INET6, ("::", address.port))
        else:
            host = address.host or "0.0.0.0"
            target = resolver.look_up(host, address.port, stop, socket.AI_PASSIVE)[0]
        listener = _open(target.family, mptcp is not False, control, quietly=mptcp is None)
    except InterruptedError:
        raise
    except OSError as error:
        raise TtunError(f"cannot listen on {address}: {reason(error)}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if target.family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(not dual))
        listener.bind(target.sockaddr)
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


def dial(address: Address, mptcp: bool | None, stop: Flag) -> socket.socket:
    """Return a socket connected to one of the addresses of a name, looked up now.

    Raises OSError with a line that names what was tried; InterruptedError when stop was set.
    """
    failures = []
    try:
        targets = resolver.look_up(address.host, address.port, stop)
    except InterruptedError:
        raise
    except OSError as error:
        raise OSError(f"{address.host}: {error}") from None
    for target in targets:
        try:
            return connect(target, mptcp, stop)
        except InterruptedError:
            raise
        except OSError as error:
            failures.append(str(error))
    raise OSError("; ".join(failures) or f"{address.host} has no address")


def connect(
    target: Target, mptcp: bool | None, stop: Flag, control: str = congestion.AUTO
) -> socket.socket:
    """Return a non-blocking socket connected to an address. control: of congestion, to come.

    Raises OSError with a line that names the address; InterruptedError when stop was set.
    """
    try:
        return _connect(target, mptcp is True, stop, control)
    except InterruptedError:
        raise
    except OSError as error:
        raise named(show(target.sockaddr), error) from None


def named(what: str, error: OSError) -> OSError:
    """Return an error whose text names what failed; errors.is_lack() still knows it."""
    renamed = OSError(f"{what}: {reason(error)}")
    renamed.errno = error.errno
    return renamed


def _connect(target: Target, mptcp: bool, stop: Flag, control: str) -> socket.socket:
    sock = _open(target.family, mptcp, control, quietly=False)
    try:
        sock.setblocking(False)
        error = sock.connect_ex(target.sockaddr)
        if error == errno.EINPROGRESS:
            error = _await_connection(sock, stop)
        if error:
            raise OSError(error, os.strerror(error))
        return sock
    except BaseException:
        sock.close()
        raise


def _await_connection(sock: socket.socket, stop: Flag) -> int:
    """Wait until a connection is there or has failed; return its error number, 0 for none."""
    if not stop.wait_for(sock.fileno(), select.POLLOUT, DIAL_TIMEOUT):
        return errno.ETIMEDOUT
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)


def _open(family: int, mptcp: bool, control: str, *, quietly: bool) -> socket.socket:
    """Open a stream socket: Multipath TCP if wanted and in this kernel, else plain TCP."""
    sock = None
    if mptcp:
        try:
            sock = socket.socket(family, socket.SOCK_STREAM, IPPROTO_MPTCP)
        except OSError as error:
            if error.errno == errno.EAFNOSUPPORT:
                raise
            if not quietly:
                log.info("no Multipath TCP in this kernel (%s): plain TCP", reason(error))
    sock = sock or socket.socket(family, socket.SOCK_STREAM)
    congestion.start(sock, control)
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


def show(sockaddr: SocketAddress) -> str:
    """Return a socket address as people write it; an IPv4 one without its IPv6 disguise."""
    return str(Address(sockaddr[0].removeprefix("::ffff:"), sockaddr[1]))


def _why_not_bound(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "another program has that port; stop it or choose another"
    if error.errno == errno.EADDRNOTAVAIL:
        return "this machine has no such address"
    if error.errno == errno.EACCES:
        return "ports below 1024 need root"
    return reason(error)
