"""Changes of a real device: detected, logged once, and restored with the logged commands.

Tests DeviceWatch alone; test_device_watch.py tests complete endpoints.
"""

from __future__ import annotations

import itertools
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from tunnel import SERVER, eventually
from watched import Watched, flood

from ttun.lab import netns
from ttun.lab.netns import Hosts
from ttun.settings import SERVER as USUAL
from ttun.settings import Addresses
from ttun.watch import device_watch, state_reader

pytestmark = pytest.mark.hosts

ADDRESS4, ADDRESS6 = "address 10.1.1.1/30 missing", "address fc11::1/126 missing"
ROUTE4, ROUTE6 = "203.0.113.0/24", "2001:db8:1::/48"
MISSING4, MISSING6 = f"route {ROUTE4} missing", f"route {ROUTE6} missing"


@pytest.fixture
def host(pair: Hosts) -> str:
    return pair.names[SERVER]


def test_a_device_that_was_down_lacks_its_ipv6_address_and_routes(host: str) -> None:
    with Watched(host, ROUTE4, ROUTE6) as end:
        end.ip("link", "set", "ttun0", "down")
        end.misses("device down", ADDRESS6, MISSING4, MISSING6)
        line = end.says("ttun0 changed: device down, address fc11::1/126 missing, ")
        assert "(to restore: sudo ip link set ttun0 up; sudo ip address add fc11::1/126 " in line
        end.ip("link", "set", "ttun0", "up")
        end.misses(ADDRESS6, MISSING4, MISSING6)
        end.says("ttun0 is still incomplete: address fc11::1/126 missing, ")
        end.do_what_it_says()
        end.misses()
        end.says("ttun0 is complete again")
        assert len(end.lines) == 4, end.lines  # each change once, behind «tun ttun0 up»


def test_down_and_up_at_once_is_noticed_too(host: str) -> None:
    with Watched(host, ROUTE4, ROUTE6) as end:
        end.shell("ip link set ttun0 down && ip link set ttun0 up")
        end.misses(ADDRESS6, MISSING4, MISSING6)
        end.says("ttun0 changed: address fc11::1/126 missing, ")
        end.do_what_it_says()
        end.misses()


def test_a_smaller_mtu_takes_ipv6_away(host: str) -> None:
    with Watched(host, ROUTE4, ROUTE6) as end:
        end.ip("link", "set", "ttun0", "mtu", "1000")
        end.misses("MTU is 1000, not 1280", ADDRESS6, MISSING6)
        end.says("ttun0 changed: MTU is 1000, not 1280, ")
        end.do_what_it_says()
        end.misses()
        end.ip("link", "set", "ttun0", "mtu", "9000")
        end.misses("MTU is 9000, not 1280")


def test_disabled_ipv6_is_named(host: str) -> None:
    with Watched(host, ROUTE4, ROUTE6) as end:
        for name in ("ttun0", "all"):
            end.shell(f"sysctl -qw net/ipv6/conf/{name}/disable_ipv6=1")
            end.misses("IPv6 disabled", ADDRESS6, MISSING6)
            if name == "all":
                end.shell("sysctl -qw net/ipv6/conf/all/disable_ipv6=0")
                end.misses(ADDRESS6, MISSING6)
                end.says("still incomplete: address")
            else:
                end.says("IPv6 disabled")
            end.do_what_it_says()
            end.misses()
            end.says("ttun0 is complete again")
        netns.ip("-n", host, "address", "replace", "2001:db8::1/64", "dev", "vserver", "nodad")


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        ("address del 10.1.1.1/30 dev ttun0", [ADDRESS4, MISSING4]),
        ("address del fc11::1/126 dev ttun0", [ADDRESS6]),
        ("address flush dev ttun0", [ADDRESS4, ADDRESS6, MISSING4]),
        (f"route del {ROUTE4} dev ttun0", [MISSING4]),
        (f"route del {ROUTE6} dev ttun0", [MISSING6]),
        (f"route replace {ROUTE4} dev vserver", [MISSING4]),
        (f"-6 route replace {ROUTE6} dev vserver", [MISSING6]),
        ("route del 10.1.1.0/30 dev ttun0", ["route 10.1.1.0/30 missing"]),
        ("-6 route del fc11::/126 dev ttun0", ["route fc11::/126 missing"]),
    ],
)
def test_an_address_or_a_route_that_is_deleted_is_missing(
    host: str, command: str, missing: list[str]
) -> None:
    with Watched(host, ROUTE4, ROUTE6) as end:
        end.ip(*command.split())
        end.misses(*missing)
        end.says(f"ttun0 changed: {', '.join(missing)} (to restore: ")
        if "replace" in command:
            end.shell(f"ip -{6 if '-6' in command else 4} route del {command.split()[-3]}")
        end.do_what_it_says()
        end.misses()


@pytest.mark.parametrize(
    ("given", "mtu", "routes"),
    [
        ((), 576, [ROUTE4]),
        ((), 65519, [ROUTE4, "0.0.0.0/1", "128.0.0.0/1", "::/1", "8000::/1"]),
        (("10.9.0.1", "fd09::1", "10.9.0.2", "fd09::2"), 1280, ["0.0.0.0/0", "::/0"]),
        (("10.9.0.1/32", "fd09::1/128"), 1280, []),
        (("10.9.0.1/31", "fd09::1/127"), 1280, []),
        (("10.9.0.1/24", "fd09::1/64", "10.9.0.9"), 1280, ["10.9.0.0/25", "fd09::/65"]),
        ((), 1280, [f"198.18.{n}.0/24" for n in range(256)]),
        ((), 1280, [f"2001:db8:{n:x}::/64" for n in range(1, 257)]),
    ],
)
def test_whatever_the_device_was_given_nothing_is_missing(
    host: str, given: tuple[str, ...], mtu: int, routes: list[str]
) -> None:
    with Watched(host, *routes, addresses=Addresses.parse(USUAL, *given), mtu=mtu) as end:
        assert end.watch.missing == []
        # And each of them is looked at.
        end.ip("link", "set", "ttun0", "down")
        family = 6 if mtu >= 1280 else 4
        number = 1 + (family == 6) + len(routes) + ("fd09::2" in given)
        eventually(lambda: len(end.watch.missing) == number, f"{number} things are missing")
        assert all(f"route {route} missing" in end.watch.missing for route in routes)
        line = end.says("ttun0 changed: device down")
        assert len(line) < 900
        assert ("and 252 more" in line) == (len(routes) == 256)
        assert len(end.lines) <= 3


def test_a_peers_address_is_looked_at_too(host: str) -> None:
    ours = Addresses.parse(USUAL, "10.9.0.1", "fd09::1", "10.9.0.2", "fd09::2")
    with Watched(host, addresses=ours) as end:
        end.ip("route", "del", "fd09::2", "dev", "ttun0")
        end.misses("route fd09::2/128 missing")
        end.says("route fd09::2/128 missing")
        end.do_what_it_says()
        end.misses()
        end.ip("address", "del", "10.9.0.1", "peer", "10.9.0.2/32", "dev", "ttun0")
        end.ip("address", "add", "10.9.0.1", "peer", "10.9.0.3/32", "dev", "ttun0")
        end.misses("address 10.9.0.1 peer 10.9.0.2/32 missing")
        end.says("address 10.9.0.1 peer 10.9.0.2/32 missing")
        end.ip("address", "del", "10.9.0.1", "peer", "10.9.0.3/32", "dev", "ttun0")
        end.do_what_it_says()
        end.misses()


def test_a_new_name_is_followed(host: str) -> None:
    with Watched(host, ROUTE4) as end:
        end.ip("link", "set", "ttun0", "name", "uplink")
        end.says("ttun0 was renamed to uplink")
        assert end.device.name == "uplink"
        end.ip("route", "del", ROUTE4, "dev", "uplink")
        end.says(f"uplink changed: {MISSING4}")
        end.do_what_it_says()
        end.misses()


def test_a_name_that_is_no_text_is_written_as_one(host: str) -> None:
    with Watched(host) as end:
        command = ["ip", "-n", host, "link", "set", "ttun0", "name", b"\xff\x1b[2J"]
        subprocess.run(command, check=True)
        end.says("ttun0 was renamed to \\xff\\x1b[2J")


@contextmanager
def namespace(name: str) -> Iterator[str]:
    netns.ip("netns", "add", name)
    try:
        yield name
    finally:
        if name in netns.ip("netns", "list"):
            netns.ip("netns", "delete", name)


def test_a_device_that_is_moved_away_lives_until_it_goes(host: str) -> None:
    with namespace(f"{host}-away") as away, Watched(host, ROUTE4) as end:
        end.ip("link", "set", "ttun0", "netns", away)
        end.misses("moved to another network namespace")
        end.says("moved to another network namespace (set addresses and routes there, or restart")
        assert not end.watch.device_gone
        netns.ip("-n", away, "link", "set", "ttun0", "netns", host)
        end.misses("device down", ADDRESS4, ADDRESS6, MISSING4)
        end.says("ttun0 changed: device down")
        end.do_what_it_says()
        end.misses()
        end.ip("link", "set", "ttun0", "netns", away)
        end.misses("moved to another network namespace")
        assert not end.watch.device_gone
        netns.ip("netns", "delete", away)
        eventually(lambda: end.watch.device_gone, "it went with its namespace", 20)


def test_a_removed_device_is_noticed_at_once(host: str) -> None:
    with Watched(host) as end:
        end.ip("link", "delete", "ttun0")
        started = time.monotonic()
        eventually(lambda: end.watch.device_gone, "it is gone", 10)
        assert time.monotonic() - started < 1
        assert end.watch.missing == ["device removed"]
        looks = end.looks
        time.sleep(1)
        assert end.looks - looks < 20, "and the socket is not readable for ever"


def test_who_still_may_puts_addresses_and_routes_back(host: str) -> None:
    with Watched(host, ROUTE4, ROUTE6, privileged=True) as end:
        end.ip("link", "set", "ttun0", "down")
        end.misses("device down", ADDRESS6, MISSING4, MISSING6)
        end.says("ttun0 changed: device down")
        end.ip("link", "set", "ttun0", "up")
        end.misses(seconds=20)
        end.says(f"restored on ttun0: address fc11::1/126, route {ROUTE4}, route {ROUTE6}")
        end.says("ttun0 is complete again")
        shown = end.ip("address", "show", "dev", "ttun0")
        assert "inet 10.1.1.1/30 " in shown and "inet6 fc11::1/126 " in shown
        assert ROUTE4 in end.ip("route", "show", "dev", "ttun0")
        assert ROUTE6 in end.ip("-6", "route", "show", "dev", "ttun0")
        end.ip("link", "set", "ttun0", "mtu", "1000")
        end.misses("MTU is 1000, not 1280", ADDRESS6, MISSING6)
        end.ip("link", "set", "ttun0", "mtu", "1280")
        end.misses(seconds=2 * device_watch.MEND_INTERVAL)


def test_who_gave_its_rights_up_puts_nothing_back(host: str) -> None:
    """Although the socket was opened earlier: the kernel checks the sender's privileges."""
    with Watched(host, ROUTE4) as end:
        end.ip("route", "del", ROUTE4, "dev", "ttun0")
        end.says(MISSING4)
        time.sleep(1.5)
        assert end.watch.missing == [MISSING4]
        assert ROUTE4 not in end.ip("route", "show", "dev", "ttun0")


FLOODS = {
    "other-routes": ("route", "10.{0}.{1}.0/24 dev vserver"),
    "other-routes-through-it": ("route", "10.{0}.{1}.0/24 dev ttun0"),
    "the-same-route-elsewhere": ("route", f"{ROUTE4} dev vserver metric {{1}}"),
    "other-addresses": ("address", "10.99.{0}.{1}/32 dev vserver"),
    "its-addresses": ("address", "10.99.{0}.{1}/32 dev ttun0"),
}


@pytest.mark.parametrize("kind", FLOODS)
def test_a_flood_of_changes_takes_no_time_and_hides_nothing(
    host: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_reader, "DEAF", 60.0)  # so that it is deaf until the last line
    what, where = FLOODS[kind]
    commands = (
        f"{what} {action} {where.format(first, second)}"
        for first, action, second in itertools.product(range(2), ("add", "del"), range(1, 251))
    )
    with Watched(host, ROUTE4) as end:
        with flood(host, commands):
            time.sleep(0.5)
            before, began = end.cpu, time.monotonic()
            time.sleep(1)
            used = (end.cpu - before) / (time.monotonic() - began)
            print(f"{100 * used:.2f} % of a core, {1000 * end.longest:.1f} ms at most")
            assert used < 0.05, "0.004 are usual at most"
            assert end.watch.missing == []
            end.ip("route", "del", ROUTE4, "dev", "ttun0")
            end.misses(MISSING4, seconds=20)
        assert len(end.lines) < 5, end.lines
        end.ip("route", "replace", ROUTE4, "dev", "ttun0")
        end.misses(seconds=20)


def test_a_device_that_flaps_fills_no_log(host: str) -> None:
    with Watched(host) as end:
        flapping = iter(["link set ttun0 down", "link set ttun0 up"] * 10)
        with flood(host, flapping):
            time.sleep(5)
        end.ip("link", "set", "ttun0", "up")
        end.misses(ADDRESS6)
        assert 2 <= len(end.lines) <= 2 + device_watch.LINES, end.lines


def test_large_tables_do_not_hold_it_up(host: str) -> None:
    """They are read in parts, less often the longer that takes."""
    with Watched(host, ROUTE4) as end:
        routes = "".join(f"route add 10.{n >> 8}.{n & 255}.0/24 dev ttun0\n" for n in range(20000))
        subprocess.run(
            ["ip", "-n", host, "-batch", "-"], input=routes, text=True, check=True, timeout=60
        )
        time.sleep(1)
        before, began = end.cpu, time.monotonic()
        with flood(
            host, iter([f"route {x} {ROUTE4} dev vserver metric 7" for x in ("add", "del")])
        ):
            time.sleep(5)
        used = (end.cpu - before) / (time.monotonic() - began)
        print(f"{100 * used:.1f} % of a core, {1000 * end.longest:.1f} ms at most")
        assert used < 0.5, "0.05 are usual"
        assert end.longest < 0.5, "0.05 s are usual"
        end.ip("route", "del", ROUTE4, "dev", "ttun0")
        end.misses(MISSING4, seconds=20)


WITHOUT = """
import logging, os, resource, socket, sys, time
from ttun.watch import device_watch
from ttun.device import Device
from ttun.settings import SERVER
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
device = Device(SERVER, 1280)
limits = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (os.dup(0), limits[1]))
watch = device_watch.DeviceWatch(device)
assert watch.fileno() == -1 and watch.missing == [], watch.missing
now = time.monotonic()
for more in range(600):
    watch.look(now + 0.1 * more)
assert watch.fileno() == -1
resource.setrlimit(resource.RLIMIT_NOFILE, limits)
os.system("ip link set ttun0 mtu 1400")
watch.look(watch.due)
assert watch.fileno() >= 0 and watch.missing == ["MTU is 1400, not 1280"], watch.missing
resource.setrlimit(resource.RLIMIT_NOFILE, (os.dup(0), limits[1]))
another = device_watch.DeviceWatch(device)
resource.setrlimit(resource.RLIMIT_NOFILE, limits)
os.system("ip link delete ttun0")
another.look(time.monotonic())
assert another.device_gone
"""


def test_without_a_descriptor_it_says_so_once_and_tries_again(host: str) -> None:
    done = subprocess.run(
        ["ip", "netns", "exec", host, *netns.python("ttun")[:1], "-c", WITHOUT],
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **netns.environment()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if "netlink" in line]
    assert said == ["cannot monitor ttun0: netlink: Too many open files"] * 2
