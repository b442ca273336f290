"""End to end: unusual packets of 64 KiB.

Routing headers and source routes, where the final address is not in the IP header; options longer
than the usual headers; encapsulated packets, with the checksum of the inner one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator

import pytest
from tunnel import CLIENT, OTHER, SERVER, TUNNEL4, TUNNEL6, Bench, every_way

pytestmark = pytest.mark.hosts

SIZE = 5_000_000
IPV6_DSTOPTS, LSRR = 59, 131  # linux/in6.h; RFC 791
with_offload = pytest.mark.parametrize("bench", ["x1", "v1"], indirect=True)
NEAR6, FAR6, FAR4 = "2001:db8:1::1", "2001:db8:2::1", "198.51.100.1"  # RFC 3849, RFC 5737


def allow(bench: Bench, host: str, *names: str) -> None:
    """Set sysctls of a host to 1."""
    for name in names:
        bench.run(host, "sysctl", "-qw", f"net.{name}=1")


@contextlib.contextmanager
def serving_at(bench: Bench, *addresses: str) -> Iterator[None]:
    """Add addresses to the server, and receive transfers at the last one."""
    for address in addresses:
        bench.run(SERVER, "ip", "address", "add", address, "dev", "lo")
    try:
        bench.serve_traffic(SERVER, addresses[-1])
        yield
    finally:
        for address in addresses:
            bench.run(SERVER, "ip", "address", "delete", address, "dev", "lo")


def send_whole(bench: Bench, address: str, prepare: Callable[[socket.socket], None]) -> None:
    """Send SIZE bytes over TCP from a prepared socket of the client; all arrive."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with bench.on(CLIENT, lambda: socket.socket(family)) as sock:
        prepare(sock)
        sock.settimeout(20)
        sock.connect((address, 5001))
        payload = random.Random(1).randbytes(SIZE)
        sock.sendall(struct.pack(">BQ", 0, SIZE) + payload + hashlib.sha256(payload).digest())
        assert sock.recv(1) == b"1"


@with_offload
@pytest.mark.parametrize("mode", ["inline", "encap"])
def test_segment_routing_is_carried(bench: Bench, mode: str) -> None:
    server, client = bench.tunnel()
    device = client.status()["device"]
    for name in ("all", server.status()["device"]):
        allow(bench, SERVER, f"ipv6.conf.{name}.seg6_enabled")
    bench.run(CLIENT, "ip", "route", "add", NEAR6, "dev", device)
    try:
        bench.run(CLIENT, "ip", "-6", "route", "add", FAR6, "encap", "seg6", "mode", mode,
                  "segs", NEAR6, "dev", device)  # fmt: skip
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this kernel or ip has no segment routing: {error.stderr.strip()}")
    with serving_at(bench, NEAR6, FAR6):
        send_whole(bench, FAR6, lambda sock: None)


@with_offload
def test_a_long_destination_option_is_carried(bench: Bench) -> None:
    bench.tunnel()
    bench.serve_traffic(SERVER, TUNNEL6[SERVER])
    option = bytes([0x1E, 236]) + bytes(236)  # for experiments (RFC 4727): skipped if unknown
    header = bytes([0, 29]) + option

    def prepare(sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_DSTOPTS, header)

    send_whole(bench, TUNNEL6[SERVER], prepare)


@with_offload
def test_a_source_route_is_carried(bench: Bench) -> None:
    ends = dict(zip((SERVER, CLIENT), bench.tunnel()))
    for host, end in ends.items():
        for name in ("all", end.status()["device"]):
            allow(bench, host, f"ipv4.conf.{name}.accept_source_route")
    bench.run(CLIENT, "ip", "route", "add", FAR4, "dev", ends[CLIENT].status()["device"])
    hop = socket.inet_aton(TUNNEL4[SERVER])

    def prepare(sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, bytes([1, LSRR, 7, 4]) + hop)

    with serving_at(bench, FAR4):
        send_whole(bench, FAR4, prepare)


@contextlib.contextmanager
def vxlan(bench: Bench, addresses: dict[str, str], mtu: int) -> Iterator[None]:
    """Connect 203.0.113.1 and 203.0.113.2 through the tunnel."""
    v6 = ":" in addresses[SERVER]
    ends = {SERVER: "203.0.113.1/24", CLIENT: "203.0.113.2/24"}
    for host, address in ends.items():
        bench.run(host, "ip", "link", "add", "vx0", "type", "vxlan", "id", "7", "dstport", "4789",
                  "local", addresses[host], "remote", addresses[OTHER[host]])  # fmt: skip
        bench.run(host, "ip", "address", "add", address, "dev", "vx0")
        bench.run(host, "ip", "link", "set", "vx0", "mtu", str(mtu - (70 if v6 else 50)), "up")
    try:
        yield
    finally:
        for host in ends:
            bench.run(host, "ip", "link", "delete", "vx0")


@every_way
@pytest.mark.parametrize("mtu", [1280, 9000, 65400])
def test_datagrams_in_vxlan_arrive_whole(bench: Bench, mtu: int) -> None:
    bench.tunnel("-mtu", str(mtu))
    for addresses in (TUNNEL4, TUNNEL6):
        receiver, sender = (
            bench.on(host, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            for host in (SERVER, CLIENT)
        )
        with vxlan(bench, addresses, mtu), receiver, sender:
            receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
            receiver.bind(("203.0.113.1", 7000))
            receiver.settimeout(10)
            for length in (1000, 30_000, 40_000, 60_000):
                for _ in range(20):
                    payload = os.urandom(length)
                    sender.sendto(payload, ("203.0.113.1", 7000))
                    assert receiver.recv(65536) == payload, (length, addresses[SERVER])
