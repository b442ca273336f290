"""Detect that a connection is dead because the local address changed, before it times out.

A connection is bound to its local address. When that address is removed, or its link goes down
while there is another route to the peer, nothing arrives any more, and TCP takes half a minute to
notice. For Multipath TCP the addresses of all subflows count.

If both links stay up but the route to the peer moves to the other one, the connection may live on:
its packets leave through the new link with the old address. So the peer is only asked then.

A system suspend shows in the clocks: CLOCK_BOOTTIME includes it, CLOCK_MONOTONIC does not
(clock_gettime(2)). By then the peer has usually timed out, or a NAT has dropped its state.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import time

from ttun import mptcp, tcp
from ttun.watch.device_state import Seen

CONFIRM = 0.4  # seconds that an address must be missing: DHCP may remove and re-add it
SLEPT = 3.0  # seconds of suspend that cause a reconnect
LOOK_AGAIN = 1.0  # seconds between checks while the link is down
SOURCE_INTERVAL = 1.0  # seconds between checks of the source address
IP = socket.AF_INET, socket.AF_INET6


class Sleep:
    """Detect system suspends. seconds: their total duration since it was set to 0."""

    def __init__(self) -> None:
        """Start counting."""
        self._offset = _offset()
        self.seconds = 0.0

    def look(self) -> None:
        """Compare the clocks."""
        before, self._offset = self._offset, _offset()
        if self._offset - before > SLEPT:
            self.seconds += self._offset - before


class LocalAddress:
    """The local addresses of a connection, and whether they still work."""

    def __init__(self, sock: socket.socket) -> None:
        """sock: connected; the caller keeps ownership."""
        self.sock = sock
        self.addresses = local_addresses(sock)
        self._known = self._was_up = False  # one of them was seen on a link; on one that was up
        self._away_since: float | None = None

    def judge(self, seen: Seen, now: float) -> tuple[str | None, float | None]:
        """Return why the connection is dead or None, and seconds until the next check or None."""
        self.addresses |= local_addresses(self.sock)
        owners = {x: links for x, links in seen.owners.items() if x in self.addresses}
        self._known = self._known or bool(owners)
        is_up = any(links & seen.links_up for links in owners.values())
        self._was_up = self._was_up or is_up
        # Else it came through another link: the kernel is reached at the addresses of all links.
        if is_up or (owners and not self._was_up):
            self._away_since = None
            return None, None
        if not self._known and self._is_local():
            return None, None  # local but on no link, like 127.0.0.2
        if self._away_since is None:
            self._away_since = now
        if now - self._away_since < CONFIRM:
            return None, CONFIRM
        if not owners:
            were = "was" if len(self.addresses) == 1 else "were"
            return f"local {_shown(self.addresses)} {were} removed", None
        source = source_address(self.sock)
        if source and not source & self.addresses:
            return f"the link of local {_shown(set(owners))} is down", None
        return None, LOOK_AGAIN  # it may recover with the link

    def _is_local(self) -> bool:
        """Return whether one of the addresses is still local to this machine."""
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


class SourceAddress:
    """The local address from which the kernel would now connect to the peer of a connection."""

    def __init__(self, sock: socket.socket) -> None:
        """sock: connected; the caller keeps ownership."""
        self._sock = sock
        self._address = source_address(sock)
        self._next_look = time.monotonic() + SOURCE_INTERVAL

    def has_changed(self, now: float) -> bool:
        """Return whether it has changed since the last call. Call it about every second."""
        if now < self._next_look:
            return False
        self._next_look = now + SOURCE_INTERVAL
        before, found = self._address, source_address(self._sock)
        self._address = found or before  # none: the link is down, or a descriptor is lacking
        return bool(before) and self._address != before


def source_address(sock: socket.socket) -> set[bytes]:
    """Return the packed local address from which a new connection to the same peer would start.

    Empty if there is no route to it, or it is not over IP.
    """
    if sock.family not in IP:  # where a probe may be more than a question, as with Bluetooth
        return set()
    try:
        with socket.socket(sock.family, socket.SOCK_DGRAM) as probe:
            device = socket.SOL_SOCKET, socket.SO_BINDTODEVICE
            if bound_to := sock.getsockopt(*device, 16):
                probe.setsockopt(*device, bound_to)  # CAP_NET_RAW before Linux 5.7
            probe.connect(sock.getpeername())  # sends nothing
            return local_addresses(probe)
    except OSError:
        return set()


def local_addresses(sock: socket.socket) -> set[bytes]:
    """Return the packed local addresses of a connection, for Multipath TCP those of all subflows.

    Empty if it is closed, not over IP, or Multipath TCP before Linux 5.16.
    """
    try:
        if sock.family not in IP:
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
    """Return the total seconds of suspend since boot."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)
