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
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Callable

from ttun import congestion, transport
from ttun.address import Address, parse_host_port
from ttun.binding import Binding
from ttun.errors import ProtocolError, TtunError, is_lack, reason
from ttun.flag import Flag
from ttun.network import resolver
from ttun.network.resolver import Resolver, SocketAddress, Target
from ttun.settings import DEFAULT_PORT, several
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
    with naming(address.host):
        targets = resolver.look_up(address.host, address.port, stop)
    for target in targets:
        try:
            return connect(target, mptcp, stop)
        except InterruptedError:
            raise
        except OSError as error:
            failures.append(str(error))
    raise OSError("; ".join(failures) or f"{address.host} has no address")


def connect(
    target: Target,
    mptcp: bool | None,
    stop: Flag,
    control: str = congestion.AUTO,
    binding: Binding | None = None,
) -> socket.socket:
    """Return a non-blocking socket connected to an address. control: see congestion.start().

    binding: what to bind the socket to first. Raises OSError that names the address,
    InterruptedError when stop was set.
    """
    with naming(show(target.sockaddr)):
        sock = _open(target.family, mptcp is True, control, quietly=False)
        try:
            sock.setblocking(False)
            if binding is not None:
                binding.apply(sock)
            error = sock.connect_ex(target.sockaddr)
            if error == errno.EINPROGRESS:
                error = _await_connection(sock, stop)
            if error:
                raise OSError(error, os.strerror(error))
        except BaseException:
            sock.close()
            raise
    return sock


@contextlib.contextmanager
def naming(what: str) -> Iterator[None]:
    """Put a name in front of the text of an error; keep its errno, for errors.is_lack()."""
    try:
        yield
    except InterruptedError:  # no error: stop was set
        raise
    except (OSError, ProtocolError) as error:
        named = OSError(f"{what}: {reason(error)}")
        named.errno = getattr(error, "errno", None)
        raise named from None


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
            if error.errno == errno.EAFNOSUPPORT or is_lack(error):
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

    def __init__(
        self, server: str, mptcp: bool | None, control: str, bind: str | None = None
    ) -> None:
        """server: HOST:PORT. mptcp: use Multipath TCP. control: of congestion. bind: see Binding.

        Raises UsageError.
        """
        address = parse_address(server, listening=False)
        self.name, self._host = str(address), address.host
        self._mptcp, self._control = mptcp, control
        self._binding = None if bind is None else Binding(bind)
        if self._binding is not None and self._binding.device is not None:
            self.device = os.fsdecode(self._binding.device)
        self._resolver = Resolver(*address)

    def look_up(self, stop: Flag) -> Sequence[str]:
        """Return the addresses of the name."""
        find = partial(self._resolver.first, outside=self.outside, patience=self.name_patience)
        return [target.sockaddr[0] for target in self._found(find, stop)]

    def candidates(self, stop: Flag) -> Sequence[Candidate]:
        """Return a candidate for each address."""
        find = self._resolver.targets
        find = partial(find, outside=self.outside, patience=self.name_patience)
        found = self._found(find, stop)
        return [Candidate(show(x.sockaddr), x.sockaddr[0], partial(self._dial, x)) for x in found]

    def _found(self, find: Callable[[Flag], list[Target]], stop: Flag) -> list[Target]:
        """Resolve the name; return the targets of the families that can be bound."""
        with naming(self._host):
            found = find(stop)
        binding, family = self._binding, ""
        if binding is not None and binding.family is not None:
            found = [target for target in found if target.family == binding.family]
            family = "IPv4 " if binding.family == socket.AF_INET else "IPv6 "
        if not found:
            why = f" ({binding})" if family else ""
            raise OSError(f"{self._host} has no {family}address{why}")
        return found

    def _dial(self, target: Target, stop: Flag) -> socket.socket:
        return connect(target, self._mptcp, stop, self._control, self._binding)

    def kind(self, sock: socket.socket) -> str:
        """Return "tcp" or "mptcp"."""
        return kind(sock)


class Listener(transport.Listener):
    """Accept connections at some local addresses, or all."""

    def __init__(self, listen: str | Sequence[str], mptcp: bool | None, control: str) -> None:
        """listen: HOST:PORT or :PORT, or several. mptcp, control: see listen().

        Raises UsageError.
        """
        wanted = [parse_address(each, listening=True) for each in several("listen", listen, str)]
        whole = {each.port for each in wanted if not each.host} - {0}  # these include the others
        self._addresses = [
            each for each in dict.fromkeys(wanted) if not (each.host and each.port in whole)
        ]
        self.name = ", ".join(map(str, self._addresses))
        self._mptcp, self._control = mptcp, control
        self._listening: dict[int, socket.socket] = {}  # by descriptor
        self._ready: select.epoll | None = None  # one descriptor for all of them

    def open(self, stop: Flag) -> None:
        """Open the ports."""
        names = []
        try:
            self._ready = select.epoll()
        except OSError as error:
            raise TtunError(f"cannot listen on {self.name}: {reason(error)}") from None
        for address in self._addresses:
            sock = listen(address, self._mptcp, stop, self._control)
            self._listening[sock.fileno()] = sock
            self._ready.register(sock, select.EPOLLIN)
            sockaddr = sock.getsockname()
            kinds = "tcp and mptcp" if sock.proto == IPPROTO_MPTCP else "tcp"
            names.append(f"{show(sockaddr)} ({kinds})")
            self.port = self.port or sockaddr[1]
        self.name = ", ".join(names)

    def fileno(self) -> int:
        """Return a descriptor that is readable when one of the sockets is."""
        assert self._ready is not None
        return self._ready.fileno()

    def accept(self) -> Arrival:
        """Return the next connection. Raises OSError."""
        assert self._ready is not None
        for descriptor, _ in self._ready.poll(0, 1):
            sock, sockaddr = self._listening[descriptor].accept()
            return Arrival(sock, show(sockaddr), network(sockaddr[0]))
        raise BlockingIOError

    def close(self) -> None:
        """Close the ports."""
        if self._ready is not None:
            self._ready.close()
        for sock in self._listening.values():
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # a forked child may hold a copy
            sock.close()

    def kind(self, sock: socket.socket) -> str:
        """Return "tcp" or "mptcp"."""
        return kind(sock)
