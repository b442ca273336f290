"""The whole default route on machines that are not as usual: policies of others, one family alone,
a prepared device, no name server, a daemon that asks name servers for the C library."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kept import is_gone, keeper_of, paths
from machine import IS_NOBODY_HERE, cpu
from name_server import NAME_SERVER
from outside import (
    DEFAULT,
    FAR,
    INTERNET6,
    Capture,
    connected,
    hosts,
    leaves_by,
    others_sending,
    reaches,
)
from tunnel import CLIENT, Bench, End, Program, eventually

from ttun.commands import runtime
from ttun.flag import Flag
from ttun.lab import netns
from ttun.network import default_route, name_servers, resolver
from ttun.network.resolver import Resolver
from ttun.process.signals import ENDING

pytestmark = pytest.mark.skipif(not IS_NOBODY_HERE, reason="no other user in this user namespace")
on_hosts = pytest.mark.hosts
NOT_THROUGH = ": another rule or route comes first"


def ip(far: Bench, *lines: str) -> str:
    return "".join(netns.ip("-n", far.pair.names[CLIENT], *line.split()) for line in lines)


# ---- rules of others ----


@on_hosts
def test_rules_of_others_are_left_alone(far: Bench) -> None:
    """Of the same priorities, and of our number at another one."""
    theirs = [
        "rule add pref 20203 from 198.51.100.77 lookup 100",
        "rule add pref 20204 uidrange 7-7 lookup 100",
        "rule add pref 20205 from 198.51.100.78 lookup 203",
        "rule add pref 20206 from 198.51.100.79 lookup 100 protocol 203",
    ]
    ip(far, *theirs)
    before = hosts(far).rules()
    assert len(before) == 4
    far.server()
    client = far.client(*DEFAULT, to=FAR)
    connected(far, client)
    assert set(before) < set(hosts(far).rules())
    assert NOT_THROUGH not in client.log()
    assert client.stop() == 0
    assert hosts(far).rules() == before


@on_hosts
@pytest.mark.parametrize("what", ["rule", "route"])
def test_what_sends_packets_outside_all_the_same_is_named(far: Bench, what: str) -> None:
    lines = {
        "rule": ["rule add pref 10000 lookup 100", "route add default via 192.0.2.1 table 100"],
        "route": ["route add 128.0.0.0/1 via 192.0.2.1"],
    }
    ip(far, *lines[what])
    far.server()
    client = far.client(*DEFAULT, to=FAR)
    client.says("authenticated")
    said = [line for line in client.log().splitlines() if NOT_THROUGH in line]
    assert len(said) == 1, "IPv6 goes through it"
    assert "IPv4 packets leave through vclient" in said[0]
    command = said[0].rpartition("; ip ")[2].rstrip(")")
    assert "dev vclient" in ip(far, command)


def with_rules(far: Bench) -> tuple[End, list[str]]:
    """A connected client, and its rules."""
    far.server()
    client = far.client(*DEFAULT, to=FAR)
    connected(far, client)
    return client, sorted(hosts(far).rules())


@on_hosts
def test_rules_that_another_program_removed_are_restored(far: Bench) -> None:
    """As netifd and systemd-networkd remove them when they start."""
    client, before = with_rules(far)
    assert leaves_by(far, 0) == "ttun0"
    ip(far, "-4 rule flush protocol 203", "-6 rule flush protocol 203")
    eventually(lambda: sorted(hosts(far).rules()) == before, "they are back")
    assert leaves_by(far, 0) == "ttun0"
    said = client.says("restored rules that another program removed: IPv4 pref 20203 lookup main")
    assert said.count("IPv") == 6
    eventually(lambda: client.status()["missing"] == [], "nothing is missing")
    ip(far, "rule del pref 20204")  # one alone, and soon after
    eventually(lambda: sorted(hosts(far).rules()) == before, "it is back")
    assert "ttun0 changed" not in client.log()
    assert client.stop() == 0
    assert hosts(far).rules() == []


@on_hosts
def test_rules_are_restored_whatever_the_program_waits_for(far: Bench) -> None:
    """It may look up a name, or dial, for seconds. Here it is stopped."""
    client, before = with_rules(far)
    client.process.send_signal(signal.SIGSTOP)
    ip(far, "-4 rule flush protocol 203", "-6 rule flush protocol 203")
    eventually(lambda: sorted(hosts(far).rules()) == before, "they are back", 3)
    client.process.send_signal(signal.SIGCONT)
    assert client.stop() == 0
    assert hosts(far).rules() == []


@on_hosts
def test_a_program_that_removes_our_rules_all_the_time_costs_little(far: Bench) -> None:
    """The keeper is told of it thousands of times a second."""
    client, before = with_rules(far)
    pid = keeper_of(client.process.pid)
    batch = far.directory / "batch"
    batch.write_text("rule add pref 99 lookup 99\nrule del pref 99\n" * 20_000)
    used, began = cpu(pid), time.monotonic()
    ip(far, f"-force -batch {batch}")
    ip(far, "-4 rule flush protocol 203")
    took = time.monotonic() - began
    eventually(lambda: sorted(hosts(far).rules()) == before, "they are back")
    assert cpu(pid) - used < 0.1 + took / 4


@on_hosts
def test_rules_that_nobody_can_restore_are_named_with_the_remedy(far: Bench) -> None:
    """The keeper was killed. Packets of others go outside from then on."""
    far.server()
    client = far.client(*DEFAULT, to=FAR)
    connected(far, client)
    before = hosts(far).rules()
    os.kill(keeper_of(client.process.pid), signal.SIGKILL)
    ip(far, "-4 rule flush protocol 203", "-6 rule flush protocol 203")
    assert hosts(far).rules() == [] and leaves_by(far, 0) == "vclient"
    said = client.says("IPv6 rule 20203 lookup main missing", seconds=10)
    assert "ttun0 changed: IPv4 rule 20203 lookup main missing, IPv4 rule 20204 uidrange " in said
    assert len(client.status()["missing"]) == 6
    commands = said.rpartition("(to restore: ")[2].partition("; or restart ttun)")[0].split("; ")
    assert len(commands) == 6
    ip(far, *(command.partition("sudo ip ")[2] for command in commands))
    client.says("complete again")
    assert sorted(hosts(far).rules()) == sorted(before) and leaves_by(far, 0) == "ttun0"
    ip(far, "rule del pref 20204")  # one alone
    eventually(lambda: len(client.status()["missing"]) == 1, "it is named")
    assert client.stop() == 0


@on_hosts
@pytest.mark.parametrize(
    ("users", "ranges"),
    [
        ([0, 2**32 - 2], [(1, 2**32 - 3)]),
        ([2**32 - 2], [(0, 2**32 - 3)]),
        ([0], [(1, 2**32 - 2)]),
        ([1, 0, 1, 2], [(3, 2**32 - 2)]),
    ],
)
def test_users_at_either_end_of_the_range_stay_outside(
    far: Bench, users: list[int], ranges: list[tuple[int, int]]
) -> None:
    index = far.on(CLIENT, lambda: socket.if_nametoindex("vclient"))
    far.on(CLIENT, lambda: default_route.add(index, True, users))
    shown = [line for line in hosts(far).rules() if "uidrange" in line]
    assert len(shown) == 2 * len(ranges)
    for first, last in ranges:
        assert sum(f"uidrange {first}-{last} " in line for line in shown) == 2
    far.on(CLIENT, lambda: default_route.remove(index))
    assert hosts(far).rules() == []
    for family in ("-4", "-6"):
        assert ip(far, f"{family} route show table all").count("table 203") == 0


@on_hosts
def test_an_outer_network_of_ipv6_alone(far: Bench) -> None:
    """What others send over IPv4 gets an address of the tunnel's and goes through it."""
    far.server()
    with Capture(far) as capture, others_sending(far):
        ip(far, "-4 address flush dev vclient")
        client = far.client(*DEFAULT, to=f"[{INTERNET6}]:20203")
        client.says("capabilities")
        begin = time.monotonic()
        connected(far, client)
        time.sleep(1)
        left = [each for each in capture.leaked(begin) if each.port != 20203]
        assert left == []
        assert client.stop() == 0


@on_hosts
def test_who_called_sudo_is_told_that_its_packets_stay_outside_and_what_to_do(far: Bench) -> None:
    """--via runs as that user, whatever users there are. Without sudo it does not."""
    options = ("client", "-k", "secret", *DEFAULT, "--via", "sleep 600", "-v")
    for environment, times in (({"SUDO_UID": "4242"}, 1), ({}, 0)):
        client = far.start(CLIENT, *options, environment=environment)
        client.says("connecting to command")
        said = [line for line in client.log().splitlines() if "stay outside" in line]
        assert len(said) == times and all("user 4242" in line for line in said)
        assert "start ttun as root without sudo" in client.log() or not times
        assert "useradd" not in client.log()
        assert ("uidrange 4243-" not in "".join(hosts(far).rules())) == (times == 0)
        assert client.stop() == 0


SLOW = """if True:
    import sys, time
    from ttun.process.signals import end_while_loading
    end_while_loading()
    from ttun import cli, endpoint
    real = endpoint.DeviceWatch
    endpoint.DeviceWatch = lambda *given: time.sleep(2) or real(*given)
    sys.exit(cli.main())
"""


def starting_slowly(far: Bench, *options: str) -> Program:
    """A client that has made its rules, and is not ready."""
    log = far.directory / "slow.log"
    arguments = ["client", "-k", "secret", "-s", FAR, *DEFAULT, *options]
    with log.open("w") as file:
        process = far.pair.start(
            CLIENT, [sys.executable, "-c", SLOW, *arguments], stderr=file, environment=paths()
        )
    client = Program(process, log)
    client.says("default route: ")
    assert hosts(far).rules() != []
    return client


@on_hosts
@pytest.mark.parametrize("number", ENDING)
def test_a_signal_while_it_starts_leaves_no_rule(far: Bench, number: signal.Signals) -> None:
    """Between the rules and the moment when signals stop it in order, which is short."""
    client = starting_slowly(far)
    client.process.send_signal(number)
    assert client.ended() == 0
    assert hosts(far).rules() == []
    assert f"{number.name}: stopping" in client.log()


# ---- a prepared device ----


@on_hosts
def test_kill_9_while_it_starts_leaves_no_rule_either(far: Bench) -> None:
    """A prepared device keeps its route, and with the rules no packet would leave."""
    ip(far, "tuntap add dev tun5 mode tun")
    try:
        starting_slowly(far, "--dev", "tun5").kill()
        eventually(lambda: hosts(far).rules() == [], "they are removed")
        assert "203" not in ip(far, "-4 route show table all dev tun5")
        assert not [*runtime.SYSTEM.rglob("tun5.*")]
    finally:
        ip(far, "link delete tun5")


@on_hosts
def test_a_prepared_device_has_the_default_route_again_after_each_end(
    far: Bench, said: Path
) -> None:
    """It keeps its routes. And the keeper of a killed program does not take the rules of the next
    one away."""
    ip(far, "tuntap add dev tun5 mode tun")
    try:
        far.server("--takeover")

        def start() -> End:
            down = ("--hook-user", "root", "--down", f"echo down >> {said}")
            return far.client(*DEFAULT, *down, "--dev", "tun5", to=FAR)

        client = start()
        connected(far, client)
        rules = hosts(far).rules()
        assert len(rules) == 6
        assert client.stop() == 0
        assert hosts(far).rules() == []
        assert "203" not in ip(far, "-4 route show table all dev tun5")

        client = start()
        connected(far, client)
        pid = keeper_of(client.process.pid)
        said.unlink()
        os.kill(pid, signal.SIGSTOP)
        client.kill()
        client = start()  # before the keeper of the one before runs --down
        client.says("waiting for the keeper process")
        os.kill(pid, signal.SIGCONT)
        connected(far, client)
        assert said.read_text() == "down\n"
        assert is_gone(pid)
        assert hosts(far).rules() == rules

        os.kill(keeper_of(client.process.pid), signal.SIGKILL)
        client.kill()
        assert hosts(far).rules() == rules, "nobody removed them"
        client = start()
        connected(far, client)
        assert hosts(far).rules() == rules
        assert client.stop() == 0
    finally:
        far.close()
        ip(far, "link delete tun5")


@on_hosts
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_rules_that_a_dead_keeper_leaves_are_named_and_harmless(far: Bench, number: int) -> None:
    """Killed, or stopped until after the end: then it removes them late."""
    far.server("--takeover")
    client = far.client(*DEFAULT, to=FAR)
    connected(far, client)
    rules = hosts(far).rules()
    pid = keeper_of(client.process.pid)
    os.kill(pid, number)
    client.process.terminate()
    assert client.ended(45) == 0
    says = (
        "ended: killed by signal 9 (its rules" if number == signal.SIGKILL else "did not end within"
    )
    assert f"the keeper process {says}" in client.log()
    assert hosts(far).rules() == rules
    assert reaches(far), "the machine has its network"
    if number == signal.SIGSTOP:
        os.kill(pid, signal.SIGCONT)
        eventually(lambda: hosts(far).rules() == [], "it has removed them")
        return
    client = far.client(*DEFAULT, to=FAR)
    connected(far, client)
    assert hosts(far).rules() == rules
    assert client.stop() == 0
    assert hosts(far).rules() == []


# ---- names ----


@pytest.mark.parametrize("what", ["empty", "comment", "dangling", "missing", "directory"])
def test_what_names_no_server_stands_for_the_one_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    path = tmp_path / "resolv.conf"
    if what == "dangling":
        path.symlink_to("../run/systemd/resolve/stub-resolv.conf")
    elif what == "directory":
        path.mkdir()
    elif what != "missing":
        path.write_text({"empty": "", "comment": "# nameserver 192.0.2.1\nsearch a\n"}[what])
    monkeypatch.setattr(name_servers, "RESOLV_CONF", path)
    monkeypatch.setattr(name_servers, "UPSTREAM", (tmp_path / "none",))
    assert name_servers.local() == "127.0.0.1"
    assert not name_servers.are_outside()


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    """The C library has a daemon ask, which fails; what is then asked directly."""
    asked: list[list[str]] = []

    def getaddrinfo(host: str, port: int, flags: int) -> list[resolver.Target]:
        raise socket.gaierror(socket.EAI_AGAIN, "later")

    def look_up(name: str, servers: list[str]) -> list[str]:
        asked.append(servers)
        return ["192.0.2.9"] if name == "known" else []

    monkeypatch.setattr(resolver, "_getaddrinfo", getaddrinfo)
    monkeypatch.setattr(resolver, "numeric", lambda host, port, _=0: host[:1] == "1" and [host])
    monkeypatch.setattr(name_servers, "look_up", look_up)
    monkeypatch.setattr(name_servers, "in_use", lambda: iter([NAME_SERVER]))
    monkeypatch.setattr(name_servers, "local", lambda: None)
    yield asked


def test_when_the_c_library_fails_its_servers_are_asked_directly(
    broken: list[list[str]],
) -> None:
    assert Resolver("known", 1).targets(Flag(), outside=True) == ["192.0.2.9"]
    assert broken == [[NAME_SERVER]]
    with pytest.raises(OSError, match="temporary failure"):
        Resolver("unknown", 1).targets(Flag(), outside=True)
    with pytest.raises(OSError, match="temporary failure"):
        Resolver("known", 1).targets(Flag())
    assert len(broken) == 2
