"""Notice that a connection is dead before the peer's silence shows it: its own end moved.

A connection is bound to the address that it was made from. When that is taken from the machine, or
its link is set down while there is another way to the peer, nothing arrives any more, and TCP takes
half a minute to see it. With Multipath TCP the addresses of all its paths count.

A machine that slept is noticed by its clocks: CLOCK_BOOTTIME counts that time, CLOCK_MONOTONIC does
not (clock_gettime(2)). Its peer has given it up, as a rule, or a NAT has forgotten it.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import time

from ttun import mptcp, tcp
from ttun.device_state import Seen

CONFIRM = 0.4  # seconds that an address has to be away: DHCP may take one and give it back
SLEPT = 3.0  # seconds of suspension that are worth a new connection
LOOK_AGAIN = 1.0  # seconds, while the link of the address is down


class Sleep:
    """Notices that the machine was suspended. seconds: how long, in all, since it was set to 0."""

    def __init__(self) -> None:
        """Count from now on."""
        self._offset = _offset()
        self.seconds = 0.0

    def look(self) -> None:
        """Look at the clocks."""
        before, self._offset = self._offset, _offset()
        if self._offset - before > SLEPT:
            self.seconds += self._offset - before


class LocalAddress:
    """The local addresses of one connection, and whether it can still live on them."""

    def __init__(self, sock: socket.socket) -> None:
        """Begin with a connected socket, which stays the caller's."""
        self._sock = sock
        self.addresses = local_addresses(sock)
        self._known = False  # a reading has found one of them on a link
        self._away_since: float | None = None

    def judge(self, seen: Seen, now: float) -> tuple[str | None, float | None]:
        """Return why the connection is dead, or None, and in how many seconds to read again."""
        self.addresses |= local_addresses(self._sock)
        owners = {x: links for x, links in seen.owners.items() if x in self.addresses}
        self._known = self._known or bool(owners)
        if any(links & seen.links_up for links in owners.values()):
            self._away_since = None
            return None, None
        if not self._known and self._is_local():
            return None, None  # ours without a link, as 127.0.0.2 is
        if self._away_since is None:
            self._away_since = now
        if now - self._away_since < CONFIRM:
            return None, CONFIRM
        if not owners:
            were = "was" if len(self.addresses) == 1 else "were"
            return f"local {_shown(self.addresses)} {were} removed", None
        if self._has_other_way():
            return f"the link of local {_shown(set(owners))} is down", None
        return None, LOOK_AGAIN  # it lives on if the link comes back

    def _is_local(self) -> bool:
        """Return whether the kernel still takes one of the addresses for this machine's."""
        for address in self.addresses:
            family = socket.AF_INET if len(address) == 4 else socket.AF_INET6
            try:
                with socket.socket(family, socket.SOCK_DGRAM) as probe:
                    probe.bind((socket.inet_ntop(family, address), 0))
            except OSError as error:
                if error.errno == errno.EADDRNOTAVAIL:
                    continue
            return True
        return not self.addresses

    def _has_other_way(self) -> bool:
        """Return whether there is a route to the peer from another address than ours."""
        try:
            with socket.socket(self._sock.family, socket.SOCK_DGRAM) as probe:
                probe.connect(self._sock.getpeername())  # sends nothing
                return not local_addresses(probe) & self.addresses
        except OSError:
            return False


def local_addresses(sock: socket.socket) -> set[bytes]:
    """Return the packed local addresses of a connection, with Multipath TCP those of all paths.

    None where it is no connection over IP any more, or where the kernel does not tell (Multipath
    TCP before Linux 5.16).
    """
    try:
        if sock.family not in (socket.AF_INET, socket.AF_INET6):
            return set()
        if tcp.is_multipath(sock):
            return {_packed(address) for address in mptcp.local_addresses(sock)}
        return {_packed(sock.getsockname()[0])}
    except OSError:  # closed
        return set()


def _packed(address: str) -> bytes:
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
        return parsed.ipv4_mapped.packed
    return parsed.packed


def _shown(addresses: set[bytes]) -> str:
    several = "es" if len(addresses) > 1 else ""
    return (
        f"address{several} {' and '.join(sorted(map(str, map(ipaddress.ip_address, addresses))))}"
    )


def _offset() -> float:
    """Return for how many seconds the machine has slept since it was started."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)
