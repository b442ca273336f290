"""Hosts on a Tox network of their own, on this machine, for the end-to-end tests.

    flat                                    behind NAT
    server 192.0.2.1 ---- node 192.0.2.3    server 198.51.100.2 -- .1 nat 203.0.113.2 ---- node
    client 192.0.2.2 ----/                  client 198.51.100.130 -- .129 nat 203.0.113.3 -/  .1

The node runs Debian's tox-bootstrapd. No packet leaves the machine.
"""

from __future__ import annotations

import contextlib
import ctypes.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import forked
import tunnel

from ttun.lab import netns

SERVER, CLIENT, NODE = "toxserver", "toxclient", "toxnode"
NAT = {SERVER: "toxnats", CLIENT: "toxnatc"}
PORT = 33445
# With one alone, a client behind a proxy was not found within two minutes once in some 20 starts.
NODES = 4
FLAT = "192.0.2"  # RFC 5737; local discovery, which toxcore does in private networks only, is out
MASQUERADE = f"""
add table ip nat
add chain ip nat out {{ type nat hook postrouting priority 100; }}
add rule ip nat out oifname to-{NODE} masquerade
add table ip wall
add chain ip wall in {{ type filter hook input priority 0; }}
add rule ip wall in iifname to-{NODE} ct state new drop"""
DROP_UDP = """
add table ip strict
add chain ip strict through { type filter hook forward priority 0; }
add rule ip strict through meta l4proto udp drop"""
# 127.0.0.1, ::1 and ::ffff:127.0.0.1 as /proc/net has them.
LOOPBACK = {"0100007F", f"{0:024}01000000", f"{0:016}FFFF00000100007F"}
T = TypeVar("T")


def why_not() -> str:
    """What is missing on this machine, as the command that brings it; empty if nothing."""
    missing = []
    if ctypes.util.find_library("toxcore") is None:
        try:
            ctypes.CDLL("libtoxcore.so.2")
        except OSError:
            missing.append("libtoxcore2")
    if shutil.which("tox-bootstrapd") is None:
        missing.append("toxcore-utils")
    return f"apt install {' '.join(missing)}" if missing else ""


def no_nat() -> str:
    """What is missing for the hosts behind NAT."""
    return "" if shutil.which("nft") else "NAT in a test needs nft: apt install nftables"


class Program(tunnel.Program):
    """A program that has to be found through Tox first."""

    def says(self, text: str, times: int = 1, seconds: float = 60) -> str:
        return super().says(text, times, seconds)

    def descriptors(self) -> int:
        """How many are open, but for toxcore's sockets: it leaves relays and joins them again.

        Those are all Internet sockets that are not on the loopback.
        """
        process = Path(f"/proc/{self.process.pid}")
        toxcores = set()
        for table in ("tcp", "tcp6", "udp", "udp6"):
            for line in (process / "net" / table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[1].partition(":")[0] not in LOOPBACK:
                    toxcores.add(f"socket:[{fields[9]}]")
        count = 0
        for descriptor in (process / "fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                count += os.readlink(descriptor) not in toxcores
        return count

    def usage(self) -> tuple[int, int, int]:
        _, threads, memory = super().usage()
        return self.descriptors(), threads, memory


class Lab:
    """The hosts, the bootstrap node, and what a test starts on them."""

    def __init__(self, directory: Path, *, nat: bool = False) -> None:
        self.directory, self.nat = directory, nat
        self.hosts = netns.Namespaces(SERVER, CLIENT, NODE, *(NAT.values() if nat else []))
        self.names = self.hosts.names
        self.programs: list[Program] = []
        self.nodes = directory / "nodes.json"

    def __enter__(self) -> Lab:
        self.hosts.__enter__()
        try:
            if self.nat:
                self._wire_nat()
            else:
                self._wire_flat()
            self._start_nodes("203.0.113.1" if self.nat else f"{FLAT}.3")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for program in self.programs:
            if program.process.poll() is None:
                program.kill()
        self.hosts.__exit__()

    def _wire(self, a: str, address_a: str | None, b: str, address_b: str | None) -> None:
        """A veth pair between two hosts; its ends are named after the host at the other end."""
        ends = [(a, f"to-{b}", address_a), (b, f"to-{a}", address_b)]
        netns.ip("link", "add", ends[0][1], "netns", self.names[a], "type", "veth",
                 "peer", "name", ends[1][1], "netns", self.names[b])  # fmt: skip
        for host, link, address in ends:
            netns.ip("-n", self.names[host], "link", "set", link, "up")
            if address:
                netns.ip(
                    "-n", self.names[host], "address", "add", address, "broadcast", "+", "dev", link
                )
            else:
                netns.ip("-n", self.names[host], "link", "set", link, "master", "br0")

    def _bridge(self, address: str) -> None:
        name = self.names[NODE]
        netns.ip("-n", name, "link", "add", "br0", "type", "bridge", "forward_delay", "0")
        netns.ip("-n", name, "address", "add", address, "broadcast", "+", "dev", "br0")
        netns.ip("-n", name, "link", "set", "br0", "up")

    def _wire_flat(self) -> None:
        self._bridge(f"{FLAT}.3/24")
        self._wire(SERVER, f"{FLAT}.1/24", NODE, None)
        self._wire(CLIENT, f"{FLAT}.2/24", NODE, None)

    def _wire_nat(self) -> None:
        self._bridge("203.0.113.1/24")
        for host, inside, router, outside in (
            (SERVER, "198.51.100.2/25", "198.51.100.1/25", "203.0.113.2/24"),
            (CLIENT, "198.51.100.130/25", "198.51.100.129/25", "203.0.113.3/24"),
        ):
            nat = NAT[host]
            self._wire(host, inside, nat, router)
            self._wire(nat, outside, NODE, None)
            netns.ip("-n", self.names[host], "route", "add", "default", "via", router[:-3])
            self.run(nat, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
            self.run(nat, "nft", MASQUERADE)

    def drop_udp(self) -> None:
        """Leave the hosts behind NAT nothing but TCP."""
        for nat in NAT.values():
            self.run(nat, "nft", DROP_UDP)

    def _start_nodes(self, address: str) -> None:
        """Bootstrap nodes, each at a port of its own, that know the first."""
        entries: list[dict[str, object]] = []
        for number in range(NODES):
            port = PORT + number
            home = self.directory / f"node{number}"
            home.mkdir()
            known = "".join(
                f'{{ public_key = "{entry["public_key"]}" port = {PORT} address = "{address}" }}'
                for entry in entries[:1]
            )
            (home / "conf").write_text(
                f'port = {port}\nkeys_file_path = "{home}/keys"\npid_file_path = "{home}/pid"\n'
                "enable_ipv6 = false\nenable_ipv4_fallback = true\nenable_lan_discovery = true\n"
                f"enable_tcp_relay = true\ntcp_relay_ports = [{port}]\nenable_motd = false\n"
                f"bootstrap_nodes = ({known})\n"
            )
            node = self.start(
                NODE,
                "tox-bootstrapd",
                "--foreground",
                "--log-backend=stdout",
                f"--config={home}/conf",
                log=home / "log",
            )
            key = re.search("Public Key: ([0-9A-F]{64})", node.says("Public Key: ", seconds=20))
            assert key
            entries.append(
                {
                    "ipv4": address,
                    "ipv6": "-",
                    "port": port,
                    "tcp_ports": [port],
                    "public_key": key[1],
                }
            )
        self.nodes.write_text(json.dumps({"nodes": entries}))

    def command(self, host: str, *arguments: str) -> list[str]:
        return ["ip", "netns", "exec", self.names[host], *arguments]

    def start(
        self, host: str, *arguments: str, log: Path | None = None, stdin: int = subprocess.DEVNULL,
        stdout: int | None = None, environment: dict[str, str] | None = None,
    ) -> Program:  # fmt: skip
        log = log or self.directory / f"{len(self.programs)}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                self.command(host, *arguments), stdin=stdin, stdout=stdout or file, stderr=file,
                env={**os.environ, **netns.environment(), **(environment or {})},
            )  # fmt: skip
        program = Program(process, log)
        self.programs.append(program)
        return program

    def run(self, host: str, *arguments: str, timeout: float = 120) -> str:
        return subprocess.run(
            self.command(host, *arguments), capture_output=True, text=True, check=True,
            timeout=timeout, env={**os.environ, **netns.environment()},
        ).stdout  # fmt: skip

    def tox(self, host: str, *options: str, **how: Any) -> Program:
        """Start ``ttun tox``."""
        arguments = ["tox", "-b", str(self.nodes), *options]
        if how or not forked.can(forked.TTUN):
            return self.start(host, *tunnel.PROGRAM, *arguments, **how)
        log = self.directory / f"{len(self.programs)}.log"
        with log.open("wb") as file:
            name = self.names[host]
            process = forked.start(forked.TTUN, arguments, file, namespace=name)
        self.programs.append(Program(process, log))
        return self.programs[-1]

    def serve(self, *options: str, **how: Any) -> tuple[Program, str]:
        """Start a server; return it and its Tox ID."""
        server = self.tox(SERVER, *options, **how)
        text = server.says("Using Tox ID: ", seconds=20)
        found = re.search(r"Using Tox ID: ([0-9A-F]{76})", text)
        assert found
        return server, found[1]

    def enter(self, host: str) -> None:
        """Have this thread be on a host from now on."""
        tunnel.enter_namespace(self.names[host])

    def on(self, host: str, function: Callable[[], T]) -> T:
        """Call function on a thread that is on a host: sockets made there belong to that host."""
        return tunnel.in_namespace(self.names[host], function)

    def connect(self, port: int, host: str = CLIENT) -> socket.socket:
        """Connect to a port of the loopback on a host."""
        return self.on(host, lambda: socket.create_connection(("127.0.0.1", port), 30))

    def listen(self, host: str, port: int = 0) -> socket.socket:
        """Listen on the loopback of a host."""
        return self.on(host, lambda: socket.create_server(("127.0.0.1", port), backlog=512))

    def identity(self, directory: Path) -> str:
        """Make an identity before anybody uses it; its Tox ID."""
        code = (
            "import pathlib, sys; from ttun.tox import instance;"
            "tox = instance.Tox(udp_ports=None); directory = pathlib.Path(sys.argv[1]);"
            "directory.mkdir(); instance.keep(tox, directory, None);"
            "print(tox.address().hex().upper())"
        )
        return self.run(NODE, sys.executable, "-c", code, str(directory)).strip()

    def echo(self, port: int) -> None:
        """Echo on the server's host: each connection until it ends its half."""
        listener = self.listen(SERVER, port)

        def serve(sock: socket.socket) -> None:
            with sock, contextlib.suppress(OSError):
                while data := sock.recv(65536):
                    sock.sendall(data)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    sock, _ = listener.accept()
                    threading.Thread(target=serve, args=(sock,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
