"""What the tests of forwarding share: a Tox network, and all programs on it, started together.

Finding each other takes about ten seconds.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, TypeVar

from toxlab import CLIENT, FLAT, NODE, SERVER, Lab, Program

from ttun.tox.loop import Loop

SECRET = "a shared secret that no log may show"
# Ports on the server's host; nobody listens on CLOSED.
ECHO, CLOSED, MANUAL, CUT = 7001, 7002, 7003, 7004
TO_ECHO, TO_CLOSED, TO_MANUAL, TO_NAME, SOCKS = 2001, 2002, 2003, 2004, 1080
BY_RULE, NO_RULE = 2005, 2006
REBORN = 2007
PROXY_PORTS = {"socks5": 9050, "http": 3128}  # on the node's host
T = TypeVar("T")
ALONE = ("-t", "0")  # no relay of our own: one less thing that two programs could share


@dataclass
class Net:
    """What runs, and who is who."""

    lab: Lab
    server: Program
    server_id: str
    client: Program
    uninvited: Program
    ruled: Program
    allowed: Program
    unlisted: Program
    pipe: Program
    full: Program
    unreadable: Program
    cut: Program
    to_cut: socket.socket
    pinger: Program
    proxied: list[Program]
    proxies: list[Program]
    reborn: list[Program]
    reborn_client: Program
    identities: Path


@contextlib.contextmanager
def start(directory: Path) -> Iterator[Net]:
    """Start all of it; it is there when the programs that are used first have found each other."""
    shared = {"TUNTOX_SHARED_SECRET": SECRET}
    with Lab(directory) as lab:
        lab.echo(ECHO)
        home = directory / "server"
        server, server_id = lab.serve(*ALONE, "-C", str(home), "-d", environment=shared)
        to_server = (*ALONE, "-i", server_id)
        forwards = {
            TO_ECHO: f"localhost:{ECHO}",
            TO_CLOSED: f"127.0.0.1:{CLOSED}",
            TO_MANUAL: f"127.0.0.1:{MANUAL}",
            TO_NAME: "no-such-name.invalid:80",
        }
        options = [f"-L{port}:{target}" for port, target in forwards.items()]
        client = lab.tox(CLIENT, *to_server, *options, "-D", str(SOCKS), environment=shared)
        uninvited = lab.tox(CLIENT, *to_server, "-p", "-s", "wrong")

        (directory / "rules").write_text(f"127.0.0.1:{ECHO}\n")
        member = lab.identity(directory / "member")
        rules = ("-C", str(directory / "ruled"), "-f", str(directory / "rules"), "-i", member)
        ruled, ruled_id = lab.serve(*ALONE, *rules)
        both = (f"-L{BY_RULE}:127.0.0.1:{ECHO}", f"-L{NO_RULE}:127.0.0.1:{CLOSED}")
        to_ruled = (*ALONE, "-i", ruled_id)
        allowed = lab.tox(CLIENT, *to_ruled, "-C", str(directory / "member"), *both)
        unlisted = lab.tox(CLIENT, *to_ruled, "-p")

        to_cut = lab.listen(SERVER, CUT)
        with open("/dev/full", "wb") as full_disk:
            pipe, full, cut = (
                lab.tox(
                    CLIENT, *to_server, "-W", f"127.0.0.1:{port}", environment=shared,
                    stdin=subprocess.PIPE, stdout=stdout,
                )
                for port, stdout in (
                    (ECHO, subprocess.PIPE), (ECHO, full_disk.fileno()), (CUT, subprocess.PIPE)
                )
            )  # fmt: skip
        write_only = os.open(os.devnull, os.O_WRONLY)
        unreadable = lab.tox(
            CLIENT, *to_server, "-W", f"127.0.0.1:{ECHO}", environment=shared, stdin=write_only,
            stdout=subprocess.PIPE,
        )  # fmt: skip
        os.close(write_only)
        pinger = lab.tox(CLIENT, *to_server, "-p", environment=shared)
        script = str(Path(__file__).with_name("proxy.py"))
        proxies = [
            lab.start(NODE, sys.executable, script, kind, str(port))
            for kind, port in PROXY_PORTS.items()
        ]
        proxied = [
            lab.tox(
                CLIENT, *to_server, "-p",
                environment={**shared, "ALL_PROXY": f"{kind}://{FLAT}.3:{port}"},
            )
            for kind, port in PROXY_PORTS.items()
        ]  # fmt: skip
        again = (*ALONE, "-C", str(directory / "reborn"))
        first, reborn_id = lab.serve(*again)
        reborn_client = lab.tox(CLIENT, *ALONE, "-i", reborn_id, f"-L{REBORN}:127.0.0.1:{ECHO}")
        reborn = [first]

        def kill_and_start_again() -> None:
            reborn_client.says("connected over")
            with contextlib.closing(lab.connect(REBORN)) as sock:
                assert exchange(sock, b"first") == b"first"
            first.process.kill()
            reborn.append(lab.serve(*again)[0])

        restart = threading.Thread(target=kill_and_start_again)
        restart.start()
        client.says("connected over")
        allowed.says("connected over")
        restart.join()
        yield Net(
            lab, server, server_id, client, uninvited, ruled, allowed, unlisted, pipe, full,
            unreadable, cut, to_cut, pinger, proxied, proxies, reborn, reborn_client, directory,
        )  # fmt: skip


def exchange(sock: socket.socket, data: bytes) -> bytes:
    sock.settimeout(30)
    sock.sendall(data)
    return receive(sock, len(data))


def receive(sock: socket.socket, size: int) -> bytes:
    """Exactly size bytes, or what came until the end."""
    received = bytearray()
    while len(received) < size:
        data = sock.recv(size - len(received))
        if not data:
            break
        received += data
    return bytes(received)


def is_closed(sock: socket.socket, seconds: float = 20) -> bool:
    """Whether the other end closes or resets within some seconds, without a byte."""
    sock.settimeout(seconds)
    try:
        return sock.recv(1) == b""
    except ConnectionError:
        return True
    except TimeoutError:
        return False


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def socks(net: Net, request: bytes) -> tuple[socket.socket, bytes]:
    sock = net.lab.connect(SOCKS)
    sock.settimeout(40)
    sock.sendall(b"\5\1\0" + request)
    assert receive(sock, 2) == b"\5\0"
    return sock, receive(sock, 10)


def on_loop(loop: Loop, function: Callable[[], T]) -> T:
    """Call function on a loop's thread; what it returns."""
    results: queue.SimpleQueue[T] = queue.SimpleQueue()
    loop.call(lambda: results.put(function()))
    return results.get(timeout=20)
