"""The TCP transport: addresses, listening, connecting, socket options, Multipath TCP.

Sources: tcp(7), socket(7), Documentation/networking/mptcp.rst, linux/mptcp.h.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import os
import select
import socket
from collections.abc import Sequence
from functools import partial

from ttun import congestion, resolver, transport
from ttun.address import Address, parse_host_port
from ttun.errors import TtunError, reason
from ttun.flag import Flag
from ttun.resolver import Resolver, SocketAddress, Target
from ttun.settings import DEFAULT_PORT
from ttun.transport import Arrival, Candidate

log = logging.getLogger("ttun")

BACKLOG = 128
DIAL_TIMEOUT = 4.0  # seconds for each address: the first three SYNs
KEEPALIVE_IDLE, KEEPALIVE_INTERVAL, KEEPALIVE_COUNT = 15, 5, 4  # seconds, seconds, probes
USER_TIMEOUT = 35_000  # ms without acknowledgement: the same time as keepalive

NOTSENT_LOWAT = 32768  # bytes unsent in the socket before packets wait in the device

IPPROTO_MPTCP = 262  # socket.IPPROTO_MPTCP since Python 3.10
SOL_MPTCP, MPTCP_INFO = 284, 1


def parse_address(text: str, *, listening: bool) -> Address:
    """Parse HOST:PORT, [IPv6]:PORT and, when listening, :PORT. Raises UsageError."""
    return parse_host_port(text, DEFAULT_PORT, 0 if listening else 1, any_host=listening)


def listen(
    address: Address,
    mptcp: bool | None,
    stop: Flag | None = None,
    control: str = congestion.AUTO,
) -> socket.socket:
    """Return a listening socket.

    mptcp: True or None accept TCP and, if the kernel can, Multipath TCP. control: see
    congestion.start(). Raises TtunError, InterruptedError when stop was set during a name lookup.
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
    """Return whether this kernel has IPv6; socket.has_ipv6 is a compile-time constant."""
    try:
        socket.socket(socket.AF_INET6, socket.SOCK_STREAM).close()
    except OSError:
        return False
    return True


def dial(address: Address, mptcp: bool | None, stop: Flag) -> socket.socket:
    """Resolve a name and return a socket connected to one of its addresses.

    Raises OSError that lists the attempts, InterruptedError when stop was set.
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
    """Return a non-blocking socket connected to an address. control: see congestion.start().

    Raises OSError that names the address, InterruptedError when stop was set.
    """
    try:
        return _connect(target, mptcp is True, stop, control)
    except InterruptedError:
        raise
    except OSError as error:
        raise named(show(target.sockaddr), error) from None


def named(what: str, error: OSError) -> OSError:
    """Return an error with a prefixed text and the same errno, for errors.is_lack()."""
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
    """Wait for a connection attempt; return its errno, or 0."""
    if not stop.wait_for(sock.fileno(), select.POLLOUT, DIAL_TIMEOUT):
        return errno.ETIMEDOUT
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)


def _open(family: int, mptcp: bool, control: str, *, quietly: bool) -> socket.socket:
    """Open a stream socket: Multipath TCP if wanted and available, else TCP."""
    sock = None
    if mptcp:
        try:
            sock = socket.socket(family, socket.SOCK_STREAM, IPPROTO_MPTCP)
        except OSError as error:
            if error.errno == errno.EAFNOSUPPORT:
                raise
            if not quietly:
                log.warning("no Multipath TCP in this kernel: %s; using TCP", reason(error))
    sock = sock or socket.socket(family, socket.SOCK_STREAM)
    congestion.start(sock, control)
    return sock


def tune(sock: socket.socket) -> None:
    """Set socket options: no delay, keepalive, a timeout of unacknowledged data."""
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
        # MPTCP lacks some of them (ENOPROTOOPT), a socketpair all.
        with contextlib.suppress(OSError):
            sock.setsockopt(level, option, value)


def is_multipath(sock: socket.socket) -> bool:
    """Return whether a connection is Multipath TCP and has not fallen back to TCP."""
    try:
        sock.getsockopt(SOL_MPTCP, MPTCP_INFO, 4)
    except OSError:
        return False
    return True


def kind(sock: socket.socket) -> str:
    """Return the actual protocol, "tcp" or "mptcp"."""
    return "mptcp" if is_multipath(sock) else "tcp"


def show(sockaddr: SocketAddress) -> str:
    """Return a socket address as text; an IPv4-mapped IPv6 address as IPv4."""
    return str(Address(sockaddr[0].removeprefix("::ffff:"), sockaddr[1]))


def _why_not_bound(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "port in use (stop the other program or choose another port)"
    if error.errno == errno.EADDRNOTAVAIL:
        return "not an address of this machine"
    if error.errno == errno.EACCES:
        return "ports below 1024 require root"
    return reason(error)


def network(address: str) -> str:
    """Return the /64 of an IPv6 address, which one host may control; else the address."""
    with contextlib.suppress(ValueError):
        ip = ipaddress.ip_address(address.partition("%")[0])
        if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is None:
            return str(ipaddress.ip_network((ip, 64), strict=False))
    return address


class Dialer(transport.Dialer):
    """Connect to the addresses of a host name."""

    def __init__(self, server: str, mptcp: bool | None, control: str) -> None:
        """server: HOST:PORT. mptcp: use Multipath TCP. control: congestion control.

        Raises UsageError.
        """
        address = parse_address(server, listening=False)
        self.name, self._host = str(address), address.host
        self._mptcp, self._control = mptcp, control
        self._resolver = Resolver(*address)

    def look_up(self, stop: Flag) -> Sequence[str]:
        """Return the addresses of the name."""
        try:
            self._resolver.first(stop)
        except InterruptedError:
            raise
        except OSError as error:
            raise named(self._host, error) from None
        return [target.sockaddr[0] for target in self._resolver.known]

    def candidates(self, stop: Flag) -> Sequence[Candidate]:
        """Return a candidate for each address."""
        try:
            found = self._resolver.targets(stop, self.outside)
        except InterruptedError:
            raise
        except OSError as error:
            raise named(self._host, error) from None
        if not found:
            raise OSError(f"{self._host} has no address")
        return [
            Candidate(show(target.sockaddr), target.sockaddr[0], partial(self._dial, target))
            for target in found
        ]

    def _dial(self, target: Target, stop: Flag) -> socket.socket:
        return connect(target, self._mptcp, stop, self._control)

    def kind(self, sock: socket.socket) -> str:
        """Return "tcp" or "mptcp"."""
        return kind(sock)


class Listener(transport.Listener):
    """Accept connections at one local address, or all."""

    def __init__(self, listen: str, mptcp: bool | None, control: str) -> None:
        """listen: HOST:PORT or :PORT. mptcp, control: see listen(). Raises UsageError."""
        self._address = parse_address(listen, listening=True)
        self.name = str(self._address)
        self._mptcp, self._control = mptcp, control
        self._listening: socket.socket | None = None

    def open(self, stop: Flag) -> None:
        """Open the port."""
        self._listening = listen(self._address, self._mptcp, stop, self._control)
        sockaddr = self._listening.getsockname()
        kinds = "tcp and mptcp" if self._listening.proto == IPPROTO_MPTCP else "tcp"
        self.name, self.port = f"{show(sockaddr)} ({kinds})", sockaddr[1]

    def fileno(self) -> int:
        """Return the listening socket's descriptor."""
        assert self._listening is not None
        return self._listening.fileno()

    def accept(self) -> Arrival:
        """Return the next connection. Raises OSError."""
        assert self._listening is not None
        sock, sockaddr = self._listening.accept()
        return Arrival(sock, show(sockaddr), network(sockaddr[0]))

    def close(self) -> None:
        """Close the port."""
        if self._listening is not None:
            self._listening.close()

    def kind(self, sock: socket.socket) -> str:
        """Return "tcp" or "mptcp"."""
        return kind(sock)
