"""A host between the two: what goes from one to the other has to go through a proxy there."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tunnel import CLIENT, SERVER, Bench, Program, eventually

from ttun.lab.netns import LinkEnd, Namespaces

PROXY = "proxy"
NEAR, FAR = "192.0.2.1", "198.51.100.1"  # of the host between them
NEAR6 = "2001:db8:1::1"
ADDRESS = {CLIENT: "192.0.2.2", SERVER: "198.51.100.2"}
SERVER6 = "2001:db8:2::2"
NAME = "vpn.test"  # of the server, where the proxy is
USER, PASSWORD = "me", "very.Secret-1"  # tinyproxy takes no other signs
LOGIN = "me:very%2ESecret%2d1"


class Chain(Namespaces):
    """The client's host, one with a proxy, the server's host. Nothing is routed between them."""

    def __init__(self) -> None:
        super().__init__(SERVER, PROXY, CLIENT)
        self.links = {CLIENT: "near", SERVER: "far"}

    def _join(self) -> None:
        near, near6, far, far6 = "192.0.2.", "2001:db8:1::", "198.51.100.", "2001:db8:2::"
        self.link(
            LinkEnd(CLIENT, "near", [f"{near}2/24", f"{near6}2/64"]),
            LinkEnd(PROXY, "near", [f"{near}1/24", f"{near6}1/64"]),
        )
        self.link(
            LinkEnd(SERVER, "far", [f"{far}2/24", f"{far6}2/64"]),
            LinkEnd(PROXY, "far", [f"{far}1/24", f"{far6}1/64"]),
        )


def needs(program: str, package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        not shutil.which(program), reason=f"{program} is missing: apt install {package}"
    )


def start(bench: Bench, tmp_path: Path, command: str, port: int) -> Program:
    """Start a proxy that knows the server's name, and wait until it listens."""
    hosts = tmp_path / "hosts"
    hosts.write_text(f"127.0.0.1 localhost\n{ADDRESS[SERVER]} {NAME}\n")
    script = f"mount --bind {shlex.quote(str(hosts))} /etc/hosts && exec {command}"
    log = tmp_path / f"proxy-{time.monotonic_ns()}.log"
    with log.open("w") as file:
        process = bench.pair.start(
            PROXY, ["unshare", "--mount", "sh", "-c", script], stdout=file, stderr=file
        )
    made = Program(process, log)
    bench.ends.append(made)  # type: ignore[arg-type]
    eventually(lambda: is_open(bench, port), f"{command} listens")
    return made


def is_open(bench: Bench, port: int) -> bool:
    with contextlib.suppress(OSError):
        bench.on(CLIENT, lambda: socket.create_connection((NEAR, port), 2)).close()
        return True
    return False


def tinyproxy(bench: Bench, tmp_path: Path, *lines: str) -> Program:
    config = tmp_path / "tinyproxy.conf"
    config.write_text("\n".join(["Port 8888", "Timeout 600", "MaxClients 20", *lines, ""]))
    return start(bench, tmp_path, f"tinyproxy -d -c {config}", 8888)


def microsocks(bench: Bench, tmp_path: Path, *options: str) -> Program:
    return start(bench, tmp_path, shlex.join(["microsocks", "-i", "::", *options]), 1080)


def dante(bench: Bench, tmp_path: Path) -> Program:
    config = tmp_path / "danted.conf"
    config.write_text(
        f"logoutput: stderr\ninternal: {NEAR} port = 1080\nexternal: {FAR}\n"
        "clientmethod: none\nsocksmethod: none\nuser.unprivileged: nobody\n"
        "client pass { from: 0.0.0.0/0 to: 0.0.0.0/0 }\n"
        "socks pass { from: 0.0.0.0/0 to: 0.0.0.0/0 }\n"
    )
    return start(bench, tmp_path, f"danted -f {config} -p {tmp_path}/danted.pid", 1080)


Script = Callable[[socket.socket], object]


@contextlib.contextmanager
def scripted(bench: Bench, script: Script, port: int = 3128) -> Iterator[list[socket.socket]]:
    """A proxy that does what a test says with each connection; yields those that came."""
    listener = bench.on(PROXY, lambda: socket.create_server(("", port)))
    taken: list[socket.socket] = []
    over = threading.Event()

    def serve() -> None:
        listener.settimeout(0.1)
        while not over.is_set():
            with contextlib.suppress(TimeoutError):
                sock, _ = listener.accept()
                sock.settimeout(20)
                taken.append(sock)
                threading.Thread(target=run, args=(sock,), daemon=True).start()

    def run(sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            script(sock)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield taken
    finally:
        over.set()
        thread.join()
        listener.close()
        for sock in taken:
            sock.close()


def says(*parts: bytes, close: bool = False) -> Script:
    """Answer a request, piece by piece, and hang up or wait."""

    def script(sock: socket.socket) -> None:
        for part in parts:
            sock.recv(65536)
            sock.sendall(part)
        if close:
            sock.close()
        else:
            sock.recv(1)

    return script


def relay(one: socket.socket, other: socket.socket) -> None:
    """Copy both ways until one of them ends."""
    back = threading.Thread(target=copy, args=(other, one), daemon=True)
    back.start()
    copy(one, other)


def copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        source.settimeout(None)
        while data := source.recv(65536):
            target.sendall(data)
