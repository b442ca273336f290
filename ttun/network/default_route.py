"""The whole default route: every user's packets go through the tunnel, but for its own user's.

 1. A routing table of its own has a default route through the device. Where the device has no IPv6,
    the table's IPv6 route is unreachable.
 2. Two kinds of rules, for IPv4 and IPv6, come before that of the main table:

        20203:  lookup main suppress_prefixlength 0     the LAN: all but main's default route
        20204:  uidrange 0-... lookup 203               all users but those that make the connection

    The connection and the look-up of the server's name match none of the second kind: they go
    outside, wherever that is at the moment. There is no host route that could become stale.
 3. The kernel removes the routes with the device, and rules without routes change nothing. remove()
    removes the rules; that takes CAP_NET_ADMIN.

With rp_filter=1 the kernel drops a packet that comes from where it would not send the answer. It
looks that up as root, whose packets go into the tunnel: what the server sends would be dropped.

Sources: ip-rule(8), linux/fib_rules.h, Documentation/networking/ip-sysctl.rst (rp_filter),
net/ipv4/fib_frontend.c (__fib_validate_source).
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import itertools
import logging
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ttun.errors import TtunError, reason
from ttun.network import netlink
from ttun.network.netlink import NO_FAMILY, Message, Netlink, Request, attribute
from ttun.privileges import MAX_ID, NET_ADMIN, has
from ttun.settings import Address, Network

log = logging.getLogger("ttun")

# A table's number has to fit a byte (netlink.ROUTE). protocol: who made a rule, for `ip rule`.
TABLE = PROTOCOL = 203
LAN, OTHERS = 20203, 20204  # priorities of the rules
FRA_PRIORITY, FRA_SUPPRESS_LENGTH, FRA_UIDS, FRA_PROTOCOL = 6, 14, 20, 21  # linux/fib_rules.h
TO_TABLE = 1  # FR_ACT_TO_TBL
OUTSIDE = "203.0.113.1"  # RFC 5737: an address that is not on the LAN
ELSEWHERE = (OUTSIDE, "2001:db8:ffff::1")  # RFC 3849
IPV4, IPV6 = ipaddress.ip_network("0.0.0.0/0"), ipaddress.ip_network("::/0")
NOTHING = (errno.ENOENT, errno.ESRCH)


class Rule(NamedTuple):
    """A rule of one family: for the packets of some users, from first to last, or for the LAN."""

    network: Network  # IPV4 or IPV6
    users: tuple[int, int] | None = None

    def is_in(self, found: Iterable[Message]) -> bool:
        """Return whether the kernel has it. found: all rules of both families."""
        ours = netlink.attributes(self.request().body[netlink.ROUTE.size :]).items()
        family = netlink.family(self.network)
        return any(x.fields[0] == family and ours <= x.attributes.items() for x in found)

    def __str__(self) -> str:
        """Return it as ip-rule(8) takes it."""
        if self.users is None:
            return f"pref {LAN} lookup main suppress_prefixlength 0 protocol {PROTOCOL}"
        users = "{}-{}".format(*self.users)
        return f"pref {OTHERS} uidrange {users} lookup {TABLE} protocol {PROTOCOL}"

    def request(self, _: int = 0) -> Request:
        """Return the order to make it, whatever the index of the device."""
        if self.users is None:
            body = _rule(self.network, LAN, netlink.TABLE_MAIN)
            body += attribute(FRA_SUPPRESS_LENGTH, struct.pack("=I", 0))
        else:
            body = _rule(self.network, OTHERS, TABLE)
            body += attribute(FRA_UIDS, struct.pack("=2I", *self.users))
        flags = netlink.NLM_ACK | netlink.NLM_CREATE | netlink.NLM_EXCLUSIVE
        return Request(netlink.NEW_RULE, flags, body)


def add(index: int, has_ipv6: bool, users: Iterable[int]) -> None:
    """Route all packets but those of some users through a device. Raises TtunError."""
    try:
        with contextlib.closing(Netlink()) as link:
            if _devices(link) != {index}:  # a prepared device keeps it
                link.order(netlink.new_route(index, IPV4, TABLE))
            _clear(link, index)  # what a killed run left
            link.order(netlink.new_route(index if has_ipv6 else 0, IPV6, TABLE), NO_FAMILY)
            for rule in rules(users):
                link.order(rule.request(), NO_FAMILY if rule.network == IPV6 else ())
    except OSError as error:
        why = error.strerror
        if error.errno == errno.EEXIST:
            why = f"another tunnel has it (ip route show table {TABLE})"
        raise TtunError(f"cannot take the default route: {why}") from None


def rules(users: Iterable[int]) -> Iterator[Rule]:
    """Yield the rules that leave some users' packets outside."""
    for network in (IPV4, IPV6):
        yield Rule(network)
        first = 0
        for user in [*sorted(users), MAX_ID + 1]:
            if first < user:
                yield Rule(network, (first, user - 1))
            first = max(first, user + 1)


class RuleKeeper:
    """Restores the rules that another program removes, SETTLE after it did and once in EVERY.

    Call tend() when the descriptor is readable, and when ``due`` has come (time.monotonic()). It
    never blocks. Between a removal and ``due`` nothing is heard, so a flood costs little.
    """

    SETTLE, EVERY = 0.2, 1.0  # seconds; rules are removed one after the other

    def __init__(self, users: Iterable[int]) -> None:
        """Subscribe to changes of rules. users: whose packets stay outside. Raises TtunError."""
        self._users = [*users]
        self.due: float | None = None
        self._not_before = 0.0
        try:
            self._link, self._orders = Netlink(), Netlink()
            self._link.join(netlink.RULES)
        except OSError as error:
            raise TtunError(
                f"cannot watch the rules of the default route: {reason(error)}"
            ) from None

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._link.fileno()

    def tend(self, now: float) -> list[str]:
        """Return the rules that were restored. Raises OSError, and tries again later."""
        if self._is_told_of_a_removal() and self.due is None:
            self.due = max(now + self.SETTLE, self._not_before)
            self._link.leave(netlink.RULES)
            while self._is_told_of_a_removal():
                pass  # until nothing is left: the descriptor is not readable meanwhile
        if self.due is None or now < self.due:
            return []
        self.due = self._not_before = now + self.EVERY
        self._link.join(netlink.RULES)  # before they are looked at
        have = (errno.EEXIST, *NO_FAMILY)
        missing = [rule for rule in rules(self._users) if self._orders.order(rule.request(), have)]
        self.due = None
        return [f"IPv{rule.network.version} {rule}" for rule in missing]

    def _is_told_of_a_removal(self) -> bool:
        """Read what has come, up to a removal; return whether there was one."""
        try:
            while not any(x.kind == netlink.DEL_RULE for x in self._link.receive()):
                pass
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno != errno.ENOBUFS:  # some were lost
                raise
        return True


def remove(index: int) -> None:
    """Remove the rules, unless another device than this has the default route. Raises OSError.

    index: of the device; 0 for one that is gone.
    """
    with contextlib.closing(Netlink()) as link:
        if _devices(link) <= {index}:
            _clear(link, index)
            _remove_route(link, index, IPV4)


def release(index: int) -> None:
    """Remove the rules if this process may; without privileges somebody else has to."""
    if has(NET_ADMIN):
        try:
            remove(index)
        except OSError as error:
            log.warning("cannot remove the rules of the default route: %s", reason(error))


def why_dropped(address: Address, outside: int, tunnel: int) -> str | None:
    """Return why the kernel would drop what comes from an address, or None.

    outside, tunnel: the devices that lead there, for the connection and for others.
    """
    if address.version == 6 or netlink.device_to(address, 0) != tunnel:
        return None
    try:
        name = socket.if_indextoname(outside)
    except OSError:
        return None
    if not is_strict(name):
        return None
    return (
        f"rp_filter is 1 on {name}: answers from beyond the LAN would be dropped ({remedy(name)})"
    )


def exceptions(index: int, users: Sequence[int]) -> Iterator[str]:
    """Return a line for each family whose packets something else sends outside.

    index: of the tunnel's device.
    """
    other = next(user for user in itertools.count() if user not in users)
    for address in map(ipaddress.ip_address, ELSEWHERE):
        way = netlink.device_to(address, other)
        with contextlib.suppress(OSError):
            if way not in (0, index):
                yield (
                    f"IPv{address.version} packets leave through {socket.if_indextoname(way)}: "
                    f"another rule or route comes first (ip -{address.version} rule; "
                    f"ip route get {address} uid {other})"
                )


def is_strict(device: str) -> bool:
    """Return whether rp_filter is 1 on a device."""
    conf = Path("/proc/sys/net/ipv4/conf")
    try:
        found = [(conf / each / "rp_filter").read_text() for each in ("all", device)]
    except OSError:
        return False
    return max(found).strip() == "1"  # the larger one counts


def remedy(device: str) -> str:
    """Return the command that has a device take such packets."""
    return f"sysctl -w net/ipv4/conf/{device}/rp_filter=2"


def _devices(link: Netlink) -> set[int]:
    """Return the device that has the default route, if one has."""
    table = netlink.ROUTE.pack(socket.AF_INET, 0, 0, 0, TABLE, 0, 0, 0, 0)
    try:
        found = link.answers(Request(netlink.GET_ROUTE, netlink.NLM_DUMP, table))
    except OSError as error:
        if error.errno in NOTHING:
            return set()
        raise
    # Before Linux 4.20 the answer has all tables.
    return set().union(*(netlink.next_hops(x) for x in found if x.fields and x.fields[4] == TABLE))


def _clear(link: Netlink, index: int) -> None:
    """Remove the rules, and the routes of IPv6."""
    for network in (IPV4, IPV6):
        for priority in (OTHERS, LAN):
            rule = Request(netlink.DEL_RULE, netlink.NLM_ACK, _rule(network, priority, 0))
            while link.order(rule, NOTHING + NO_FAMILY):
                pass
    for each in {0, index}:
        _remove_route(link, each, IPV6)


def _remove_route(link: Netlink, index: int, network: Network) -> None:
    _, _, body = netlink.new_route(index, network, TABLE)
    link.order(Request(netlink.DEL_ROUTE, netlink.NLM_ACK, body), NOTHING + NO_FAMILY)


def _rule(network: Network, priority: int, table: int) -> bytes:
    """Return a rule that looks a table up; table 0: any rule of that priority."""
    # struct fib_rule_hdr is laid out as struct rtmsg is; the action is where the type is.
    action = TO_TABLE if table else 0
    body = netlink.ROUTE.pack(netlink.family(network), 0, 0, 0, table, 0, 0, action, 0)
    body += attribute(FRA_PRIORITY, struct.pack("=I", priority))
    return body + attribute(FRA_PROTOCOL, bytes([PROTOCOL]))
