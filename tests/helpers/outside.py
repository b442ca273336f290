"""A host whose default route leads through another one, programs of some users that send all the
time, and a capture of what leaves the host."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from name_server import NAME_SERVER
from tunnel import CLIENT, SERVER, Bench, End, bench, eventually

from ttun.lab import netns

# Behind the server's host, which is the client's router.
FAR, OTHER_FAR, INTERNET = (f"203.0.113.{n}" for n in (1, 2, 99))
INTERNET6 = "2001:db8:99::1"
SECOND_LINK = {SERVER: "198.51.100.1", CLIENT: "198.51.100.2"}
TTUN_USER = 4711
NAME = "vpn.example"  # of the server
DEFAULT = ("--route", "default", "--user", str(TTUN_USER))
USERS = (0, 65534, 4242)  # of the programs that send
EVERY = 0.04  # seconds
LAN = [ipaddress.ip_network(x) for x in ("192.0.2.0/24", "198.51.100.0/24", "2001:db8::/64")]
MARK = b"of another program"
PACKET_OUTGOING = 4  # linux/if_packet.h
SO_RCVBUFFORCE = 33  # asm-generic/socket.h
ETH_P_ALL, ETH_P_IP, ETH_P_IPV6 = 0x0003, 0x0800, 0x86DD

SEND = f"""
import os, signal, socket, sys, time
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(*[int(sys.argv[1])] * 3)
targets = [(socket.AF_INET, a) for a in sys.argv[2].split(",")]
targets += [(socket.AF_INET6, a) for a in sys.argv[3].split(",")]
old = []
for family, address in targets:  # a socket that knew its way before
    sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.connect((address, 9))
    old.append(sock)
print("ready", flush=True)
signal.sigwait([signal.SIGUSR1])
while True:
    for (family, address), before in zip(targets, old):
        for connected in (True, False):
            try:
                if connected:
                    before.send({MARK!r})
                else:
                    with socket.socket(family, socket.SOCK_DGRAM) as sock:
                        sock.sendto({MARK!r}, (address, 9))
            except OSError:
                pass
    time.sleep({EVERY})
"""


class FarHosts(netns.Hosts):
    """The two hosts; the server's host routes the client's, and is all the Internet."""

    def _join(self) -> None:
        super()._join()
        for address in (FAR, OTHER_FAR, NAME_SERVER, INTERNET):
            netns.ip("-n", self.names[SERVER], "address", "add", f"{address}/32", "dev", "lo")
        netns.ip("-n", self.names[SERVER], "address", "add", f"{INTERNET6}/128", "dev", "lo")
        self.set_gateway()

    def set_gateway(self, gateway: str = netns.IPV4[SERVER]) -> None:
        netns.ip("-n", self.names[CLIENT], "route", "replace", "default", "via", gateway)
        netns.ip("-n", self.names[CLIENT], "route", "replace", "default", "via", netns.IPV6[SERVER])

    def rules(self) -> list[str]:
        """The rules of the client's host that are not the kernel's own."""
        found = []
        for family in ("-4", "-6"):
            shown = netns.ip("-n", self.names[CLIENT], family, "rule", "show").splitlines()
            found += [line for line in shown if "lookup local" not in line]
        return [line for line in found if not line.startswith(("32766:", "32767:"))]


class Sent(NamedTuple):
    """A packet that left the client's host on a link, not through the tunnel."""

    at: float
    device: str
    protocol: int
    target: str
    port: int  # 0: of neither TCP nor UDP
    of_another: bool

    @property
    def is_lan(self) -> bool:
        address = ipaddress.ip_address(self.target)
        near = any(address in network for network in LAN)
        return near or address.is_link_local or address.is_multicast


class Capture:
    """Context manager: all IP packets that leave the client's host, or another, on its links.

    device: how the names of its links end.
    """

    def __init__(self, host: Bench | socket.socket, device: str = CLIENT) -> None:
        is_open = isinstance(host, socket.socket)
        self.sock = host if is_open else host.on(CLIENT, self.opened)
        self.device = device
        self.sent: list[Sent] = []
        self.over = False
        self.thread = threading.Thread(target=self.take)

    @staticmethod
    def opened() -> socket.socket:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ALL))
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 8 << 20)
        sock.settimeout(0.1)
        return sock

    def __enter__(self) -> Capture:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over = True
        self.thread.join()
        self.sock.close()

    def take(self) -> None:
        while not self.over:
            with contextlib.suppress(TimeoutError):
                packet, (device, protocol, kind, *_) = self.sock.recvfrom(65536)
                if kind == PACKET_OUTGOING and device.endswith(self.device):
                    self.note(time.monotonic(), device, protocol, packet)

    def note(self, at: float, device: str, protocol: int, packet: bytes) -> None:
        if protocol == ETH_P_IP:
            inner, target, behind = packet[9], packet[16:20], packet[4 * (packet[0] & 15) :]
        elif protocol == ETH_P_IPV6:
            inner, target, behind = packet[6], packet[24:40], packet[40:]
        else:
            return
        port = struct.unpack(">H", behind[2:4])[0] if inner in (6, 17) else 0
        to = str(ipaddress.ip_address(target))
        self.sent.append(Sent(at, device, inner, to, port, MARK in behind))

    def leaked(self, begin: float, end: float | None = None) -> list[Sent]:
        """What left in a time, not to the LAN, and was neither ttun's connection nor a query."""
        end = time.monotonic() if end is None else end
        allowed = {(6, FAR, 20203), (6, OTHER_FAR, 20203), (17, NAME_SERVER, 53)}
        return [
            each
            for each in list(self.sent)
            if begin <= each.at <= end
            and not each.is_lan
            and (each.of_another or (each.protocol, each.target, each.port) not in allowed)
        ]

    def others(self, begin: float) -> set[tuple[str, bool]]:
        """Where others' packets went since then, and whether that is the LAN."""
        found = [each for each in list(self.sent) if each.of_another and each.at >= begin]
        return {(each.target, each.is_lan) for each in found}


@contextlib.contextmanager
def others(bench: Bench) -> Iterator[list[subprocess.Popen[str]]]:
    """Programs of some users that send to the Internet and to the LAN, over IPv4 and IPv6.

    Each begins on SIGUSR1, also on sockets that it had connected before.
    """
    targets = f"{INTERNET},{netns.IPV4[SERVER]}", f"{INTERNET6},{netns.IPV6[SERVER]}"
    running = [
        bench.pair.start(
            CLIENT, [sys.executable, "-c", SEND, str(user), *targets], stdout=subprocess.PIPE,
            environment={"PATH": os.environ["PATH"]},
        )
        for user in USERS
    ]  # fmt: skip
    try:
        for each in running:
            assert each.stdout is not None
            assert each.stdout.readline() == "ready\n"
        yield running
    finally:
        for each in running:
            each.kill()
            each.wait()
            assert each.stdout is not None
            each.stdout.close()


@contextlib.contextmanager
def others_sending(bench: Bench) -> Iterator[None]:
    """Have them send from the beginning on."""
    with others(bench) as running:
        for each in running:
            each.send_signal(signal.SIGUSR1)
        yield


EVERYWHERE = {(INTERNET, False), (INTERNET6, False), (netns.IPV4[SERVER], True),
              (netns.IPV6[SERVER], True)}  # fmt: skip
LAN_ONLY = {(netns.IPV4[SERVER], True), (netns.IPV6[SERVER], True)}


def far(directory: Path) -> Iterator[Bench]:
    """The fixture."""
    with FarHosts() as pair:
        yield from bench(pair, directory, "x1", [])
    for place in ("dnsmasq", "resolvconf", "systemd"):  # in the tests' own /run
        shutil.rmtree(f"/run/{place}", ignore_errors=True)


def hosts(far: Bench) -> FarHosts:
    assert isinstance(far.pair, FarHosts)
    return far.pair


def reaches(far: Bench, address: str = INTERNET) -> bool:
    """Whether root's packets get to the Internet and back, whichever way."""
    with contextlib.suppress(OSError):
        return far.ping(CLIENT, address) == 1
    return False


def connected(far: Bench, client: End, times: int = 1) -> None:
    client.says("authenticated", times, seconds=60)
    eventually(lambda: reaches(far), "the Internet through the tunnel")


def leaves_by(far: Bench, user: int) -> str:
    """The device that a user's packets to the Internet leave through."""
    shown = netns.ip(
        "-n", far.pair.names[CLIENT], "-json", "route", "get", INTERNET, "uid", str(user)
    )
    found: str = json.loads(shown)[0]["dev"]
    return found
