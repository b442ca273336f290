"""rtnetlink: one non-blocking socket for requests and for change notifications.

The kernel answers a request during send(), and continues a long answer as parts of it are read, so
no call blocks. Only requests that change something need privileges.

Sources: netlink(7), rtnetlink(7), linux/netlink.h, linux/rtnetlink.h, linux/if_link.h,
linux/if_addr.h.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ttun.settings import Address, Network

# linux/netlink.h
NLM_REQUEST, NLM_MULTI, NLM_ACK, NLM_DUMP = 0x01, 0x02, 0x04, 0x300
NLM_DUMP_INTERRUPTED, NLM_EXCLUSIVE, NLM_CREATE = 0x10, 0x200, 0x400
NLMSG_ERROR, NLMSG_DONE = 2, 3
SOL_NETLINK, ADD_MEMBERSHIP, DROP_MEMBERSHIP, STRICT_CHECK = 270, 1, 2, 12
SO_NETNS_COOKIE = 71  # asm-generic/socket.h
ATTRIBUTE_TYPE = 0x3FFF  # without NLA_F_NESTED and NLA_F_NET_BYTEORDER
# linux/rtnetlink.h
NEW_LINK, DEL_LINK, GET_LINK = 16, 17, 18
NEW_ADDRESS, DEL_ADDRESS, GET_ADDRESS = 20, 21, 22
NEW_ROUTE, DEL_ROUTE, GET_ROUTE = 24, 25, 26
NEW_RULE, DEL_RULE, GET_RULE = 32, 33, 34
GROUPS = (1, 5, 7, 8, 9, 11, 19)  # links; addresses, routes and rules of IPv4, those of IPv6
RULES = (8, 19)  # of GROUPS
RTA_DST, RTA_OIF, RTA_MULTIPATH, RTA_UID = 1, 4, 9, 25
TABLE_MAIN, TABLE_LOCAL = 254, 255
PROTOCOL_BOOT, SCOPE_LINK, UNICAST, UNREACHABLE = 3, 253, 1, 7
CLONED = 0x200  # RTM_F_CLONED: a cached route to one destination
IFLA_IFNAME, IFLA_MTU, IFLA_AF_SPEC = 3, 4, 26  # linux/if_link.h, as is the next
IFLA_INET6_CONF, DISABLE_IPV6 = 2, 26  # linux/ipv6.h: an index into that array of s32
IFA_ADDRESS, IFA_LOCAL = 1, 2  # linux/if_addr.h

HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
ATTRIBUTE = struct.Struct("=HH")  # struct rtattr
LINK = struct.Struct("=BxHiII")  # struct ifinfomsg: family, type, index, flags, change
ADDRESS = struct.Struct("=BBBBI")  # struct ifaddrmsg: family, length, flags, scope, index
# struct rtmsg: family, lengths of destination and source, tos, table, protocol, scope, type, flags
ROUTE = struct.Struct("=BBBBBBBBI")
NEXT_HOP = struct.Struct("=HBBi")  # struct rtnexthop: length, flags, hops, index
LAYOUTS = {
    NEW_LINK: LINK, DEL_LINK: LINK, NEW_ADDRESS: ADDRESS, DEL_ADDRESS: ADDRESS,
    NEW_ROUTE: ROUTE, DEL_ROUTE: ROUTE, NEW_RULE: ROUTE, DEL_RULE: ROUTE,
}  # fmt: skip
NO_FAMILY = (errno.EAFNOSUPPORT, errno.EOPNOTSUPP)  # of a kernel without IPv6
DATAGRAM_MAX = 65536  # bytes; the kernel's answers are up to 32 KiB


class Message(NamedTuple):
    """One message from the kernel."""

    kind: int
    flags: int
    sequence: int  # of the request
    port: int  # port id of the requester; 0: a notification
    fields: tuple[int, ...]  # of the struct after the header; for NLMSG_ERROR the errno
    attributes: dict[int, bytes]


class Request(NamedTuple):
    """A request to the kernel."""

    kind: int
    flags: int  # in addition to NLM_REQUEST
    body: bytes


class Netlink:
    """A NETLINK_ROUTE socket, for the network namespace in which it was opened."""

    def __init__(self) -> None:
        """Open it. Raises OSError without netlink or a free descriptor."""
        self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
        try:
            self._sock.setblocking(False)
            self._sock.bind((0, 0))
            self.port: int = self._sock.getsockname()[0]
            self._sequence = 0
            # Since Linux 4.20, the kernel filters dumps by the fields of the request.
            with contextlib.suppress(OSError):
                self._sock.setsockopt(SOL_NETLINK, STRICT_CHECK, 1)
        except BaseException:
            self._sock.close()
            raise

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._sock.fileno()

    def close(self) -> None:
        """Close it."""
        self._sock.close()

    def sees(self, sock: socket.socket) -> bool:
        """Return whether a socket is in this network namespace. True where the kernel does not tell
        (before Linux 5.14).
        """
        option = socket.SOL_SOCKET, SO_NETNS_COOKIE, 8
        try:
            return sock.getsockopt(*option) == self._sock.getsockopt(*option)
        except OSError:
            return True

    def join(self, groups: Iterable[int] = GROUPS) -> None:
        """Subscribe to change notifications. Raises OSError."""
        for group in groups:
            self._sock.setsockopt(SOL_NETLINK, ADD_MEMBERSHIP, group)

    def leave(self, groups: Iterable[int] = GROUPS) -> None:
        """Unsubscribe from change notifications. Raises OSError."""
        for group in groups:
            self._sock.setsockopt(SOL_NETLINK, DROP_MEMBERSHIP, group)

    def ask(self, request: Request) -> int:
        """Send a request; return the sequence number of its answers. Raises OSError."""
        kind, flags, body = request
        self._sequence += 1
        header = HEADER.pack(HEADER.size + len(body), kind, NLM_REQUEST | flags, self._sequence, 0)
        self._sock.send(header + body)
        return self._sequence

    def receive(self) -> list[Message]:
        """Return the messages of the next datagram. Raises BlockingIOError if there is none,
        OSError with ENOBUFS if some were lost.
        """
        data, (sender, _) = self._sock.recvfrom(DATAGRAM_MAX)
        return list(messages(data)) if sender == 0 else []  # 0: the kernel

    def answers(self, request: Request) -> list[Message]:
        """Send a request; return what the kernel answers. Raises OSError, with its errno too."""
        sequence = self.ask(request)
        found: list[Message] = []
        while True:
            for message in self.receive():
                if message.sequence != sequence:
                    continue
                if message.kind in (NLMSG_ERROR, NLMSG_DONE):
                    if message.fields and message.fields[0]:
                        raise OSError(message.fields[0], os.strerror(message.fields[0]))
                    return found
                found.append(message)
                if not message.flags & NLM_MULTI:
                    return found

    def order(self, request: Request, ignored: tuple[int, ...] = ()) -> bool:
        """Send a request; return False where it failed for a reason that is ignored.

        Raises OSError for any other reason.
        """
        try:
            self.answers(request)
        except OSError as error:
            if error.errno not in ignored:
                raise
            return False
        return True


def device_to(address: Address, user: int, bound_to: str | None = None) -> int:
    """Return the index of the device that a user's packets to an address leave through.

    bound_to: the device that their socket is bound to. 0 where there is no way, or the kernel does
    not tell.
    """
    body = ROUTE.pack(family(address), address.max_prefixlen, *[0] * 7)
    body += attribute(RTA_DST, address.packed) + attribute(RTA_UID, struct.pack("=I", user))
    try:
        if bound_to is not None:
            return socket.if_nametoindex(bound_to)
        with contextlib.closing(Netlink()) as link:
            (way,) = link.answers(Request(GET_ROUTE, 0, body))
    except (OSError, ValueError):
        return 0
    return number(way.attributes.get(RTA_OIF, b""))


def messages(data: bytes) -> Iterator[Message]:
    """Parse a datagram; ignore a truncated message."""
    offset = 0
    while offset + HEADER.size <= len(data):
        size, kind, flags, sequence, port = HEADER.unpack_from(data, offset)
        if size < HEADER.size or offset + size > len(data):
            return
        body, layout = offset + HEADER.size, LAYOUTS.get(kind)
        fields: tuple[int, ...] = ()
        found: dict[int, bytes] = {}
        if kind == NLMSG_ERROR and size >= HEADER.size + 4:
            fields = (-struct.unpack_from("=i", data, body)[0],)
        elif layout is not None and size >= HEADER.size + layout.size:
            fields = layout.unpack_from(data, body)
            found = attributes(data[body + layout.size : offset + size])
        yield Message(kind, flags, sequence, port, fields, found)
        offset += _aligned(size)


def attributes(data: bytes) -> dict[int, bytes]:
    """Return attributes by type."""
    found = {}
    offset = 0
    while offset + ATTRIBUTE.size <= len(data):
        size, kind = ATTRIBUTE.unpack_from(data, offset)
        if size < ATTRIBUTE.size:
            break
        found[kind & ATTRIBUTE_TYPE] = data[offset + ATTRIBUTE.size : offset + size]
        offset += _aligned(size)
    return found


def attribute(kind: int, value: bytes) -> bytes:
    """Return an encoded attribute."""
    size = ATTRIBUTE.size + len(value)
    return ATTRIBUTE.pack(size, kind) + value + bytes(_aligned(size) - size)


def number(value: bytes) -> int:
    """Return a u32 attribute, or 0 if the size is wrong."""
    return int(struct.unpack("=I", value)[0]) if len(value) == 4 else 0


def index_of(message: Message) -> int:
    """Return the interface index in a link or address message."""
    return message.fields[2 if message.kind in (NEW_LINK, DEL_LINK) else 4]


def next_hops(route: Message) -> list[int]:
    """Return the output interfaces of a route, as indices."""
    found = [number(route.attributes[RTA_OIF])] if RTA_OIF in route.attributes else []
    data = route.attributes.get(RTA_MULTIPATH, b"")
    offset = 0
    while offset + NEXT_HOP.size <= len(data):
        size, _, _, index = NEXT_HOP.unpack_from(data, offset)
        if size < NEXT_HOP.size:
            break
        found.append(index)
        offset += _aligned(size)
    return found


def family(address: Network | Address) -> int:
    """Return AF_INET or AF_INET6."""
    return socket.AF_INET if address.version == 4 else socket.AF_INET6


def new_address(
    index: int, address: ipaddress.IPv4Interface | ipaddress.IPv6Interface, peer: Address | None
) -> Request:
    """Return the request that adds an address to a device."""
    body = ADDRESS.pack(family(address.ip), address.network.prefixlen, 0, 0, index)
    body += attribute(IFA_LOCAL, address.ip.packed)
    body += attribute(IFA_ADDRESS, (peer or address.ip).packed)
    return Request(NEW_ADDRESS, NLM_ACK | NLM_CREATE | NLM_EXCLUSIVE, body)


def new_route(index: int, network: Network, table: int = TABLE_MAIN) -> Request:
    """Return the request that adds a route through a device; index 0: an unreachable one."""
    scope = SCOPE_LINK if network.version == 4 else 0
    fixed = (table, PROTOCOL_BOOT, scope, UNICAST if index else UNREACHABLE, 0)
    body = ROUTE.pack(family(network), network.prefixlen, 0, 0, *fixed)
    body += attribute(RTA_DST, network.network_address.packed)
    if index:
        body += attribute(RTA_OIF, struct.pack("=I", index))
    return Request(NEW_ROUTE, NLM_ACK | NLM_CREATE | NLM_EXCLUSIVE, body)


def _aligned(size: int) -> int:
    return size + 3 & ~3
