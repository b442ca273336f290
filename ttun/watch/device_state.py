"""The wanted and the actual state of the tunnel's device, and how to restore it.

The kernel removes configuration by itself: a device that is set down loses its IPv6 addresses and
all routes; with an MTU below 1280 or IPv6 disabled, its IPv6 configuration; moved to another
network namespace, everything. The kernel does not restore any of it afterwards.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from dataclasses import dataclass, field
from functools import partial
from typing import Callable, NamedTuple

from ttun.device import Device
from ttun.errors import printable
from ttun.network import default_route, netlink
from ttun.network.default_route import Rule
from ttun.network.netlink import Message, Request, new_address, new_route
from ttun.settings import MIN_IPV6_MTU, Address, Interface, Network

IFF_UP = 0x1  # linux/if.h
SHOWN = 6  # items, and commands, in one log line
Key = tuple[bytes, int]  # of a network: packed address, prefix length
AddressKey = tuple[bytes, int, bytes]  # address, length, peer (or address again)


class Lack(NamedTuple):
    """A deviation from the wanted state, and how to restore it."""

    what: str  # "route 203.0.113.0/24 missing"
    remedy: str  # "ip route add 203.0.113.0/24 dev ttun0", or empty
    # The same as a netlink request; None if an administrator decides, or it cannot succeed yet.
    order: Callable[[int], Request] | None = None
    is_rule: bool = False


@dataclass
class Seen:
    """The actual state of the device, collected from the kernel's answers."""

    name: str | None = None  # None: not in this network namespace
    up: bool = False
    mtu: int = 0
    ipv6_disabled: bool = False
    addresses: set[AddressKey] = field(default_factory=set)
    routes: set[Key] = field(default_factory=set)  # only the wanted ones
    rules: list[Message] = field(default_factory=list)  # all of the machine
    # Of a connection's local addresses: the interfaces that have them, and which of those are up.
    owners: dict[bytes, set[int]] = field(default_factory=dict)
    links_up: set[int] = field(default_factory=set)

    def take_device(self, link: Message) -> None:
        """Store the state of the link."""
        name = link.attributes.get(netlink.IFLA_IFNAME, b"").rstrip(b"\0")
        self.name = printable(os.fsdecode(name))
        self.up = is_up(link)
        self.mtu = netlink.number(link.attributes.get(netlink.IFLA_MTU, b""))
        families = netlink.attributes(link.attributes.get(netlink.IFLA_AF_SPEC, b""))
        ours = netlink.attributes(families.get(socket.AF_INET6, b""))
        settings = ours.get(netlink.IFLA_INET6_CONF, b"")
        place = 4 * netlink.DISABLE_IPV6
        if len(settings) >= place + 4:
            self.ipv6_disabled = struct.unpack_from("=i", settings, place)[0] != 0

    def take_address(self, message: Message) -> None:
        """Store an address of the device."""
        local, other = address_of(message), message.attributes.get(netlink.IFA_ADDRESS, b"")
        self.addresses.add((local, message.fields[1], other))


@dataclass
class Wanted:
    """The wanted state of the device."""

    mtu: int
    addresses: list[tuple[Interface, Address | None]]  # with the peer's, if given
    routes: list[Network]  # of --route, and to the peer's IPv6 address
    connected: list[Network]  # added by the kernel for the addresses
    defaults: list[Network] = field(default_factory=list)  # in the table of default_route.py
    rules: list[Rule] = field(default_factory=list)

    @classmethod
    def of(cls, device: Device) -> Wanted:
        """Return the state that a device was configured with."""
        ours = device.addresses
        addresses: list[tuple[Interface, Address | None]] = [(ours.ipv4, ours.peer4)]
        routes = list(device.networks)
        first = ours.peer4 or ours.ipv4.ip
        connected: list[Network] = []
        if ours.peer4 is not None or ours.ipv4.network.prefixlen < 32:
            connected.append(_network(first, ours.ipv4.network.prefixlen))
        if device.has_ipv6:
            addresses.append((ours.ipv6, None))
            connected.append(ours.ipv6.network)
            if ours.peer6 is not None:
                routes.append(ipaddress.ip_network(ours.peer6))
        defaults: list[Network] = []
        rules: list[Rule] = []
        if device.outside:
            defaults = [default_route.IPV4, default_route.IPV6][: 1 + device.has_ipv6]
            rules = [*default_route.rules(device.outside)]
        return cls(device.mtu, addresses, routes, connected, defaults, rules)

    @property
    def keys(self) -> set[Key]:
        """The destinations of all wanted routes."""
        return {key(route) for route in self.all_routes}

    @property
    def families(self) -> set[int]:
        """The address families of these routes."""
        return {netlink.family(route) for route in self.all_routes}

    @property
    def all_routes(self) -> list[Network]:
        """All routes that the device should have."""
        return [*self.routes, *self.connected, *self.defaults]

    def lacks(self, seen: Seen) -> list[Lack]:
        """Return all deviations, in the order in which to restore them."""
        name = seen.name
        if name is None:
            return [Lack("moved to another network namespace", "")]
        found = []
        if not seen.up:
            found.append(Lack("device down", f"ip link set {name} up"))
        if seen.mtu != self.mtu:
            what = f"MTU is {seen.mtu}, not {self.mtu}"
            found.append(Lack(what, f"ip link set {name} mtu {self.mtu}"))
        if self._wants_ipv6 and seen.ipv6_disabled:
            remedy = f"sysctl -w net/ipv6/conf/{name}/disable_ipv6=0"
            found.append(Lack("IPv6 disabled", remedy))
        ready = {4: seen.up, 6: seen.up and seen.mtu >= MIN_IPV6_MTU and not seen.ipv6_disabled}
        gone = set()
        for address, peer in self.addresses:
            if _address_key(address, peer) not in seen.addresses:
                gone.add(address.version)
                given = _given(address, peer)
                remedy = f"ip address add {given} dev {name}"
                order = partial(new_address, address=address, peer=peer)
                can = ready[address.version]
                found.append(Lack(f"address {given} missing", remedy, order if can else None))
        # The kernel adds connected routes itself once the device is up and has its address.
        connected = [x for x in self.connected if seen.up and x.version not in gone]
        for route in [*connected, *self.routes, *self.defaults]:
            if key(route) not in seen.routes:
                is_default = route in self.defaults
                table = default_route.TABLE if is_default else netlink.TABLE_MAIN
                where = f" table {table}" if is_default else ""
                remedy = f"ip route add {route} dev {name}{where}"
                order = partial(new_route, network=route, table=table)
                can = ready[route.version]
                found.append(Lack(f"route {route} missing", remedy, order if can else None))
        for rule in self.rules:
            if not rule.is_in(seen.rules):
                version, words = rule.network.version, str(rule)
                what = f"IPv{version} rule {' '.join(words.split()[1:4])} missing"
                found.append(Lack(what, f"ip -{version} rule add {words}", rule.request, True))
        return found

    @property
    def _wants_ipv6(self) -> bool:
        return any(address.version == 6 for address, _ in self.addresses)


def describe(lacks: list[Lack], prepared: bool = False) -> str:
    """Return what is missing and how to restore it, for the log. prepared: see Device."""
    whats = [lack.what for lack in lacks]
    remedies = [f"sudo {lack.remedy}" for lack in lacks if lack.remedy]
    if not remedies:
        return f"{', '.join(whats)} (set addresses and routes there, or restart ttun)"
    how = "to add" if prepared else "to restore"
    last = "" if prepared else "; or restart ttun"
    return f"{', '.join(some(whats))} ({how}: {'; '.join(some(remedies))}{last})"


def is_up(link: Message) -> bool:
    """Return whether a link is administratively up, with or without carrier."""
    return len(link.fields) > 3 and bool(link.fields[3] & IFF_UP)


def address_of(message: Message) -> bytes:
    """Return the address in a message."""
    found = message.attributes
    return found.get(netlink.IFA_LOCAL) or found.get(netlink.IFA_ADDRESS, b"")


def key(network: Network) -> Key:
    """Return a network in comparable form."""
    return network.network_address.packed, network.prefixlen


def route_key(message: Message) -> Key | None:
    """Return the destination of a route; None unless it is a unicast route in use."""
    family, length, _, _, table, _, _, kind, flags = message.fields
    if kind != netlink.UNICAST or table == netlink.TABLE_LOCAL or flags & netlink.CLONED:
        return None
    nothing = bytes(4 if family == socket.AF_INET else 16)
    return message.attributes.get(netlink.RTA_DST, nothing), length


def _address_key(address: Interface, peer: Address | None) -> AddressKey:
    return address.ip.packed, _length(address), (peer or address.ip).packed


def _given(address: Interface, peer: Address | None) -> str:
    """Return an address in the syntax of ``ip address add``."""
    return str(address) if peer is None else f"{address.ip} peer {peer}/{_length(address)}"


def _length(address: Interface) -> int:
    return int(address.network.prefixlen)


def _network(address: Address, length: int) -> Network:
    return ipaddress.ip_network(f"{address}/{length}", strict=False)


def some(parts: list[str], most: int = SHOWN) -> list[str]:
    """Return the first items, and how many more there are."""
    more = len(parts) - most
    return parts if more <= 0 else [*parts[:most], f"and {more} more"]
