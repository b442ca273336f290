"""What a Tox server does where descriptors run out, and where nobody answers for names."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from toxlab import CLIENT, FLAT, NODE, SERVER, Lab
from tunnel import PROGRAM, eventually

pytestmark = [pytest.mark.hosts, pytest.mark.tox, pytest.mark.slow]

ECHO, TO_ECHO = 7001, 2001
ALONE = ("-t", "0")
DESCRIPTORS = 40
AT_ONCE = 60


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with Lab(tmp_path) as made:
        yield made


def echo(lab: Lab) -> bytes:
    """What comes back of a byte: nothing, where the connection is closed instead."""
    with lab.connect(TO_ECHO) as sock, contextlib.suppress(ConnectionError):
        sock.settimeout(30)
        sock.sendall(b"x")
        return sock.recv(1)
    return b""


def test_a_server_without_descriptors_refuses_and_goes_on(lab: Lab, tmp_path: Path) -> None:
    lab.echo(ECHO)
    few = ("prlimit", f"--nofile={DESCRIPTORS}:{DESCRIPTORS}", "--")
    nodes = ("-b", str(lab.nodes))
    server = lab.start(SERVER, *few, *PROGRAM, "tox", *nodes, *ALONE, "-C", str(tmp_path / "id"))
    found = re.search("Using Tox ID: ([0-9A-F]{76})", server.says("Using Tox ID: "))
    assert found
    client = lab.tox(CLIENT, *ALONE, "-i", found[1], f"-L{TO_ECHO}:127.0.0.1:{ECHO}")
    client.says("connected over")
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(lab.connect(TO_ECHO)) for _ in range(AT_ONCE)]
        answers = []
        for sock in socks:
            sock.settimeout(30)
            with contextlib.suppress(ConnectionError):
                sock.sendall(b"x")
                answers.append(sock.recv(1))
        assert 0 < answers.count(b"x") < DESCRIPTORS
        client.says("the server has too many connections")
    eventually(lambda: echo(lab) == b"x", "it serves again")
    assert server.stop() == 0
    assert "Traceback" not in server.log()


@pytest.mark.parametrize(("hard", "wanted"), [(10_000, 8192), (2000, 2000)])
def test_every_connection_may_have_its_descriptor(lab: Lab, hard: int, wanted: int) -> None:
    usual = ("prlimit", f"--nofile=1024:{hard}", "--")
    server = lab.start(SERVER, *usual, *PROGRAM, "tox", "-b", str(lab.nodes), *ALONE)
    server.says("Using Tox ID: ")
    limits = Path(f"/proc/{server.process.pid}/limits").read_text()
    assert limits.split("Max open files")[1].split()[:2] == [str(wanted), str(hard)]


def test_a_name_server_that_is_silent_holds_up_nothing(lab: Lab, tmp_path: Path) -> None:
    with lab.on(NODE, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as silent:
        silent.bind((f"{FLAT}.3", 53))
        (tmp_path / "resolv.conf").write_text(f"nameserver {FLAT}.3\n")
        node = json.loads(lab.nodes.read_text())["nodes"][0]
        nodes = tmp_path / "names.json"
        nodes.write_text(json.dumps({"nodes": [{**node, "ipv4": "node.example"}]}))
        mount = f"mount --bind {tmp_path}/resolv.conf /etc/resolv.conf"
        server = lab.start(
            SERVER, "sh", "-c", f'{mount} && exec "$@"', "sh", *PROGRAM, "tox", *ALONE,
            "-b", str(nodes), "-C", str(tmp_path / "id"),
        )  # fmt: skip
        server.says("Using Tox ID: ")
        silent.settimeout(20)
        silent.recv(512)
        started = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - started < 5
