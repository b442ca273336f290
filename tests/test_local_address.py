"""Complete endpoints: a local address that is removed, a machine that sleeps."""

from __future__ import annotations

import contextlib
import re
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from tunnel import (
    CLIENT,
    OTHER,
    ROOT,
    SERVER,
    Bench,
    eventually,
)

from ttun.lab import netns

pytestmark = pytest.mark.hosts

OURS = "192.0.2.77"  # the client's local address, until it is removed


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


@contextmanager
def route_that_moves(bench: Bench, *, reverse_path_filter: int) -> Iterator[None]:
    """Within it the client's route to the server leads over a second link between them."""
    link, there = "second", bench.pair.names[SERVER]
    bench.run(
        CLIENT, "ip", "link", "add", link, "type", "veth", "peer", "name", link, "netns", there
    )
    try:
        for host, address in ((SERVER, "198.51.100.1/24"), (CLIENT, "198.51.100.2/24")):
            bench.run(host, "ip", "address", "add", address, "dev", link)
            bench.run(host, "ip", "link", "set", link, "up")
        for which in ("all", link):  # the greater one counts
            setting = f"net.ipv4.conf.{which}.rp_filter={reverse_path_filter}"
            bench.run(SERVER, "sysctl", "-qw", setting)
        bench.run(CLIENT, "ip", "route", "add", "192.0.2.1", "via", "198.51.100.1")
        yield
    finally:
        bench.run(SERVER, "sysctl", "-qw", "net.ipv4.conf.all.rp_filter=0")
        bench.run(CLIENT, "ip", "link", "delete", link)


def test_a_client_whose_route_moves_dials_again_if_the_old_address_does_not_work_there(
    plain: Bench,
) -> None:
    """As where another provider drops it. Both links stay up, both addresses stay."""
    server, client = plain.server("--takeover"), plain.client()
    client.says("authenticated")
    plain.answers()
    with route_that_moves(plain, reverse_path_filter=1):
        moved = time.monotonic()
        client.says("since the route to the peer changed", seconds=12)
        server.says("peer 198.51.100.2:", seconds=5)
        plain.answers()
        print(f"{time.monotonic() - moved:.2f} s")
        assert "timed out" not in client.log()


def test_a_session_whose_route_moves_lives_on_if_the_old_address_works_there(plain: Bench) -> None:
    plain.server()
    client = plain.client()
    client.says("authenticated")
    with route_that_moves(plain, reverse_path_filter=0):
        plain.answers()
        time.sleep(9)
        plain.answers()
    plain.answers()
    time.sleep(9)
    assert client.log().count("authenticated") == 1


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
