"""Complete endpoints: a device that is changed or removed."""

from __future__ import annotations

import contextlib
import json
import platform
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from machine import cpu
from peer import Peer
from strangers import connect
from tunnel import (
    CLIENT,
    OTHER,
    PROGRAM,
    SERVER,
    TUNNEL4,
    TUNNEL6,
    Bench,
    End,
    Program,
    eventually,
)
from watched import commands, flood

from ttun.lab import netns

pytestmark = pytest.mark.hosts

ROUTE4, ROUTE6 = "203.0.113.0/24", "2001:db8:1::/48"
ROUTES = ("--route", ROUTE4, "--route", ROUTE6)
GONE6 = ["address {} missing", f"route {ROUTE6} missing"]
HOSTS = pytest.mark.parametrize("host", [SERVER, CLIENT])


def shown(bench: Bench, end: End) -> dict[str, Any]:
    """The status of an end, as in ``ttun show``."""
    found = json.loads(bench.run(end.host, *PROGRAM, "show", "--json"))
    (mine,) = [tunnel for tunnel in found if tunnel["role"] == end.host]
    return dict(mine)


def misses(bench: Bench, end: End, *missing: str) -> None:
    eventually(lambda: end.status()["missing"] == list(missing), f"{missing} in the status")
    assert shown(bench, end)["missing"] == list(missing)


def put_back(bench: Bench, end: End) -> None:
    """Run the commands of the last log line; nothing is missing afterwards."""
    for command in commands(end.log().splitlines()[-1]):
        bench.run(end.host, "sh", "-c", command)
    end.says("ttun0 is complete again")
    misses(bench, end)


@HOSTS
def test_a_device_that_was_down_says_what_it_lost_and_carries_on(bench: Bench, host: str) -> None:
    end = dict(zip((SERVER, CLIENT), bench.tunnel(*ROUTES)))[host]
    address6 = f"address {TUNNEL6[host]}/126 missing"
    lost = [address6, f"route {ROUTE4} missing", f"route {ROUTE6} missing"]
    bench.run(host, "ip", "link", "set", "ttun0", "down")
    end.says(f"ttun0 changed: device down, {', '.join(lost)} (to restore: sudo ip link set ttun0")
    misses(bench, end, "device down", *lost)
    bench.run(host, "ip", "link", "set", "ttun0", "up")
    end.says(f"ttun0 is still incomplete: {', '.join(lost)} (to restore: sudo ip address add ")
    misses(bench, end, *lost)
    text = bench.run(host, *PROGRAM, "show", "ttun0")
    assert f"ttun0: {host}\n  device: {', '.join(lost)}\n  peer: " in text
    put_back(bench, end)
    assert f"ttun0: {host}\n  peer: " in bench.run(host, *PROGRAM, "show", "ttun0")
    bench.answers()
    assert bench.ping(host, TUNNEL6[OTHER[host]], 3) == 3
    assert end.log().count("authenticated") == 1, "the session went on"
    assert end.log().count("ttun0 changed") == 1


def test_ipv6_that_an_mtu_or_a_setting_took_away_is_said(plain: Bench) -> None:
    """Also without a peer."""
    end = plain.server(*ROUTES)
    lost = [f"address {TUNNEL6[SERVER]}/126 missing", f"route {ROUTE6} missing"]
    plain.run(SERVER, "ip", "link", "set", "ttun0", "mtu", "1000")
    end.says(f"ttun0 changed: MTU is 1000, not 1280, {', '.join(lost)} (to restore: ")
    plain.run(SERVER, "ip", "link", "set", "ttun0", "mtu", "1280")
    end.says(f"ttun0 is still incomplete: {', '.join(lost)} (to restore: ")
    misses(plain, end, *lost)
    put_back(plain, end)
    setting = "net/ipv6/conf/ttun0/disable_ipv6"
    plain.run(SERVER, "sysctl", "-qw", f"{setting}=1")
    end.says(f"ttun0 changed: IPv6 disabled, {', '.join(lost)} (to restore: ")
    misses(plain, end, "IPv6 disabled", *lost)
    plain.run(SERVER, "sysctl", "-qw", f"{setting}=0")
    end.says(f"ttun0 is still incomplete: {', '.join(lost)} (to restore: ", times=2)
    for command in commands(end.log().splitlines()[-1]):
        plain.run(SERVER, "sh", "-c", command)
    end.says("ttun0 is complete again", times=2)


def test_a_change_is_read_at_once(plain: Bench) -> None:
    """Also one of which the kernel sends a single message, while nothing else happens."""
    end = plain.server(*ROUTES)
    fastest, tries = 60.0, 0
    while fastest > 0.9 and (tries := tries + 1) <= 10:
        plain.run(SERVER, "ip", "route", "del", ROUTE4, "dev", "ttun0")
        began = time.monotonic()
        eventually(lambda: end.status()["missing"] == [f"route {ROUTE4} missing"], "it is read")
        fastest = min(fastest, time.monotonic() - began)
        plain.run(SERVER, "ip", "route", "add", ROUTE4, "dev", "ttun0")
        eventually(lambda: end.status()["missing"] == [], "that is read too")
    assert fastest < 0.9, "a beat a second would do that"


def test_a_new_name_is_that_of_the_tunnel(plain: Bench) -> None:
    server, _ = plain.tunnel("--down", "echo hook of $TTUN_DEVICE >&2")
    plain.run(SERVER, "ip", "link", "set", "ttun0", "name", "uplink")
    server.says("ttun0 was renamed to uplink")
    assert shown(plain, server)["device"] == "uplink"
    plain.answers()
    server.stop()
    assert "hook of uplink" in server.log()


def test_a_device_in_another_namespace_carries_on(plain: Bench) -> None:
    """Where its user gives it addresses, as with other tunnels that are made in one namespace for
    another."""
    away = f"{plain.pair.names[CLIENT]}-away"
    _, client = plain.tunnel()
    netns.ip("netns", "add", away)
    try:
        plain.run(CLIENT, "ip", "link", "set", "ttun0", "netns", away)
        client.says("moved to another network namespace (set addresses and routes there")
        misses(plain, client, "moved to another network namespace")
        for arguments in (["address", "add", "10.1.1.2/30", "dev", "ttun0"],
                          ["link", "set", "ttun0", "up"]):  # fmt: skip
            netns.ip("-n", away, *arguments)
        plain.answers(SERVER)
    finally:
        netns.ip("netns", "delete", away)
    assert client.ended() == 1
    assert "(was ttun0 removed?)" in client.log().splitlines()[-1]


@pytest.mark.parametrize("where", ["10.99.{0}.{1}/32 dev ttun0", "10.99.{0}.{1}/32 dev vserver"])
def test_a_flood_of_changes_takes_an_end_no_time(plain: Bench, where: str) -> None:
    server, _ = plain.tunnel("--route", ROUTE4)
    changes = [
        f"address {action} {where.format(first, second)}"
        for first in range(2)
        for action in ("add", "del")
        for second in range(1, 251)
    ]
    with flood(plain.pair.names[SERVER], changes):
        time.sleep(0.5)
        before = cpu(server.process.pid)
        time.sleep(2)
        used = (cpu(server.process.pid) - before) / 2
        print(f"{100 * used:.1f} % of a core")
        assert used < 0.15, "0.015 are usual"
        plain.answers()
    plain.run(SERVER, "ip", "route", "del", ROUTE4, "dev", "ttun0")
    server.says(f"ttun0 changed: route {ROUTE4} missing")
    put_back(plain, server)
    plain.run(SERVER, "ip", "link", "delete", "ttun0")
    assert server.ended() == 1


PROGRAM_OF_ITS_OWN = """
import ctypes, ipaddress, logging, platform, struct, sys, ttun
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
if "without-netlink" in sys.argv:
    # linux/filter.h, linux/seccomp.h: socket(AF_NETLINK) fails with EAFNOSUPPORT.
    number = {"x86_64": 41, "aarch64": 198}[platform.machine()]
    steps = [(0x20, 0, 0, 0), (0x15, 0, 3, number), (0x20, 0, 0, 16), (0x15, 0, 1, 16),
             (0x06, 0, 0, 0x50000 | 97), (0x06, 0, 0, 0x7fff0000)]
    code = b"".join(struct.pack("=HBBI", *step) for step in steps)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("@HP", len(steps), ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program, 0, 0) == 0
server = ttun.Server(b"secret", routes=[ipaddress.ip_network("203.0.113.0/24")])
server.start()
try:
    server.wait()
except ttun.TtunError as error:
    print("over:", error, file=sys.stderr)
"""


@contextmanager
def program(bench: Bench, *arguments: str) -> Iterator[Program]:
    """A program that embeds a server, and keeps its privileges."""
    log = bench.directory / "program.log"
    with log.open("w") as file:
        command = [sys.executable, "-c", PROGRAM_OF_ITS_OWN, *arguments]
        process = bench.pair.start(SERVER, command, stderr=file, environment=netns.environment())
    try:
        started = Program(process, log)
        started.says("listening on")
        yield started
    finally:
        process.kill()
        process.wait()


def test_a_program_that_kept_its_privileges_puts_back_what_was_lost(plain: Bench) -> None:
    with program(plain) as embedding:
        plain.run(SERVER, "ip", "link", "set", "ttun0", "down")
        embedding.says("ttun0 changed: device down")
        plain.run(SERVER, "ip", "link", "set", "ttun0", "up")
        embedding.says(f"restored on ttun0: address fc11::1/126, route {ROUTE4}")
        embedding.says("ttun0 is complete again")
        assert ROUTE4 in plain.run(SERVER, "ip", "route", "show", "dev", "ttun0")
        assert "fc11::1/126" in plain.run(SERVER, "ip", "address", "show", "dev", "ttun0")
        plain.client().says("authenticated")
        plain.answers()


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "aarch64"), reason="other numbers of system calls"
)
def test_without_netlink_it_works_and_says_so_once(plain: Bench) -> None:
    """As under a seccomp filter that blocks netlink."""
    with program(plain, "without-netlink") as embedding:
        plain.client().says("authenticated")
        plain.answers()
        line = "cannot monitor ttun0: netlink: Address family not supported by protocol"
        assert embedding.log().count(line) == 1
        plain.run(SERVER, "ip", "link", "delete", "ttun0")
        embedding.says("(was ttun0 removed?)")
        assert embedding.ended() == 0


# ---- a device that is removed, whatever its end is doing ----

KEPT: list[socket.socket] = []  # open until the test ends


def alone(bench: Bench) -> End:
    return bench.server()


def taking_over(bench: Bench) -> End:
    return bench.server("--takeover")


def dialling(bench: Bench) -> End:
    """An address without a host: an attempt takes four seconds."""
    end = bench.client(to="192.0.2.99")
    end.says("tun ttun0 up")
    time.sleep(0.5)
    return end


def waiting(bench: Bench) -> End:
    """For its next attempt, up to thirty seconds."""
    end = bench.client()
    end.says("reconnecting", times=4)
    return end


def unanswered(bench: Bench) -> End:
    bench.helper(SERVER, *netns.python("ttun.lab.traffic", "serve", "192.0.2.1", "9998"))
    end = bench.client(to="192.0.2.1:9998")
    end.says("handshaking")
    return end


def stuck(bench: Bench) -> End:
    """With a peer that does not read, until the device is not read either."""
    end = bench.server("--wire", "v1")
    sock = connect(bench)
    Peer(sock, b"secret").handshake_as_client()
    end.says("authenticated")

    def send() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
            datagrams.connect((TUNNEL4[CLIENT], 9))
            while True:
                before = shown(bench, end)["counters"]["uplink_packets"]
                for _ in range(20_000):
                    with contextlib.suppress(OSError):
                        datagrams.send(bytes(1200))
                if shown(bench, end)["counters"]["uplink_packets"] == before:
                    return

    bench.on(SERVER, send)
    KEPT.append(sock)
    return end


@pytest.mark.parametrize("doing", [alone, taking_over, dialling, waiting, unanswered, stuck])
def test_a_removed_device_ends_it_whatever_it_does(
    plain: Bench, doing: Callable[[Bench], End]
) -> None:
    end = doing(plain)
    plain.run(end.host, "ip", "link", "delete", "ttun0")
    removed = time.monotonic()
    assert end.ended(10) == 1
    print(f"{time.monotonic() - removed:.2f} s")
    assert end.log().splitlines()[-1].endswith("(was ttun0 removed?)"), end.log()
    assert "Traceback" not in end.log()
    while KEPT:
        KEPT.pop().close()
