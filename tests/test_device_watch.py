"""Complete endpoints: changed or removed device, removed address, system suspend."""

from __future__ import annotations

import contextlib
import json
import platform
import re
import socket
import struct
import subprocess
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
    ROOT,
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
OURS = "192.0.2.77"  # the client's local address, until it is removed
HOSTS = pytest.mark.parametrize("host", [SERVER, CLIENT])


def shown(bench: Bench, end: End) -> dict[str, Any]:
    """The status of an end, as in ``ttun show``."""
    found = json.loads(bench.run(end.host, *PROGRAM, "show", "--json"))
    (mine,) = [tunnel for tunnel in found if tunnel["role"] == end.host]
    return dict(mine)


def misses(bench: Bench, end: End, *missing: str) -> None:
    eventually(lambda: shown(bench, end)["missing"] == list(missing), f"{missing} in show")


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
        time.sleep(4)
        used = (cpu(server.process.pid) - before) / 4
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
        plain.run(SERVER, "sh", "-c", "ip link set ttun0 down; sleep 1; ip link set ttun0 up")
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


# ---- addresses that leave, and machines that sleep ----


@contextmanager
def another_address(bench: Bench, host: str = CLIENT) -> Iterator[Callable[[], None]]:
    """The host uses OURS for the other one, until the function is called."""
    link = bench.pair.links[host]
    bench.run(host, "ip", "address", "add", f"{OURS}/24", "dev", link)
    bench.run(host, "ip", "route", "add", netns.IPV4[OTHER[host]], "dev", link, "src", OURS)
    try:
        yield lambda: bench.run(host, "ip", "address", "del", f"{OURS}/24", "dev", link) and None
    finally:
        for command in (
            f"address del {OURS}/24 dev {link}",
            f"route del {netns.IPV4[OTHER[host]]}",
        ):
            with contextlib.suppress(subprocess.CalledProcessError):
                bench.run(host, "ip", *command.split())


def test_a_client_whose_address_leaves_dials_from_the_next_one(bench: Bench) -> None:
    """In both protocols, and twice: also after a short session."""
    server = bench.server("--takeover")
    client = bench.client()
    for times in (1, 2):
        with another_address(bench) as leave:
            if times == 1:
                client.stop()
                client = bench.client()
            else:
                server.stop()
                server = bench.server("--takeover")
            server.says(f"peer {OURS}:")
            client.says("authenticated", times=times)
            bench.answers()
            leave()
            left = time.monotonic()
            client.says(f"local address {OURS} was removed", times=times)
            server.says("peer 192.0.2.2:", seconds=10)
            bench.answers()
            print(f"{time.monotonic() - left:.2f} s")
            assert client.log().count("reconnecting at once") >= times
        bench.answers()


def test_a_server_whose_address_leaves_is_free_for_the_next_client(plain: Bench) -> None:
    server = plain.server()
    with another_address(plain, SERVER) as leave:
        first = plain.client(to=OURS)
        first.says("authenticated")
        plain.answers()
        leave()
        server.says("disconnected after", seconds=10)
        assert f"local address {OURS} was removed" in server.log()
        first.stop()
        plain.client().says("authenticated", seconds=10)
        plain.answers()


def test_a_client_that_is_shaking_hands_notices_too(plain: Bench) -> None:
    silent = plain.helper(SERVER, *netns.python("ttun.lab.traffic", "serve", "192.0.2.1", "9998"))
    with another_address(plain) as leave:
        client = plain.client(to="192.0.2.1:9998")
        client.says("handshaking")
        leave()
        client.says(f"failed: local address {OURS} was removed", seconds=7)
        client.says("handshaking", times=2, seconds=7)
    silent.kill()


@pytest.fixture
def clock(plain: Bench) -> Iterator[tuple[dict[str, str], Callable[[int], None]]]:
    """An environment in which the function simulates a suspend of an end."""
    library, path = plain.directory / "clock.so", plain.directory / "clock"
    source = ROOT / "tests/helpers/clock.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-O2", source, "-o", library], check=True)
    path.write_bytes(bytes(16))
    path.chmod(0o644)

    def sleep(seconds: int) -> None:
        with path.open("r+b") as file:
            file.write(struct.pack("=qq", 0, seconds))

    yield {"LD_PRELOAD": str(library), "TTUN_TEST_CLOCK": str(path)}, sleep


def test_a_client_whose_machine_slept_dials_again(
    plain: Bench, clock: tuple[dict[str, str], Callable[[int], None]]
) -> None:
    environment, sleep = clock
    ends = [
        plain.start(host, *arguments, "-k", "secret", environment=environment)
        for host, arguments in ((SERVER, ["server"]), (CLIENT, ["client", "-s", "192.0.2.1"]))
    ]
    server, client = ends
    for end in ends:
        end.says("authenticated")
    sleep(3600)
    woken = time.monotonic()
    client.says("disconnected after", seconds=10)
    assert "the system was suspended for 3600 s" in client.log()
    client.says("authenticated", times=2, seconds=10)
    print(f"{time.monotonic() - woken:.2f} s")
    assert "suspended" not in server.log(), "whose peers may be there still"
    plain.answers()
    # And one that waits for its next dial dials now.
    server.stop()
    eventually(
        lambda: re.search(r"reconnecting in ([6-9]|\d\d)\.\d s$", client.log()), "a long wait", 40
    )
    dials = client.log().count("cannot connect")
    sleep(7200)
    client.says("reconnecting now: the system was suspended for 3600 s", seconds=5)
    client.says("cannot connect", times=dials + 1, seconds=5)
