"""A connection whose local address is removed is detected as dead, without false positives. System
suspends are detected.

Tests DeviceWatch alone; test_local_address.py tests complete endpoints.
"""

from __future__ import annotations

import errno
import itertools
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tunnel import CLIENT, ROOT, SERVER, SERVER_ADDRESS, Bench, eventually
from watched import Watched

from ttun import tcp
from ttun.address import Address
from ttun.lab import netns
from ttun.watch import roaming

pytestmark = pytest.mark.hosts

PORT = 9999
OURS4, OURS6 = "192.0.2.77", "2001:db8::77"  # of the client's host, besides the usual ones
SERVER6 = netns.IPV6[SERVER]
OTHER = "198.51.100.2"  # on another link of the client's host, with a way to everywhere


@contextmanager
def connection(
    bench: Bench, target: str, source: str, family: int = socket.AF_INET, proto: int = 0
) -> Iterator[socket.socket]:
    """A connection from the client's host to the server's, or to itself."""
    listener = bench.on(
        CLIENT if source.startswith("127.") else SERVER,
        lambda: tcp.listen(Address("", PORT), None),
    )

    def dial() -> socket.socket:
        sock = socket.socket(family, socket.SOCK_STREAM, proto)
        sock.bind((source, 0))
        sock.settimeout(10)
        sock.connect((target, PORT))
        return sock

    with listener, bench.on(CLIENT, dial) as sock:
        listener.setblocking(True)
        with listener.accept()[0]:
            yield sock


@pytest.fixture
def end(plain: Bench) -> Iterator[Watched]:
    """A device on the client's host, which has two additional addresses."""
    name = plain.pair.names[CLIENT]
    given = [f"{OURS4}/24", f"{OURS6}/64"]
    for address in given:
        netns.ip("-n", name, "address", "add", address, "dev", "vclient", "nodad")
    try:
        with Watched(name) as watched:
            yield watched
    finally:
        for address in given:
            netns.ip("-n", name, "address", "replace", address, "dev", "vclient", "nodad")
            netns.ip("-n", name, "address", "del", address, "dev", "vclient")
        netns.ip("-n", name, "address", "replace", "2001:db8::2/64", "dev", "vclient", "nodad")


@contextmanager
def another_way(end: Watched) -> Iterator[None]:
    """A second link, with the default route."""
    end.shell(
        f"ip link add wa type veth peer name wb && ip address add {OTHER}/24 dev wa &&"
        "ip link set wb up && ip link set wa up && ip route add default via 198.51.100.1"
    )
    try:
        yield
    finally:
        end.ip("link", "delete", "wa")


def watch(end: Watched, sock: socket.socket) -> None:
    end.call(lambda: end.watch.watch_connection(sock))
    time.sleep(0.7)  # it knows where the address is, and may read again
    assert end.watch.lost_local is None


def goes(end: Watched, why: str) -> None:
    """Wait until the connection is detected as dead; usually 0.7 s."""
    started = time.monotonic()
    assert eventually(lambda: end.watch.lost_local, why, 7) == why
    print(f"{time.monotonic() - started:.2f} s")


def stays(end: Watched) -> None:
    time.sleep(1.5)
    assert end.watch.lost_local is None


def removed(address: str) -> str:
    return f"local address {address} was removed"


@pytest.mark.parametrize(
    ("target", "source", "family"),
    [
        (SERVER_ADDRESS, OURS4, socket.AF_INET),
        (f"::ffff:{SERVER_ADDRESS}", f"::ffff:{OURS4}", socket.AF_INET6),
        (SERVER6, OURS6, socket.AF_INET6),
    ],
    ids=["ipv4", "ipv4-in-ipv6", "ipv6"],
)
def test_an_address_that_is_removed_ends_its_connection(
    plain: Bench, end: Watched, target: str, source: str, family: int
) -> None:
    address = source.removeprefix("::ffff:")
    with connection(plain, target, source, family) as sock:
        watch(end, sock)
        # Not that of another one, nor one that has expired but was not removed.
        end.shell(
            "ip address add 192.0.2.78/24 dev vclient && ip address del 192.0.2.78/24 dev vclient"
        )
        if ":" in address:
            end.shell(f"ip address change {address}/64 dev vclient preferred_lft 0 nodad")
        stays(end)
        end.ip("address", "del", f"{address}/{64 if ':' in address else 24}", "dev", "vclient")
        goes(end, removed(address))
    # The next connection begins anew, if there is one.
    with connection(plain, SERVER_ADDRESS, "0.0.0.0") as sock:
        watch(end, sock)
        stays(end)
    end.call(lambda: end.watch.watch_connection(None))
    stays(end)


def test_an_address_that_leaves_before_it_was_looked_at_is_missed_too(
    plain: Bench, end: Watched
) -> None:
    with connection(plain, SERVER_ADDRESS, OURS4) as sock:
        end.ip("address", "del", f"{OURS4}/24", "dev", "vclient")
        end.call(lambda: end.watch.watch_connection(sock))
        goes(end, removed(OURS4))


def test_an_address_that_is_given_back_at_once_ends_nothing(plain: Bench, end: Watched) -> None:
    """As a DHCP client may do; nor one that moved to another link."""
    with connection(plain, SERVER_ADDRESS, OURS4) as sock:
        watch(end, sock)
        for _ in range(3):
            end.shell(
                f"ip address del {OURS4}/24 dev vclient && ip address add {OURS4}/24 dev vclient"
            )
            stays(end)
        end.shell(f"ip address add {OURS4}/32 dev lo && ip address del {OURS4}/24 dev vclient")
        stays(end)
        end.ip("address", "del", f"{OURS4}/32", "dev", "lo")
        goes(end, removed(OURS4))


def test_a_link_that_is_down_is_waited_for_unless_there_is_another_way(
    plain: Bench, end: Watched
) -> None:
    with connection(plain, SERVER_ADDRESS, OURS4) as sock:
        watch(end, sock)
        with plain.link_down(CLIENT):
            stays(end)
        stays(end)
        sock.sendall(b"x")
        with plain.link_down(CLIENT):
            stays(end)
            with another_way(end):
                goes(end, f"the link of local address {OURS4} is down")


def test_the_other_way_is_seen_where_binding_takes_a_capability(
    plain: Bench, end: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As before Linux 5.7, also to bind to no device."""

    class Old(socket.socket):
        def setsockopt(self, level: int, option: int, *value: Any) -> None:
            if (level, option) == (socket.SOL_SOCKET, socket.SO_BINDTODEVICE):
                raise PermissionError(errno.EPERM, "Operation not permitted")
            super().setsockopt(level, option, *value)

    with connection(plain, SERVER_ADDRESS, OURS4) as sock:
        watch(end, sock)
        monkeypatch.setattr(socket, "socket", Old)
        with plain.link_down(CLIENT), another_way(end):
            goes(end, f"the link of local address {OURS4} is down")


def test_another_way_to_the_peer_is_seen_and_one_from_the_same_address_is_none(
    plain: Bench, end: Watched
) -> None:
    with connection(plain, SERVER_ADDRESS, netns.IPV4[CLIENT]) as sock:
        way = plain.on(CLIENT, lambda: roaming.SourceAddress(sock))
        times = itertools.count(time.monotonic() + 2, 2)

        def changed() -> bool:
            return plain.on(CLIENT, lambda: way.has_changed(next(times)))

        end.ip("route", "add", SERVER_ADDRESS, "dev", "vclient")
        assert not changed()
        with another_way(end):
            assert not changed(), "the peer has a longer route"
            end.ip("route", "replace", SERVER_ADDRESS, "via", "198.51.100.1")
            assert changed()
            assert not changed()
            end.ip("route", "replace", "unreachable", SERVER_ADDRESS)
            assert not changed(), "a link may be down for a while"
            end.ip("route", "del", SERVER_ADDRESS)
            assert changed()
            end.ip("route", "add", SERVER_ADDRESS, "via", "198.51.100.1")
            assert not plain.on(CLIENT, lambda: way.has_changed(0.0)), "it looked a moment ago"


def test_a_way_that_was_not_known_at_first_has_not_changed(plain: Bench, end: Watched) -> None:
    """As where a descriptor was lacking."""
    with connection(plain, SERVER_ADDRESS, netns.IPV4[CLIENT]) as sock:
        end.ip("route", "add", "unreachable", SERVER_ADDRESS)
        way = plain.on(CLIENT, lambda: roaming.SourceAddress(sock))
        end.ip("route", "del", "unreachable", SERVER_ADDRESS)
        assert not plain.on(CLIENT, lambda: way.has_changed(time.monotonic() + 2))


def test_no_other_way_is_looked_for_where_the_connection_is_not_over_ip(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        monkeypatch.setattr(socket, "socket", None)
        assert roaming.source_address(ours) == set()


def test_a_link_that_was_never_up_is_not_missed(plain: Bench, end: Watched) -> None:
    """The kernel takes packets to all of its addresses, through whatever link they come."""
    address, there = "203.0.113.9", ["-n", plain.pair.names[SERVER], "route"]
    end.shell(f"ip link add wa type veth peer name wb && ip address add {address}/32 dev wa")
    netns.ip(*there, "add", address, "via", netns.IPV4[CLIENT])
    try:
        with connection(plain, SERVER_ADDRESS, address) as sock:
            watch(end, sock)
            stays(end)
            end.ip("address", "del", f"{address}/32", "dev", "wa")
            goes(end, removed(address))
    finally:
        netns.ip(*there, "del", address)
        end.ip("link", "delete", "wa")


def test_a_connection_that_is_bound_to_a_link_has_no_other_way(plain: Bench, end: Watched) -> None:
    with connection(plain, SERVER_ADDRESS, OURS4) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"vclient")
        watch(end, sock)
        with plain.link_down(CLIENT), another_way(end):
            stays(end)
        stays(end)


def test_a_link_that_is_gone_ends_its_connection(plain: Bench, end: Watched) -> None:
    back = ["route", "add", "198.51.100.0/24", "via", netns.IPV4[CLIENT]]
    netns.ip("-n", plain.pair.names[SERVER], *back)
    with another_way(end), connection(plain, SERVER_ADDRESS, OTHER) as sock:
        watch(end, sock)
        end.ip("link", "delete", "wa")
        goes(end, removed(OTHER))
        end.shell("ip link add wa type veth peer name wb")  # another_way() removes it
    netns.ip("-n", plain.pair.names[SERVER], "route", "del", "198.51.100.0/24")


def test_an_address_that_the_tunnel_has_too_is_missed_on_its_link(
    plain: Bench, end: Watched
) -> None:
    """As where a hotel's network is the tunnel's: no connection comes through its own tunnel."""
    address, there = "10.1.1.1", ["-n", plain.pair.names[SERVER], "route"]
    end.ip("address", "add", f"{address}/24", "dev", "vclient")
    netns.ip(*there, "add", address, "via", netns.IPV4[CLIENT])
    try:
        with connection(plain, SERVER_ADDRESS, address) as sock:
            watch(end, sock)
            end.ip("address", "del", f"{address}/24", "dev", "vclient")
            goes(end, removed(address))
    finally:
        netns.ip(*there, "del", address)


def test_an_address_that_was_never_on_a_link_is_not_missed(plain: Bench, end: Watched) -> None:
    with connection(plain, "127.0.0.1", "127.0.0.2") as sock:
        watch(end, sock)
        end.ip("address", "del", f"{OURS4}/24", "dev", "vclient")
        stays(end)


def test_a_socket_of_another_network_namespace_is_not_judged_by_the_addresses_here(
    plain: Bench, end: Watched
) -> None:
    """As a program, or systemd with NetworkNamespacePath=, may give one."""
    listener = plain.on(SERVER, lambda: tcp.listen(Address("", PORT), None))
    with listener, plain.on(CLIENT, lambda: socket.create_connection((SERVER_ADDRESS, PORT), 10)):
        listener.setblocking(True)
        with listener.accept()[0] as sock:
            watch(end, sock)
            stays(end)


def test_a_socket_that_is_no_connection_over_ip_has_no_address() -> None:
    for pair in (socket.socketpair(), [socket.socket(), socket.socket()]):
        for sock in pair:
            if sock.family == socket.AF_UNIX:
                assert roaming.local_addresses(sock) == set()
            sock.close()
            assert roaming.local_addresses(sock) == set()


@pytest.mark.skipif(
    not os.path.exists("/proc/sys/net/mptcp"), reason="no Multipath TCP in this kernel"
)
def test_multipath_tcp_lives_while_one_of_its_paths_does(plain: Bench) -> None:
    names = plain.pair.names
    netns.ip("link", "add", "ws", "netns", names[SERVER], "type", "veth",
             "peer", "name", "wc", "netns", names[CLIENT])  # fmt: skip
    addresses = {SERVER: "198.51.100.1", CLIENT: "198.51.100.2"}
    try:
        for host, device in ((SERVER, "ws"), (CLIENT, "wc")):
            name = names[host]
            netns.ip("-n", name, "address", "add", f"{addresses[host]}/24", "dev", device)
            netns.ip("-n", name, "link", "set", device, "up")
            netns.ip("-n", name, "mptcp", "limits", "set", "subflow", "2", "add_addr_accepted", "2")
        netns.ip("-n", names[SERVER], "mptcp", "endpoint", "add", addresses[SERVER], "signal")
        netns.ip("-n", names[CLIENT], "address", "add", f"{OURS4}/24", "dev", "vclient")
        with (
            Watched(names[CLIENT]) as end,
            connection(plain, SERVER_ADDRESS, OURS4, proto=tcp.IPPROTO_MPTCP) as sock,
        ):
            assert tcp.is_multipath(sock)
            expected = {socket.inet_aton(OURS4), socket.inet_aton(addresses[CLIENT])}
            eventually(lambda: roaming.local_addresses(sock) == expected, "there are two paths")
            watch(end, sock)
            end.ip("address", "del", f"{OURS4}/24", "dev", "vclient")
            stays(end)
            end.ip("address", "del", f"{addresses[CLIENT]}/24", "dev", "wc")
            goes(
                end,
                f"local addresses {OURS4} and {addresses[CLIENT]} were removed",
            )
    finally:
        for host in (SERVER, CLIENT):
            netns.ip("-n", names[host], "mptcp", "endpoint", "flush")
        netns.ip("-n", names[SERVER], "link", "delete", "ws")


SLEEPS = """
import mmap, struct, sys
from ttun.watch import roaming
file = open(sys.argv[1], "r+b")
clock = mmap.mmap(file.fileno(), 16)
def look(set_ahead, slept):
    clock[:] = struct.pack("=qq", set_ahead, slept)
    sleep.look()
    return round(sleep.seconds)
sleep = roaming.Sleep()
print(look(0, 0), look(0, 1), look(10**8, 2), look(0, 62), look(0, 62), look(-10**6, 400))
sleep.seconds = 0.0
print(look(0, 400), look(0, 402), look(0, 407))
"""


def test_a_machine_that_slept_is_noticed_and_one_whose_clock_was_set_is_not(
    tmp_path: Path,
) -> None:
    library, clock = tmp_path / "clock.so", tmp_path / "clock"
    source = ROOT / "tests/helpers/clock.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-O2", source, "-o", library], check=True)
    clock.write_bytes(bytes(16))
    environment = netns.environment(LD_PRELOAD=str(library), TTUN_TEST_CLOCK=str(clock))
    done = subprocess.run(
        [*netns.python("ttun")[:1], "-c", SLEEPS, clock],
        env={**os.environ, **environment}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["0 0 0 60 60 398", "0 0 5"]
