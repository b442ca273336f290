"""Name resolution: without blocking, before routes can capture the query, and with the last result
when it fails."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
from machine import names
from name_server import NAME_SERVER, NameServer, resolv_conf
from tunnel import CLIENT, SERVER, SERVER_ADDRESS, Bench, children, eventually

import ttun
from ttun import transport
from ttun.errors import TtunError
from ttun.flag import Flag
from ttun.network import resolver
from ttun.network.resolver import Resolver

FULL = ["--route", "0.0.0.0/1", "--route", "128.0.0.0/1"]
NAME = "vpn.example"


@pytest.fixture
def name_server(plain: Bench, tmp_path: Path) -> Iterator[NameServer]:
    plain.run(SERVER, "ip", "address", "add", f"{NAME_SERVER}/32", "dev", "lo")
    plain.run(CLIENT, "ip", "route", "add", "default", "via", SERVER_ADDRESS)
    made = NameServer(plain)
    try:
        with resolv_conf(tmp_path, NAME_SERVER):
            yield made
    finally:
        made.close()
        plain.run(CLIENT, "ip", "route", "delete", "default")
        plain.run(SERVER, "ip", "address", "delete", f"{NAME_SERVER}/32", "dev", "lo")


@pytest.mark.hosts
def test_a_full_tunnel_to_a_name_connects_and_comes_back(
    plain: Bench, name_server: NameServer
) -> None:
    """Its routes send the query into a tunnel that is down."""
    server = plain.server()
    client = plain.client(*FULL, to=NAME)
    client.says("authenticated")
    plain.answers()
    server.stop()
    plain.server()
    client.says("authenticated", times=2, seconds=60)
    assert "using its last addresses" in client.log()
    plain.answers()


@pytest.mark.hosts
def test_while_a_name_does_not_resolve_there_is_no_device(
    plain: Bench, name_server: NameServer
) -> None:
    name_server.address = None
    plain.server()
    client = plain.client(*FULL, to=NAME)
    client.says(f"cannot resolve {NAME}", times=2, seconds=30)
    assert plain.devices(CLIENT) == []
    name_server.address = SERVER_ADDRESS
    client.says("authenticated", seconds=30)
    plain.answers()


@pytest.mark.hosts
@pytest.mark.parametrize("end", ["client", "server"])
def test_an_end_whose_resolver_hangs_can_be_stopped(
    plain: Bench, name_server: NameServer, end: str
) -> None:
    name_server.silent = True
    (plain.directory / "resolv.conf").write_text(
        f"nameserver {NAME_SERVER}\noptions timeout:30 attempts:5\n"
    )
    if end == "client":
        program = plain.client(*FULL, to=NAME)
    else:
        plain.run(SERVER, "ip", "route", "add", "default", "dev", "lo")
        program = plain.start(SERVER, "server", "-k", "secret", "-l", f"{NAME}:20203")
    try:
        eventually(lambda: name_server.asked, "it asks")
        asking = children(program.process.pid)
        started = time.monotonic()
        program.process.send_signal(signal.SIGTERM)
        assert program.ended(10) == 0
        print(f"ended after {time.monotonic() - started:.2f} s")
        assert "Traceback" not in program.log()
    finally:
        if end == "server":
            plain.run(SERVER, "ip", "route", "delete", "default")
    assert asking  # else the next line says nothing
    eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in asking), "it is gone too")


@pytest.mark.hosts
@pytest.mark.parametrize("route", [None, "203.0.113.0/29"])
def test_a_name_whose_resolver_hangs_does_not_keep_a_client_from_its_other_server(
    plain: Bench, name_server: NameServer, route: str | None
) -> None:
    """With a route it asks before it opens the device too."""
    name_server.silent = True
    (plain.directory / "resolv.conf").write_text(
        f"nameserver {NAME_SERVER}\noptions timeout:30 attempts:5\n"
    )
    plain.server()
    began = time.monotonic()
    client = plain.client("-s", SERVER_ADDRESS, *(["--route", route] if route else []), to=NAME)
    client.says("authenticated", seconds=40 if route is None else 85)
    print(f"connected after {time.monotonic() - began:.1f} s")
    assert name_server.asked
    assert f"cannot connect to {NAME}:20203: no answer from the resolver in 4 s" in client.log()


@pytest.mark.hosts
def test_a_route_that_catches_all_addresses_of_a_name_is_refused(
    plain: Bench, name_server: NameServer
) -> None:
    client = plain.client("--route", f"{SERVER_ADDRESS}/32", to=NAME)
    assert client.ended() == 2
    assert "would route the tunnel's own connection" in client.log().splitlines()[-1]


@pytest.mark.hosts
def test_of_a_names_addresses_the_one_that_a_route_catches_is_not_dialled(
    plain: Bench, tmp_path: Path
) -> None:
    """Its own connection would go into the tunnel."""
    with names(tmp_path, two=["192.0.2.3", SERVER_ADDRESS]):
        client = plain.client("--route", "192.0.2.3/32", to="two")
        failed = client.says("cannot connect to two:20203: ")
        assert "--route 192.0.2.3/32 would route the tunnel's own connection to 192.0.2.3" in failed
        assert f"{SERVER_ADDRESS}:20203: Connection refused" in failed
        plain.server()
        client.says("authenticated")
        assert "192.0.2.3:20203" not in client.log()


@pytest.fixture
def stop() -> Flag:
    return Flag()


def test_a_look_up_without_threads_runs_in_a_child_that_is_gone_afterwards(stop: Flag) -> None:
    before = set(children(os.getpid()))  # of other tests
    found = resolver._in_a_child(partial(resolver._getaddrinfo, "localhost", 5, 0), stop, 60)
    assert found[0].sockaddr[:2] in (("127.0.0.1", 5), ("::1", 5))
    with pytest.raises(OSError, match=r"[Nn]ame|known"):
        resolver._in_a_child(partial(resolver._getaddrinfo, "nothing.invalid", 5, 0), stop, 60)
    assert set(children(os.getpid())) <= before  # zombies are among them


def test_there_is_one_look_up_at_a_time_however_long_it_hangs(
    monkeypatch: pytest.MonkeyPatch, stop: Flag
) -> None:
    """A client that keeps reconnecting must not leak a thread each time."""
    hangs, calls = threading.Event(), []

    def slow(*_: object, **__: object) -> list[object]:
        calls.append(1)
        hangs.wait(30)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.8", 1))]

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    monkeypatch.setattr(resolver, "PATIENCE", 0.3)
    asking = Resolver("slow.example", 1)
    for find in (asking.targets, asking.first) * 2:
        with pytest.raises(TimeoutError, match="no answer from the resolver"):
            find(stop, patience=0.2)  # type: ignore[operator]
    asking.known = [resolver.Target(socket.AF_INET, ("192.0.2.7", 1))]
    for _ in range(3):
        assert asking.targets(stop)[0].sockaddr == ("192.0.2.7", 1)
    assert len(calls) == 1
    hangs.set()
    assert asking.targets(stop)[0].sockaddr == ("192.0.2.8", 1)


@pytest.mark.parametrize(("count", "waits"), [(1, [60.0, 60.0, 60.0]), (2, [4.0, 8.0, 16.0])])
def test_before_there_are_routes_slow_names_get_more_time_with_each_round(
    count: int, waits: list[float]
) -> None:
    """There the next look-up begins anew: a name that takes longer would never be found."""
    given = []

    class Slow(transport.Dialer):
        name = "slow.example"

        def look_up(self, stop: Flag) -> Sequence[str]:
            given.append(self.name_patience)
            if len(given) == count * len(waits):
                raise InterruptedError
            raise OSError("no answer")

        candidates = kind = None  # type: ignore[assignment]

    routes = [ipaddress.ip_network("203.0.113.0/29")]
    client = ttun.Client(b"a key of the test", server=[Slow() for _ in range(count)], routes=routes)
    with pytest.raises(TtunError, match="stopped while opening"):
        client.open()
    assert given[::count] == waits


def test_a_number_is_looked_up_by_nobody(monkeypatch: pytest.MonkeyPatch, stop: Flag) -> None:
    monkeypatch.setattr(threading, "Thread", None)
    monkeypatch.setattr(os, "fork", None)
    for host in ("192.0.2.1", "2001:db8::1"):
        assert Resolver(host, 7).targets(stop)[0].sockaddr[:2] == (host, 7)
        assert resolver.look_up(host, 7, stop)[0].sockaddr[:2] == (host, 7)


def test_a_child_is_waited_for_by_whoever_wants_to(stop: Flag) -> None:
    """If SIGCHLD is ignored (inherited), the kernel does it."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        found = resolver._in_a_child(partial(resolver._getaddrinfo, "localhost", 5, 0), stop, 60)
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert found[0].sockaddr[:2] in (("127.0.0.1", 5), ("::1", 5))


def test_of_very_many_addresses_some_are_taken(monkeypatch: pytest.MonkeyPatch, stop: Flag) -> None:
    """4,000 fit into a DNS answer over TCP, but not into the pipe of the child."""

    def many(*_: object, **__: object) -> list[object]:
        address = ("2001:db8:1111:2222:3333:4444:5555:6666", 20203, 0, 0)
        return [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", address)] * 4000

    monkeypatch.setattr(socket, "getaddrinfo", many)
    assert (
        1
        < len(resolver._in_a_child(partial(resolver._getaddrinfo, "many.example", 1, 0), stop, 60))
        < 100
    )
    assert 1 < len(Resolver("many.example", 1).targets(stop)) < 100
