"""Ask name servers directly, where one on this machine would ask them through the tunnel.

/etc/resolv.conf often names a server on this machine: systemd-resolved, dnsmasq. It sends its
queries under a user of its own, so with the whole default route (default_route.py) into the tunnel.
A client that is not connected queries the upstream servers itself:

 1. upstream() finds them in the files that such programs write for others.
 2. look_up() queries all of them over UDP for A and AAAA records, again each second, and takes the
    first addresses. What does not parse is ignored.

A forged response leads to a peer that does not have the key.

Sources: RFC 1035, RFC 3596, resolv.conf(5), hosts(5), systemd-resolved.service(8).
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import secrets
import select
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

from ttun.network import netlink

RESOLV_CONF, HOSTS = Path("/etc/resolv.conf"), Path("/etc/hosts")
UPSTREAM = (  # of systemd-resolved, NetworkManager's dnsmasq, dnsmasq with resolvconf
    Path("/run/systemd/resolve/resolv.conf"),
    Path("/run/NetworkManager/no-stub-resolv.conf"),
    Path("/run/dnsmasq/resolv.conf"),
)
OPENWRT = "resolv.conf.d/resolv.conf.auto"  # of netifd, beside the file that RESOLV_CONF links to
MOST = 6  # servers
# Seconds: for all responses; until a query is repeated; for the rest once there is an address.
PATIENCE, REPEAT, REST = 5.0, 1.0, 0.5
A, AAAA, INTERNET = 1, 28, 1  # types and class
SIZES = {A: 4, AAAA: 16}  # bytes of an address
HEADER = struct.Struct(">6H")  # identifier, flags, counts of questions, answers and two more
RECORD = struct.Struct(">2HIH")  # type, class, TTL, length
RESPONSE, RECURSION = 0x8000, 0x0100  # flags; the last four bits are the code of a response
NO_ERROR, NO_SUCH_NAME = 0, 3
DATAGRAM_MAX = 4096


def local() -> str | None:
    """Return the name server in use if it is on this machine."""
    found = [*in_use()] or ["127.0.0.1"]
    return found[0] if all(map(_is_here, found)) else None


def in_use() -> Iterator[str]:
    """Return the servers that the C library asks."""
    return _servers(RESOLV_CONF)


def upstream() -> list[str]:
    """Return the servers that the one on this machine queries, as far as it tells."""
    # OpenWrt's is in /tmp, where anybody may write: used only if root linked RESOLV_CONF to there.
    openwrt = Path(os.path.realpath(RESOLV_CONF)).parent / OPENWRT
    for path in (*UPSTREAM, openwrt):
        if found := [server for server in _servers(path) if not _is_here(server)]:
            return found[:MOST]
    return []


def are_outside() -> bool:
    """Return whether queries can go to another machine, not only to a server on this one."""
    return local() is None or bool(upstream())


def is_in_hosts(name: str) -> bool:
    """Return whether /etc/hosts has a name: it comes before any server."""
    return any(name.lower() in line.lower().split()[1:] for line in _lines(HOSTS))


def look_up(name: str, servers: list[str]) -> list[str]:
    """Return the addresses of a name, IPv4 first; none where there are none.

    Raises OSError when no server responds.
    """
    try:
        queries = {kind: query(name, kind) for kind in SIZES}
    except ValueError:  # it cannot be a name
        return []
    found: dict[int, list[str]] = {}
    responded = False
    with contextlib.ExitStack() as stack:
        waiting, sockets = select.poll(), {}
        for server in servers:
            with contextlib.suppress(OSError):  # there is no way to it
                family, _, _, _, sockaddr = socket.getaddrinfo(
                    server, 53, flags=socket.AI_NUMERICHOST
                )[0]
                sock = stack.enter_context(socket.socket(family, socket.SOCK_DGRAM))
                sock.setblocking(False)
                sock.connect(sockaddr)
                waiting.register(sock, select.POLLIN)
                sockets[sock.fileno()] = sock
        missing = {(descriptor, kind) for descriptor in sockets for kind in queries}
        now = next_at = time.monotonic()
        end = now + PATIENCE
        while missing and now < end:
            if now >= next_at:
                next_at = now + REPEAT
                for descriptor, kind in missing:
                    with contextlib.suppress(OSError):
                        sockets[descriptor].send(queries[kind])
            for descriptor, _ in waiting.poll(1000 * (min(end, next_at) - now)):
                with contextlib.suppress(OSError):
                    response = sockets[descriptor].recv(DATAGRAM_MAX)
                    for kind, sent in queries.items():
                        addresses = parse(sent, response)
                        if addresses is not None:
                            responded = True
                            missing.discard((descriptor, kind))
                        if addresses:
                            found.setdefault(kind, addresses)
                            missing = {each for each in missing if each[1] != kind}
                            end = min(end, time.monotonic() + REST)
            now = time.monotonic()
    if not responded:
        raise OSError(f"no response from name server {', '.join(servers)}")
    return found.get(A, []) + found.get(AAAA, [])


def query(name: str, kind: int) -> bytes:
    """Return a query for records of a type, recursive. Raises ValueError."""
    labels = name.rstrip(".").encode("idna").split(b".")
    if not all(labels):
        raise ValueError("an empty label")
    head = HEADER.pack(secrets.randbelow(1 << 16), RECURSION, 1, 0, 0, 0)
    encoded = b"".join(bytes([len(label)]) + label for label in [*labels, b""])
    return head + encoded + struct.pack(">2H", kind, INTERNET)


def parse(asked: bytes, response: bytes) -> list[str] | None:
    """Return the addresses in the response to a query; None if it is none."""
    if len(response) < len(asked):
        return None
    _, flags, _, records, _, _ = HEADER.unpack_from(response)
    if (
        response[:2] != asked[:2]
        or not flags & RESPONSE
        or flags & 15 not in (NO_ERROR, NO_SUCH_NAME)
        or response[HEADER.size : len(asked)].lower() != asked[HEADER.size :].lower()
    ):
        return None
    wanted, found, at = struct.unpack(">2H", asked[-4:]), [], len(asked)
    with contextlib.suppress(struct.error, IndexError):  # it is cut off
        for _ in range(records):
            while 0 < (length := response[at]) < 0xC0:  # 0xC0 and more: a pointer ends the name
                at += 1 + length
            at += 2 if length else 1
            kind, group, _, size = RECORD.unpack_from(response, at)
            at += RECORD.size + size
            if (kind, group) == wanted and size == SIZES[kind] and at <= len(response):
                found.append(str(ipaddress.ip_address(response[at - size : at])))
    return found


def _servers(path: Path) -> Iterator[str]:
    for line in _lines(path):
        words = line.split()
        if len(words) > 1 and words[0] == "nameserver":
            yield words[1]


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return [line.partition("#")[0] for line in text.splitlines()]


def _is_here(server: str) -> bool:
    """Return whether an address is one of this machine's."""
    with contextlib.suppress(ValueError, OSError):
        address = ipaddress.ip_address(server.partition("%")[0])
        device = netlink.device_to(address, os.geteuid())
        return address.is_loopback or device == socket.if_nametoindex("lo")
    return True  # no address
