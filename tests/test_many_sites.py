"""docs/many-sites.md as it is written there: three sites, three tunnels, OSPF; one path is cut.

    lan1 -- site1 ---\
    lan2 -- site2 ---- internet        and a tunnel between each two sites
    lan3 -- site3 ---/
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tunnel import ROOT, End, eventually, in_namespace

from ttun.lab import netns, traffic
from ttun.lab.netns import LinkEnd, Namespaces

DOC = (ROOT / "docs" / "many-sites.md").read_text()
TUNNELS = re.findall(
    r"^# /etc/ttun/\S+ on site (\d): ttun-(\w+)@\S+\nOPTIONS=(.*)$", DOC, re.MULTILINE
)
SYSCTL = re.search(r"```sysctl\n(.*?)```", DOC, re.DOTALL)[1]
BIRD = re.search(r"```bird\n(.*?)```", DOC, re.DOTALL)[1]
PUBLIC = {n: re.search(rf"^\| {n} \| (\S+) ", DOC, re.MULTILINE)[1] for n in "123"}
NETWORKS = {"4": "10.7.{}.{}", "6": "fd12:3456:789a:{}::{}"}  # of the LANs: site, host
LENGTHS = {"4": 24, "6": 64}
FAR = [network.format(3, 2) for network in NETWORKS.values()]
PROGRAM = shutil.which("bird")
SIZE = 4 << 20  # bytes of a transfer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.hosts,
    pytest.mark.skipif(PROGRAM is None, reason="BIRD 2 is missing: apt install bird2"),
]


class Sites(Namespaces):
    """The hosts of the picture: each site's router, one host in its LAN, what lies between."""

    def __init__(self) -> None:
        super().__init__("internet", *(f"{kind}{n}" for kind in ("site", "lan") for n in PUBLIC))

    def _join(self) -> None:
        self.set("internet", "net.ipv4.ip_forward = 1")
        for n, public in PUBLIC.items():
            site, lan = f"site{n}", f"lan{n}"
            gateway = ipaddress.ip_interface(f"{public}/26").network[-2]
            self.link(
                LinkEnd("internet", site, [f"{gateway}/26"]),
                LinkEnd(site, "eth0", [f"{public}/26"]),
            )
            netns.ip("-n", self.names[site], "route", "add", "default", "via", str(gateway))
            ours, theirs = (
                [f"{NETWORKS[v].format(n, host)}/{LENGTHS[v]}" for v in NETWORKS] for host in (1, 2)
            )
            self.link(LinkEnd(site, "eth1", ours), LinkEnd(lan, "eth0", theirs))
            for network in NETWORKS.values():
                via = network.format(n, 1)
                netns.ip("-n", self.names[lan], "route", "add", "default", "via", via)
            self.set(site, SYSCTL)

    def set(self, host: str, settings: str) -> None:
        def write() -> None:
            for name, value in re.findall(r"^(\S+) = (\S+)$", settings, re.MULTILINE):
                Path("/proc/sys", *name.split(".")).write_text(value)

        in_namespace(self.names[host], write)

    @contextlib.contextmanager
    def cut(self, one: str, other: str) -> Iterator[None]:
        """Lose all packets between two sites without a word."""
        ways = [("from", PUBLIC[a], "to", PUBLIC[b]) for a, b in (one + other, other + one)]
        for way in ways:
            netns.ip("-n", self.names["internet"], "rule", "add", *way, "blackhole")
        yield
        for way in ways:
            netns.ip("-n", self.names["internet"], "rule", "delete", *way, "blackhole")

    def ping(self, address: str) -> bool:
        """Ping from the LAN of site 1."""
        try:
            return in_namespace(self.names["lan1"], lambda: traffic.ping(address, 1, 0)) != [None]
        except OSError:  # no route yet
            return False

    def next_hop(self, n: str, address: str) -> str:
        """The device that a site's router sends packets to an address through."""
        try:
            shown = netns.ip("-n", self.names[f"site{n}"], "-json", "route", "get", address)
        except netns.TtunError:
            return "none"
        device: str = json.loads(shown)[0]["dev"]
        return device

    def carried(self, n: str, device: str) -> int:
        """Bytes that went out through a device of a site."""
        shown = netns.ip("-n", self.names[f"site{n}"], "-json", "-s", "link", "show", device)
        bytes_: int = json.loads(shown)[0]["stats64"]["tx"]["bytes"]
        return bytes_

    @contextlib.contextmanager
    def connection(self) -> Iterator[tuple[socket.socket, socket.socket]]:
        """TCP from the LAN of site 1 to that of site 3."""
        address = (FAR[0], 5001)
        near_host, far_host = self.names["lan1"], self.names["lan3"]
        with in_namespace(far_host, lambda: socket.create_server(address)) as listener:
            near = in_namespace(near_host, lambda: socket.create_connection(address, 30))
            far = listener.accept()[0]
        with near, far:
            far.settimeout(30)
            yield near, far


@pytest.fixture
def sites(tmp_path: Path) -> Iterator[Sites]:
    """The sites with their tunnels and their routers, as on the page; only the log is elsewhere,
    and a neighbour is looked for each second."""
    assert len(TUNNELS) == 6
    with Sites() as made, contextlib.ExitStack() as running:
        for n, role, options in TUNNELS:
            log = tmp_path / f"ttun{len(list(tmp_path.iterdir()))}.log"
            end = End(made, f"site{n}", [role, "-k", "secret", *options.split()], log)
            running.callback(end.kill)
            end.says("dropped privileges")
        for n in PUBLIC:
            conf = BIRD.replace("router id 10.7.1.1;", f"router id 10.7.{n}.1;")
            conf = conf.replace("log syslog all", "log stderr all").replace("hello 5", "hello 1")
            files = {kind: tmp_path / f"bird{n}.{kind}" for kind in ("conf", "ctl", "pid", "log")}
            files["conf"].write_text(conf)
            command = [PROGRAM, "-f", "-c", files["conf"], "-s", files["ctl"], "-P", files["pid"]]
            with files["log"].open("w") as log_file:
                router = made.start(f"site{n}", [*map(str, command)], stderr=log_file)
            running.callback(end_router, router)
        yield made


def end_router(router: subprocess.Popen[str]) -> None:
    router.kill()
    router.wait()


def transfer(near: socket.socket, far: socket.socket) -> None:
    """Send SIZE bytes one way; within half a minute after the last one that came, more come."""
    data, received = os.urandom(SIZE), bytearray()
    sender = threading.Thread(target=near.sendall, args=(data,), daemon=True)
    sender.start()
    while len(received) < SIZE:
        received += far.recv(1 << 16)
    sender.join()
    assert received == data


def test_traffic_goes_around_a_path_that_is_cut_and_back(sites: Sites) -> None:
    def direct() -> bool:
        back = NETWORKS["4"].format(1, 2), NETWORKS["6"].format(1, 2)
        return all(sites.next_hop("1", to) == "to-3" for to in FAR) and all(
            sites.next_hop("3", to) == "to-1" for to in back
        )

    def moved() -> list[int]:
        """How many of the transfers each device has carried: site 1's two, and 2's to 3."""
        devices = [("1", "to-3"), ("1", "to-2"), ("2", "to-3")]
        return [sites.carried(*device) // SIZE for device in devices]

    eventually(direct, "each site knows the direct way", 40)
    for address in FAR:
        assert sites.ping(address)
    with sites.connection() as (near, far):
        transfer(near, far)
        assert moved() == [1, 0, 0]
        with sites.cut("1", "3"):
            transfer(near, far)  # the same connection
            assert [sites.next_hop("1", to) for to in FAR] == ["to-2", "to-2"]
            for address in FAR:
                eventually(lambda to=address: sites.ping(to), f"ping {address}")
            direct_bytes = sites.carried("1", "to-3")
            assert moved()[1:] == [1, 1]
        eventually(direct, "the direct way is back", 60)
        transfer(near, far)
        assert sites.carried("1", "to-3") - direct_bytes >= SIZE
        assert moved()[1:] == [1, 1]
