"""What docs/routers.md advises, as written there: the nftables rules lower the MSS both ways, two
LANs reach each other, behind the firewall of the page too, and the packages of Python are enough.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tunnel import CLIENT, ROOT, SERVER, SERVER_ADDRESS, Bench, End, eventually, in_namespace

from ttun.lab import netns, traffic
from ttun.lab.netns import LinkEnd, Namespaces

DOC = (ROOT / "docs" / "routers.md").read_text()
FIREWALL, RULES = re.findall(r"```nft\n(.*?)```", DOC, re.DOTALL)
ALSO_TO_THE_ROUTER, MASQUERADE = re.findall(r"^\| .* \| to .*?: `(.*)` \|$", DOC, re.MULTILINE)
SYSCTL = re.search(r"```sysctl\n(.*?)```", DOC, re.DOTALL)[1]
SITES = re.findall(
    r"^# .* on the (\w+), whose LAN is (\S+)\.0/24\nOPTIONS=(.*)$", DOC, re.MULTILINE
)
MTU = 1280
HEADERS = {"4": 40, "6": 60}
LAN = {"4": "198.51.100.2", "6": "2001:db8:1::2"}  # RFC 5737, RFC 3849
ROUTER = {"4": "198.51.100.1", "6": "2001:db8:1::1"}
FAR = {"4": "10.1.1.1", "6": "fc11::1"}
# The MSS of a connection that somebody made to this host; of one that this host makes.
LISTEN = """if True:
    import socket, sys
    family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
    listener = socket.create_server((sys.argv[1], 5002), family=family)
    print("ready", flush=True)
    accepted = listener.accept()[0]
    print(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG), flush=True)
    accepted.recv(1)
"""
CONNECT = """if True:
    import socket, sys
    sock = socket.create_connection((sys.argv[1], 5002), 10)
    print(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG))
"""


@pytest.fixture
def lan(bench: Bench) -> Iterator[list[str]]:
    """A host behind the client, which routes for it; the start of a command on that host."""
    if not shutil.which("nft"):
        pytest.skip("nftables is not installed")
    name = f"{bench.pair.names[CLIENT]}-lan"
    router = bench.pair.names[CLIENT]
    netns.ip("netns", "add", name)
    try:
        netns.ip("link", "add", "lan", "netns", router, "type", "veth",
                 "peer", "name", "eth0", "netns", name)  # fmt: skip
        for namespace, device, own in ((router, "lan", ROUTER), (name, "eth0", LAN)):
            netns.ip("-n", namespace, "address", "add", f"{own['4']}/24", "dev", device)
            netns.ip("-n", namespace, "address", "add", f"{own['6']}/64", "dev", device, "nodad")
            netns.ip("-n", namespace, "link", "set", device, "up")
        for version, via in ROUTER.items():
            netns.ip("-n", name, f"-{version}", "route", "add", "default", "via", via)
        forward(bench, "1")
        bench.tunnel()
        bench.answers()
        for network in ("198.51.100.0/24", "2001:db8:1::/64"):
            route = ["route", "add", network, "dev", "ttun0"]
            netns.ip("-n", bench.pair.names[SERVER], "-6" if ":" in network else "-4", *route)
        yield ["ip", "netns", "exec", name]
    finally:
        forward(bench, "0")
        subprocess.run(bench.pair.command(CLIENT, ["nft", "delete table inet ttun"]),
                       capture_output=True, check=False)  # fmt: skip
        netns.ip("netns", "delete", name)


def forward(bench: Bench, on: str) -> None:
    for setting in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
        bench.run(CLIENT, "sh", "-c", f"echo {on} > /proc/sys/net/{setting}")


def segment_sizes(bench: Bench, lan: list[str], version: str) -> tuple[int, int, int, int]:
    """The MSS at both ends of a connection from the LAN to the far end, and of one back."""
    python = [sys.executable, "-c"]
    far = bench.pair.command(SERVER, python)
    near = [*lan, *python]
    sizes = []
    for listens, connects, to in ((far, near, FAR), (near, far, LAN)):
        with subprocess.Popen(
            [*listens, LISTEN, to[version]], stdout=subprocess.PIPE, text=True
        ) as listener:
            assert listener.stdout is not None
            assert listener.stdout.readline() == "ready\n"
            done = subprocess.run([*connects, CONNECT, to[version]], capture_output=True,
                                  text=True, check=True, timeout=30)  # fmt: skip
            sizes += [int(listener.stdout.readline()), int(done.stdout)]
    return sizes[0], sizes[1], sizes[2], sizes[3]


@pytest.mark.hosts
@pytest.mark.parametrize("version", ["4", "6"])
def test_the_rules_lower_the_mss_both_ways(
    bench: Bench, lan: list[str], version: str, tmp_path: Path
) -> None:
    timestamps = 12  # bytes of each segment that TCP_MAXSEG leaves out
    fits = MTU - HEADERS[version] - timestamps
    before = segment_sizes(bench, lan, version)
    assert max(before) <= fits, "the far end's own device bounds what it offers"
    # A far end with a larger MTU: now only the router in between knows better.
    netns.ip("-n", bench.pair.names[SERVER], "link", "set", "ttun0", "mtu", "1500")
    assert max(segment_sizes(bench, lan, version)) > fits, "without the rules it is too large"
    rules = tmp_path / "rules.nft"
    rules.write_text(RULES)
    bench.run(CLIENT, "nft", "-f", str(rules))
    assert max(segment_sizes(bench, lan, version)) <= fits


class TwoLans(Namespaces):
    """The two routers of "LAN to LAN", and a host behind each."""

    def __init__(self) -> None:
        super().__init__(*(f"{kind}_{role}" for role, _, _ in SITES for kind in ("router", "lan")))

    def _join(self) -> None:
        self.link(
            LinkEnd("router_server", "eth0", [f"{SERVER_ADDRESS}/24"]),
            LinkEnd("router_client", "eth0", ["192.0.2.2/24"]),
        )
        for role, lan, _ in SITES:
            self.link(
                LinkEnd(f"router_{role}", "eth1", [f"{lan}.1/24"]),
                LinkEnd(f"lan_{role}", "eth0", [f"{lan}.2/24"]),
            )
            netns.ip("-n", self.names[f"lan_{role}"], "route", "add", "default", "via", f"{lan}.1")
            in_namespace(self.names[f"router_{role}"], forward_as_written)


def forward_as_written() -> None:
    for name, value in re.findall(r"^(\S+) = (\S+)$", SYSCTL, re.MULTILINE):
        Path("/proc/sys", *name.split(".")).write_text(value)


@contextlib.contextmanager
def two_lans(directory: Path) -> Iterator[TwoLans]:
    """Both routers, with the options of the page."""
    with TwoLans() as hosts, contextlib.ExitStack() as running:
        for role, _, options in SITES:
            here = options.replace("vpn.example.net", SERVER_ADDRESS).split()
            command = [role, "-k", "secret", *here]
            end = End(hosts, f"router_{role}", command, directory / f"{role}.log")
            running.callback(end.kill)
        yield hosts


def answers(host: str, address: str) -> bool:
    return in_namespace(host, lambda: traffic.ping(address, 1, 0)) != [None]


def reach_each_other(hosts: TwoLans) -> None:
    for (role, _, _), (_, other, _) in zip(SITES, reversed(SITES)):
        lan, there = hosts.names[f"lan_{role}"], f"{other}.2"
        eventually(lambda: answers(lan, there), f"a ping from the LAN of the {role}")  # noqa: B023


@pytest.mark.hosts
def test_two_lans_reach_each_other_as_the_page_says(tmp_path: Path) -> None:
    with two_lans(tmp_path) as hosts:
        reach_each_other(hosts)


def connects(host: str, address: str) -> bool:
    """Whether a program on a host gets through to port 5005 of an address."""

    def connect() -> bool:
        with contextlib.suppress(TimeoutError), socket.create_connection((address, 5005), 2):
            return True
        return False

    return in_namespace(host, connect)


@pytest.mark.hosts
@pytest.mark.nft
def test_behind_the_firewall_of_the_page_the_lans_are_joined_and_the_router_is_not_open(
    tmp_path: Path,
) -> None:
    (own, other) = [lan for _, lan, _ in SITES]
    with two_lans(tmp_path) as hosts:
        router, far_router = (hosts.names[f"router_{role}"] for role, _, _ in SITES)
        near, far = (hosts.names[f"lan_{role}"] for role, _, _ in SITES)

        def firewall(host: str, rules: str) -> None:
            load = ["ip", "netns", "exec", host, "nft", "-f", "-"]
            subprocess.run(load, input=rules, text=True, check=True)

        for host in (router, far_router):
            firewall(host, FIREWALL + RULES)
        reach_each_other(hosts)
        listeners = [
            in_namespace(host, lambda: socket.create_server(("", 5005)))
            for host in (router, near, far)
        ]
        try:
            assert connects(near, f"{own}.1"), "from its own LAN"
            assert connects(far, f"{own}.2"), "from the other LAN to a host in this one"
            assert not connects(far, f"{own}.1"), "from the other LAN to the router itself"
            assert not connects(far_router, SERVER_ADDRESS), "from outside"
            wider = FIREWALL.replace("tcp dport 22 ", f"{ALSO_TO_THE_ROUTER}\n tcp dport 22 ", 1)
            firewall(router, wider)
            assert connects(far, f"{own}.1"), "once the line of the page is there"
            assert not connects(far_router, SERVER_ADDRESS)
            netns.ip("-n", far_router, "route", "del", f"{own}.0/24", "dev", "ttun0")
            assert not connects(near, f"{other}.2"), "the other end has no route back"
            firewall(router, FIREWALL.rstrip().rstrip("}") + MASQUERADE + "\n}\n")
            assert connects(near, f"{other}.2")
        finally:
            for listener in listeners:
                listener.close()


WITHOUT_CTYPES = """
import importlib, pkgutil, sys
sys.modules["ctypes"] = sys.modules["_ctypes"] = None  # an import fails
import ttun
for module in pkgutil.walk_packages(ttun.__path__, "ttun."):
    if not module.name.startswith(("ttun.lab", "ttun.__main__")):
        importlib.import_module(module.name)
"""


def test_no_module_takes_ctypes_which_is_a_package_of_its_own_there() -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_CTYPES], cwd=ROOT, timeout=60, check=True)
