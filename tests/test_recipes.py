"""docs/recipes.md as it is written there, on machines of this test, with real programs.

pc --- router --- edge --- internet --- server        the web and its names: on internet
      or laptop   provider or hotel
"""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine import IS_NOBODY_HERE
from recipe import Machine, blocks, targets
from tunnel import Program, eventually

from ttun.lab import netns
from ttun.lab.netns import LinkEnd, Namespaces

PROGRAMS = {
    "nft": "nftables",
    "dnsmasq": "dnsmasq-base",
    "tinyproxy": "tinyproxy-bin",
    "resolvconf": "openresolv",
}
MISSING = [package for program, package in PROGRAMS.items() if not shutil.which(program)]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.hosts,
    pytest.mark.nft,
    pytest.mark.skipif(bool(MISSING), reason=f"apt install {' '.join(MISSING)}"),
    pytest.mark.skipif(not IS_NOBODY_HERE, reason="no other user in this user namespace"),
]
PAGE = "recipes.md"
NEAR, EDGE, SERVER = "192.0.2.2", "192.0.2.254", "198.51.100.66"
WEB, NAMES = "203.0.113.80", "203.0.113.53"
ZONE = {"vpn.example.net": SERVER, "www.example.org": WEB, "other.example.org": WEB}
WEB_SERVER = f"""if True:
    import http.server
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            size = self.connection.getsockopt(6, 2)  # TCP_MAXSEG
            self.wfile.write(b"%s %d" % (self.client_address[0].encode(), size) + 100000 * b" ")
    http.server.ThreadingHTTPServer(("{WEB}", 80), Handler).serve_forever()
"""
GET = """if True:
    import sys, urllib.request
    try:
        print(urllib.request.urlopen(sys.argv[1], timeout=3).read().decode().strip())
    except OSError as error:
        print("failed:", error.__class__.__name__)
"""
# Others that send all the time: by name, to an address, and what nobody answers.
SEND = f"""if True:
    import socket, time
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    while True:
        for address in ("{WEB}", "{NAMES}", "203.0.113.99"):
            sock.sendto(b"of another program", (address, 9))
        time.sleep(0.05)
"""


def python(script: str) -> str:
    return shlex.join([sys.executable, "-c", script])


class World(Namespaces):
    """The machines of the picture. router: its host is a router with a LAN, else a laptop."""

    def __init__(self, directory: Path, *, router: bool) -> None:
        self.near, self.router, self.directory = "router" if router else "laptop", router, directory
        super().__init__(self.near, "edge", "internet", "server", *["pc"] * router)
        self.machines: dict[str, Machine] = {}

    def _join(self) -> None:
        for one, device, its, other, there, address in (
            (self.near, "eth0", f"{NEAR}/24", "edge", "lan", f"{EDGE}/24"),
            ("edge", "wan", "198.51.100.2/26", "internet", "edge", "198.51.100.1/26"),
            ("server", "eth0", f"{SERVER}/26", "internet", "server", "198.51.100.65/26"),
            ("pc", "eth0", "192.168.7.2/24", self.near, "eth1", "192.168.7.1/24"),
        ):
            if one in self.names:
                self.link(LinkEnd(one, device, [its]), LinkEnd(other, there, [address]))
                gateway = address.partition("/")[0]
                netns.ip("-n", self.names[one], "route", "add", "default", "via", gateway)
        for address in (WEB, NAMES):
            netns.ip("-n", self.names["internet"], "address", "add", f"{address}/32", "dev", "lo")
        netns.ip(
            "-n", self.names["internet"], "route", "add", "192.0.2.0/24", "via", "198.51.100.2"
        )

    def __enter__(self) -> World:
        super().__enter__()
        try:
            resolvers = {"internet": NAMES, "edge": NAMES, "server": NAMES, "pc": "192.168.7.1"}
            for host in self.names:
                name_server = resolvers.get(host, EDGE)
                self.machines[host] = Machine(self, host, self.directory, name_server)
            self.prepare()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *what: object) -> None:
        for machine in self.machines.values():
            machine.close()
        super().__exit__()

    def __getitem__(self, host: str) -> Machine:
        return self.machines[host]

    def prepare(self) -> None:
        """What there is before: the web, names, a proxy, a household that has the Internet."""
        zone = [f"--address=/{name}/{address}" for name, address in ZONE.items()]
        no_files = ["dnsmasq", "-k", "--user=root", "-C/dev/null", "--no-hosts", "-R", "-z"]
        names = shlex.join([*no_files, f"-a{NAMES}", *zone, "--log-queries", "--log-facility=-"])
        self["internet"].start(f"exec {names}", "names.log")
        self["internet"].start(f"exec {python(WEB_SERVER)}", "web.log")
        proxy = f"--address=/proxy.example.com/{EDGE}"
        names = shlex.join([*no_files, f"-a{EDGE}", f"-S{NAMES}", proxy, "-q", "-8-"])
        self["edge"].start(f"exec {names}", "names.log")
        self["internet"].run("echo 1 > /proc/sys/net/ipv4/ip_forward")
        if self.router:
            self["edge"].run("echo 1 > /proc/sys/net/ipv4/ip_forward")
            router = self["router"]
            (router.place / "etc" / "nftables.conf").write_text(
                "flush ruleset\ntable ip home { chain out { type nat hook postrouting priority "
                'srcnat; oifname "eth0" masquerade; }; }\n'
            )
            router.run("echo 1 > /proc/sys/net/ipv4/ip_forward; systemctl start dnsmasq nftables")
        else:
            config = "Port 3128\nAllow 192.0.2.0/24\nConnectPort 443\nTimeout 600\n"
            (self["edge"].place / "home" / "proxy.conf").write_text(config)
            self["edge"].start("exec tinyproxy -d -c proxy.conf", "proxy.log")

    def get(self, host: str, name: str = "www.example.org") -> str:
        """The address that the web sees a host with; through a tunnel, with a small MSS."""
        address, _, size = self[host].python(GET, f"http://{name}/").strip().partition(" ")
        assert address != SERVER or int(size) <= 1240
        return address

    def asked(self, host: str) -> list[str]:
        """The names that the name server of a host was asked for."""
        log = (self[host].place / "names.log").read_text()
        return re.findall(r" query\[\w+\] (\S+) from", log)

    @contextlib.contextmanager
    def others(self) -> Iterator[None]:
        """Have programs of all machines behind the edge send."""
        hosts = [host for host in ("pc", self.near) if host in self.names]
        running = [self[host].start(f"exec {python(SEND)}", "send.log") for host in hosts]
        yield
        for each in running:
            assert each.poll() is None
            each.kill()
            each.wait()

    def serve(self) -> dict[str, str]:
        """The server of the page, and its key at the other end; what was there before."""
        before = self["server"].state()
        for block in blocks(PAGE, "The server")[:-1]:
            self["server"].run(block)
        key = self["server"].place / "etc/ttun/exit.psk"
        shutil.copy(key, self[self.near].place / "home")
        self["server"].says("ttun-server@exit.log", "dropped privileges")
        return before

    def undo(self, before: dict[str, str]) -> None:
        self["server"].run(blocks(PAGE, "The server")[-1])
        assert self["server"].state() == before


def only_through_the_tunnel(world: World, host: str, allowed: set[tuple[int, str, int]]) -> None:
    """For a while nothing else leaves, with a session and without; the server resolves names."""
    unit = "ttun-server@exit"
    with world[world.near].capture() as capture, world.others():
        before = len(world.asked("edge"))
        assert world.get(host, "other.example.org") == SERVER
        world["server"].run(f"systemctl stop {unit}")
        assert world.get(host, "www.example.org") == "failed:"
        time.sleep(1)
        world["server"].run(f"systemctl start {unit}")
        eventually(lambda: world.get(host) == SERVER, "the web again", 60)
        ours = set(world.asked("edge")[before:])
        assert "other.example.org" in world.asked("internet")
    assert targets(capture) <= allowed
    assert ours <= {"vpn.example.net", "proxy.example.com"}
    assert any(protocol == 6 for protocol, *_ in targets(capture)), "the tunnel itself is seen"
    listening = re.findall(r"\S+:53\b", world["server"].state()["ports"])
    assert set(listening) == {"10.1.1.1:53"}, "and to nobody else"


def test_a_household_goes_through_the_server_and_back_to_what_it_was(tmp_path: Path) -> None:
    with World(tmp_path, router=True) as world:
        router = world["router"]
        eventually(lambda: world.get("pc") == NEAR, "the way outside")
        at_home, at_server = router.state(), world.serve()
        *steps, undo = blocks(PAGE, "A household through the server")
        for block in steps:
            router.run(block)
        router.says("ttun-client@exit.log", "authenticated")
        for host in ("pc", "router"):
            eventually(lambda host=host: world.get(host) == SERVER, f"the web from {host}")
        # As systemd does when the machines start again.
        for machine in (router, world["server"]):
            machine.run("systemctl restart nftables")
        allowed = {(6, SERVER, 20203), (17, EDGE, 53)}
        only_through_the_tunnel(world, "pc", allowed)
        router.run("systemctl stop ttun-client@exit")
        with router.capture() as capture:
            assert world.get("pc") == "failed:", "names are not resolved"
            assert world["pc"].python(GET, f"http://{WEB}/").startswith("failed:")
        assert targets(capture) == set(), "nothing goes outside"
        router.run("systemctl start ttun-client@exit")
        eventually(lambda: world.get("pc") == SERVER, "the web again", 60)
        router.run(undo)
        world.undo(at_server)
        assert router.state() == at_home
        assert world.get("pc") == NEAR


def test_a_laptop_goes_through_the_proxy_of_a_hotel_and_back_to_what_it_was(tmp_path: Path) -> None:
    with World(tmp_path, router=False) as world:
        laptop = world["laptop"]
        assert world.get("laptop") == "failed:", "only the proxy reaches the Internet"
        before, at_server = laptop.state(), world.serve()
        prepare, start, *undo = blocks(PAGE, "A laptop behind a hotel's proxy")
        laptop.run(prepare)
        client = Program(laptop.start(f"exec {start}", "ttun.log"), laptop.place / "ttun.log")
        client.says("through proxy proxy.example.com:3128")
        client.says("authenticated")
        eventually(lambda: world.get("laptop") == SERVER, "the web through the proxy")
        only_through_the_tunnel(world, "laptop", {(6, EDGE, 3128), (17, EDGE, 53)})
        client.process.send_signal(signal.SIGINT)
        assert client.ended() == 0
        assert len(undo) == 2
        for number, block in enumerate(undo):
            laptop.run(block)
            assert f"nameserver {EDGE}" in laptop.run("cat /etc/resolv.conf"), number
        world.undo(at_server)
        assert laptop.state() == before
        assert world.get("laptop") == "failed:"
