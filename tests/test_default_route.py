"""The whole default route: what goes through the tunnel, what stays outside, and that no packet of
another program leaves outside from start to stop."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kept import NO_ROOT, paths, runs_for_all
from machine import IS_NOBODY_HERE
from name_server import NameServer, resolv_conf
from outside import (
    DEFAULT,
    EVERYWHERE,
    FAR,
    INTERNET,
    INTERNET6,
    LAN_ONLY,
    NAME,
    NAME_SERVER,
    OTHER_FAR,
    SECOND_LINK,
    TTUN_USER,
    Capture,
    connected,
    hosts,
    leaves_by,
    others,
    others_sending,
    reaches,
)
from tunnel import CLIENT, PROGRAM, SERVER, Bench, End, Program, eventually

from ttun.lab import netns
from ttun.lab.netns import LinkEnd
from ttun.network import default_route
from ttun.network.netlink import Message, Netlink, Request

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(not IS_NOBODY_HERE, reason="no other user in this user namespace"),
]
SLOW_DOWN = ("--down", "sleep 1")


def stopped(client: End) -> float:
    """Stop a client whose session ends then; when its command of --down was about to end."""
    asked = time.monotonic()
    assert client.stop() == 0
    took = time.monotonic() - asked
    assert took > 1
    return asked + 0.9


@pytest.mark.slow
def test_from_start_to_stop_only_the_tunnel_its_queries_and_the_lan_leave(
    far: Bench, tmp_path: Path
) -> None:
    """With another gateway, another address of the server, and 30 s without a link.

    Others send from the line of the log that names the default route until SIGTERM, and while
    --down runs; the capture is longer.
    """
    server = far.server()
    asked = NameServer(far)
    asked.address = FAR
    with contextlib.ExitStack() as stack:
        stack.enter_context(resolv_conf(tmp_path, NAME_SERVER))
        capture = stack.enter_context(Capture(far))
        senders = stack.enter_context(others(far))
        before = time.monotonic()
        client = far.client(*DEFAULT, "--down", "sleep 3", to=NAME)
        client.says("default route: ttun0 for all but the LAN and user")
        for each in senders:
            each.send_signal(signal.SIGUSR1)
        connected(far, client)
        queries = asked.asked

        second = LinkEnd(SERVER, "wserver", [f"{SECOND_LINK[SERVER]}/24"])
        far.pair.link(second, LinkEnd(CLIENT, "wclient", [f"{SECOND_LINK[CLIENT]}/24"]))
        hosts(far).set_gateway(SECOND_LINK[SERVER])
        netns.ip("-n", far.pair.names[CLIENT], "address", "del", "192.0.2.2/24", "dev", "vclient")
        connected(far, client, 2)
        assert "wclient" in {each.device for each in capture.sent if each.target == FAR}
        assert asked.asked > queries, "its queries go outside"

        server.stop()
        asked.address = OTHER_FAR
        server = far.server("-l", f"{OTHER_FAR}:20203")
        connected(far, client, 3)

        netns.ip("-n", far.pair.names[CLIENT], "link", "set", "wclient", "down")
        time.sleep(30)  # the session ends meanwhile
        netns.ip("-n", far.pair.names[CLIENT], "link", "set", "wclient", "up")
        hosts(far).set_gateway(SECOND_LINK[SERVER])
        eventually(lambda: reaches(far), "the Internet again", 60)

        server.stop()
        time.sleep(2)  # between two sessions
        server = far.server("-l", f"{OTHER_FAR}:20203")
        eventually(lambda: reaches(far), "the Internet again", 60)
        assert capture.others(before) == LAN_ONLY
        client.process.send_signal(signal.SIGTERM)
        time.sleep(0.9)
        assert client.process.poll() is None, "--down runs"
        for each in senders:
            each.kill()
        assert client.ended() == 0
        assert capture.leaked(before) == []
        with others_sending(far):
            now = time.monotonic()
            eventually(lambda: capture.others(now) >= EVERYWHERE - LAN_ONLY, "the network is back")
    asked.close()
    assert hosts(far).rules() == []


def test_after_kill_9_the_machine_has_its_network_and_the_next_start_cleans_up(far: Bench) -> None:
    far.server("--takeover")
    with Capture(far) as capture, others_sending(far):
        for _ in range(2):
            client = far.client(*DEFAULT, to=FAR)
            client.says("capabilities")
            begin = time.monotonic()
            connected(far, client)
            rules = hosts(far).rules()
            assert len(rules) == 6, rules  # of each family one, and two around a user
            assert capture.leaked(begin) == []
            client.kill()
            end = time.monotonic()
            eventually(lambda: capture.others(end) == EVERYWHERE, "the network is back")  # noqa: B023
            eventually(lambda: hosts(far).rules() == [], "the keeper removes the rules")
        # As if the keeper had been killed too.
        for family in ("-4", "-6"):
            for rule in ("20203 lookup main suppress_prefixlength 0",
                         "20204 uidrange 0-4710 lookup 203"):  # fmt: skip
                netns.ip("-n", far.pair.names[CLIENT], family, "rule", "add", "protocol", "203",
                         "pref", *rule.split())  # fmt: skip
        end = time.monotonic()
        eventually(lambda: capture.others(end) == EVERYWHERE, "they are harmless")
        client = far.client(*DEFAULT, to=FAR)
        connected(far, client)
        assert hosts(far).rules() == rules
        assert client.stop() == 0
    assert hosts(far).rules() == []


@pytest.mark.parametrize("why", ["mtu", "sysctl"])
def test_ipv6_is_caught_where_the_tunnel_has_none(far: Bench, why: str) -> None:
    options = ("-mtu", "1200") if why == "mtu" else ()
    if why == "sysctl":
        far.run(CLIENT, "sysctl", "-qw", "net.ipv6.conf.default.disable_ipv6=1")
    far.server(*options)
    with Capture(far) as capture, others_sending(far):
        client = far.client(*DEFAULT, *SLOW_DOWN, *options, to=FAR)
        client.says("capabilities")
        begin = time.monotonic()
        connected(far, client)
        eventually(lambda: capture.others(begin) == LAN_ONLY, "others reach the LAN")
        time.sleep(1)
        end = stopped(client)
        assert capture.leaked(begin, end) == []
        eventually(lambda: capture.others(end) == EVERYWHERE, "the network is back")


def test_a_machine_without_ipv6_has_the_route_of_ipv4(far: Bench) -> None:
    far.run(CLIENT, "sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1")
    far.server()
    connected(far, far.client(*DEFAULT, to=FAR))


def test_a_kernel_without_ipv6_has_the_route_of_ipv4(
    far: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Netlink.answers

    def answers(link: Netlink, request: Request) -> list[Message]:
        if request.body[0] == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
        return real(link, request)

    monkeypatch.setattr(Netlink, "answers", answers)
    index = far.on(CLIENT, lambda: socket.if_nametoindex("vclient"))
    far.on(CLIENT, lambda: default_route.add(index, False, [TTUN_USER]))
    assert len(hosts(far).rules()) == 3
    far.on(CLIENT, lambda: default_route.remove(index + 1))
    assert len(hosts(far).rules()) == 3, "another device has it"
    far.on(CLIENT, lambda: default_route.remove(index))
    assert hosts(far).rules() == []


def test_packets_that_a_router_forwards_go_through_the_tunnel(far: Bench) -> None:
    far.server()
    inner = LinkEnd(CLIENT, "wclient", [f"{SECOND_LINK[CLIENT]}/24"])
    far.pair.link(LinkEnd(SERVER, "wserver", []), inner)
    far.run(CLIENT, "sysctl", "-qw", "net.ipv4.ip_forward=1")
    get = ["route", "get", INTERNET, "from", "198.51.100.9", "iif", "wclient"]
    for device in ("vclient", "ttun0"):
        shown = netns.ip("-n", far.pair.names[CLIENT], "-json", *get)
        assert json.loads(shown)[0]["dev"] == device
        if device == "vclient":
            connected(far, far.client(*DEFAULT, to=FAR))


def test_multipath_tcp_goes_outside_too(far: Bench) -> None:
    far.server("-mptcp")
    client = far.client(*DEFAULT, "-mptcp", to=FAR)
    connected(far, client)


def test_the_connection_belongs_to_the_user_whose_packets_stay_outside(far: Bench) -> None:
    """A socket made before privileges are dropped would be routed as root's: into the tunnel."""
    far.server()
    connected(far, far.client(*DEFAULT, to=FAR))
    table = far.run(CLIENT, "cat", "/proc/net/tcp").splitlines()[1:]
    port = f":{20203:04X}"
    assert [line.split()[7] for line in table if port in line.split()[2]] == [str(TTUN_USER)]


def test_another_tunnel_with_the_default_route_is_a_line(far: Bench) -> None:
    far.server()
    first = far.client(*DEFAULT, to=FAR)
    connected(far, first)
    rules = hosts(far).rules()
    second = far.client(*DEFAULT, "--local4", "10.9.9.2/30", to=FAR)
    assert second.ended() == 1
    assert "ttun: cannot take the default route: another tunnel has it" in second.log()
    assert hosts(far).rules() == rules
    assert reaches(far)


def test_a_server_does_not_take_the_default_route() -> None:
    done = subprocess.run(
        [*PROGRAM, "server", "-k", "x", "--route", "default"],
        capture_output=True, text=True, check=False, timeout=30,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "ttun: --route default is for the client; see ttun server -h\n"


def test_a_shared_user_is_a_line(far: Bench) -> None:
    far.server()
    client = far.client("--route", "default", "--user", "nobody", to=FAR)
    client.says("authenticated")
    assert "packets of all programs of user nobody stay outside the tunnel" in client.log()
    assert "default route: ttun0 for all but the LAN and user nobody\n" in client.log()
    client = far.client(*DEFAULT, to=FAR)
    client.says("another tunnel has it")
    assert "stay outside" not in client.log()


def test_who_cannot_become_that_user_does_not_start(far: Bench) -> None:
    """Its own connection would go into the tunnel."""
    no_setuid = ["setpriv", "--bounding-set", "-setuid", "--inh-caps", "-setuid"]
    done = subprocess.run(
        far.pair.command(CLIENT, [*no_setuid, *PROGRAM, "client", "-k", "x", "-s", FAR,
                                  "--route", "default"]),
        capture_output=True, text=True, check=False, timeout=30,
        env={**os.environ, **netns.environment()},
    )  # fmt: skip
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "cannot become the user" in last or "cannot switch to user" in last


def test_a_route_that_somebody_removed_is_named_with_the_remedy(far: Bench) -> None:
    far.server()
    client = far.client(*DEFAULT, to=FAR)
    connected(far, client)
    far.run(CLIENT, "ip", "route", "flush", "table", "203")
    said = client.says("route 0.0.0.0/0 missing")
    remedy = "ip route add 0.0.0.0/0 dev ttun0 table 203"
    assert f"sudo {remedy}" in said
    far.run(CLIENT, *remedy.split())
    client.says("complete again")


def test_more_than_one_user_can_stay_outside(far: Bench) -> None:
    """As the command of --via does, which runs as another."""
    script = f"""
import ttun
with ttun.Client(b"secret", server="{FAR}", default_route=True, users=[0, 4711, 4712, 9]) as client:
    input()
"""
    far.server()
    program = subprocess.Popen(
        far.pair.command(CLIENT, [sys.executable, "-c", script]), text=True,
        stdin=subprocess.PIPE, env={**os.environ, **netns.environment()},
    )  # fmt: skip
    try:
        eventually(lambda: len(hosts(far).rules()) > 2, "the rules")
        shown = json.loads(netns.ip("-n", far.pair.names[CLIENT], "-json", "rule", "show"))
        ranges = [(x["uid_start"], x["uid_end"]) for x in shown if "uid_start" in x]
        assert ranges == [(1, 8), (10, 4710), (4713, 2**32 - 2)]

        assert {leaves_by(far, user) for user in (0, 4711, 4712, 9)} == {"vclient"}
        assert {leaves_by(far, user) for user in (1, 8, 10, 4713, 2**32 - 2)} == {"ttun0"}
        # root's own connection is one of those outside, and stop() removes the rules
        assert program.stdin is not None
        program.stdin.write("\n")
        program.stdin.close()
        assert program.wait(20) == 0
        assert hosts(far).rules() == []
    finally:
        program.kill()
        program.wait()


def test_a_server_of_ipv6_is_reached_outside(far: Bench) -> None:
    far.server()
    connected(far, far.client(*DEFAULT, to=f"[{INTERNET6}]:20203"))


def test_a_program_that_is_not_root_needs_one_capability(far: Bench) -> None:
    """As under the units: it is its user already, and stays it."""
    far.server()
    pythons = [each for each in (sys.executable, "/usr/bin/python3") if runs_for_all(each)]
    if not pythons:
        pytest.skip("no Python here that another user may start")
    log = far.directory / "unit.log"
    command = [*NO_ROOT, pythons[0], "-m", "ttun", "client", "-k", "secret", "-s", FAR]
    with log.open("w") as file:
        process = far.pair.start(
            CLIENT, [*command, "--route", "default"], stderr=file, environment=paths()
        )
    program = Program(process, log)
    try:
        program.says("authenticated")
        eventually(lambda: reaches(far), "the Internet through the tunnel")
        assert (leaves_by(far, 65534), leaves_by(far, 0)) == ("vclient", "ttun0")
        assert program.stop() == 0
        assert hosts(far).rules() == []
    finally:
        process.kill()
        process.wait()


def test_an_explicit_route_is_judged_as_the_user_that_will_dial(far: Bench) -> None:
    """A policy of the administrator's may send that user elsewhere."""
    far.server()
    for rule in (f"rule add uidrange {TTUN_USER}-{TTUN_USER} lookup 100",
                 f"route add default via {netns.IPV4[SERVER]} table 100"):  # fmt: skip
        netns.ip("-n", far.pair.names[CLIENT], *rule.split())
    network = ("--route", "203.0.113.0/24")
    other = far.client(*network, "--user", "4712", to=FAR)
    assert other.ended() == 2
    assert f"--route {network[1]} would route the tunnel's own connection to {FAR}" in other.log()
    connected(far, far.client(*network, "--user", str(TTUN_USER), to=FAR))
