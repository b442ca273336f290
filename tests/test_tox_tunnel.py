"""End to end: the tunnel itself through Tox, and Tox from behind NAT, over UDP and without it.

Behind NAT the server's host runs ``ttun server --tox`` where UDP works, and a plain ``ttun tox``
beside an ordinary ``ttun server`` where only a TCP relay is left.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import toxlab
from machine import IS_NOBODY_HERE
from toxlab import CLIENT, SERVER, Lab, Program
from tunnel import PROGRAM, eventually

from ttun.lab import netns

pytestmark = [pytest.mark.hosts, pytest.mark.tox, pytest.mark.slow, pytest.mark.together]

MIB = 1 << 20
ECHO, TO_ECHO = 7001, 2001
ALONE = ("-t", "0")


def tunnel(lab: Lab, directory: Path, *more: str) -> tuple[Program, Program, str]:
    """Both ends of a tunnel: ``server --tox`` and its client; the server's address.

    more: options of the client.
    """
    options = ("-k", "key", "--tox-nodes", str(lab.nodes))
    home = ("--tox-dir", str(directory / "identity"))
    server = lab.start(SERVER, *PROGRAM, "server", "--tox", *home, *options)
    found = re.search("listening on (tox:[0-9A-F]{76})", server.says("listening on tox:"))
    assert found
    client = lab.start(CLIENT, *PROGRAM, "client", "-s", found[1], *options, *more)
    return server, client, found[1]


def traffic(lab: Lab, *arguments: str) -> object:
    command = netns.python("ttun.lab.traffic", *arguments)
    return json.loads(lab.run(CLIENT, *command, timeout=200))


def ping(lab: Lab, times: int) -> int:
    results = traffic(lab, "ping", "10.1.1.1", str(times), "56")
    assert isinstance(results, list)
    return sum(seconds is not None for seconds in results)


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Lab, Program, Program]]:
    directory = tmp_path_factory.mktemp("tox")
    with Lab(directory) as lab:
        server, client, address = tunnel(lab, directory)
        other = lab.tox(
            CLIENT, *ALONE, "-i", address.partition(":")[2], f"-L{TO_ECHO}:127.0.0.1:{ECHO}"
        )
        client.says("authenticated")
        other.says("connected over")
        yield lab, server, client


def test_ping_through_the_tunnel(flat: tuple[Lab, Program, Program]) -> None:
    lab, server, client = flat
    assert ping(lab, 10) == 10
    for program in (server, client):
        assert "over tox; handshaking" in program.log()
    assert "on the client: ttun client -s tox:" in server.log()


def test_fifty_mebibytes_each_way_arrive_whole(flat: tuple[Lab, Program, Program]) -> None:
    lab, _, _ = flat
    lab.start(SERVER, *netns.python("ttun.lab.traffic", "serve", "10.1.1.1", "5001"))
    listening = "import socket, sys; socket.create_connection(('10.1.1.1', 5001), 1)"

    def is_listening() -> bool:
        try:
            lab.run(CLIENT, sys.executable, "-c", listening)
        except Exception:
            return False
        return True

    eventually(is_listening, "the other end of the transfer")
    for way in ("send", "receive"):
        result = traffic(lab, way, "10.1.1.1", "5001", str(50 * MIB))
        assert isinstance(result, dict)
        assert result["whole"], way


def test_no_other_target_is_served(flat: tuple[Lab, Program, Program]) -> None:
    lab, server, _ = flat
    lab.echo(ECHO)
    with lab.connect(TO_ECHO) as sock:
        sock.settimeout(20)
        assert sock.recv(1) == b""
    server.says(f"127.0.0.1:{ECHO}: the server's rules do not allow this target")


def test_the_tunnel_ends_and_comes_back(flat: tuple[Lab, Program, Program]) -> None:
    lab, server, client = flat
    assert client.stop() == 0
    server.says("disconnected", seconds=60)
    address = re.search("listening on (tox:[0-9A-F]{76})", server.log())
    assert address
    again = lab.start(
        CLIENT, *PROGRAM, "client", "-s", address[1], "-k", "key", "--tox-nodes", str(lab.nodes)
    )
    again.says("authenticated")
    eventually(lambda: ping(lab, 3) == 3, "pings are answered")  # some late, beside other tests
    assert server.stop() == again.stop() == 0
    for program in (server, client, again):
        assert "Traceback" not in program.log()


@pytest.fixture(scope="module")
def behind_nat(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Lab, Lab]]:
    """Two networks with both hosts behind NAT: one as it is, one without UDP."""
    missing = toxlab.no_nat()
    if missing:
        pytest.skip(missing)
    directories = [tmp_path_factory.mktemp(name) for name in ("udp", "relay")]
    with contextlib.ExitStack() as stack:
        open_lab, strict = (
            stack.enter_context(Lab(directory, nat=True)) for directory in directories
        )
        strict.drop_udp()
        open_lab.echo(ECHO)
        strict.echo(ECHO)
        _, inside, address = tunnel(open_lab, directories[0])
        plain, plain_id = open_lab.serve(*ALONE)
        forward = f"-L{TO_ECHO}:127.0.0.1:{ECHO}"
        over_udp = open_lab.tox(CLIENT, *ALONE, "-i", plain_id, forward)

        relayed, relayed_id = strict.serve(*ALONE)
        over_relay = strict.tox(CLIENT, *ALONE, "-i", relayed_id, forward)
        key = ("-k", "key")
        strict.start(SERVER, *PROGRAM, "server", *key, "-l", "127.0.0.1:20203")
        nodes = ("--tox-nodes", str(strict.nodes))
        ordinary = strict.start(CLIENT, *PROGRAM, "client", *key, "-s", f"tox:{relayed_id}", *nodes)
        for program in (inside, ordinary):
            program.says("authenticated", seconds=120)
        for program in (over_udp, over_relay):
            program.says("connected over", seconds=120)
        assert address
        assert plain.process.poll() is None
        assert relayed.process.poll() is None
        yield open_lab, strict


def echo(lab: Lab, data: bytes) -> bytes:
    with lab.connect(TO_ECHO) as sock, ThreadPoolExecutor(1) as pool:
        sock.settimeout(100)
        sending = pool.submit(sock.sendall, data)
        received = bytearray()
        while len(received) < len(data):
            more = sock.recv(65536)
            assert more, "closed"
            received += more
        sending.result()
    return bytes(received)


def test_behind_nat_over_udp(behind_nat: tuple[Lab, Lab]) -> None:
    lab, _ = behind_nat
    data = bytes(range(256)) * 2000
    assert echo(lab, data) == data
    assert ping(lab, 5) == 5


def test_behind_nat_without_udp(behind_nat: tuple[Lab, Lab]) -> None:
    _, lab = behind_nat
    data = bytes(range(256)) * 200
    assert echo(lab, data) == data
    assert ping(lab, 5) == 5
    for program in lab.programs:
        assert "over UDP" not in program.log()


@pytest.mark.skipif(not IS_NOBODY_HERE, reason="no other user in this user namespace")
@pytest.mark.skipif(bool(toxlab.no_nat()), reason=toxlab.no_nat())
def test_tox_stays_outside_of_the_default_route(tmp_path: Path) -> None:
    """toxcore opens its sockets as the user whose packets stay outside, also after an outage."""
    user, node = "4711", "203.0.113.1"
    with Lab(tmp_path, nat=True) as lab:
        server, client, _ = tunnel(lab, tmp_path, "--route", "default", "--user", user)
        client.says("authenticated", seconds=120)
        assert ping(lab, 3) == 3
        for uid, device in ((user, f"to-{toxlab.NAT[CLIENT]}"), ("0", "ttun0")):
            way = lab.run(CLIENT, "ip", "-json", "route", "get", node, "uid", uid)
            assert json.loads(way)[0]["dev"] == device
        inodes = {fields[9]: fields[7] for fields in map(str.split, sockets(client))}
        toxcores = {inodes[each] for each in opened(client) if each in inodes}
        assert toxcores == {user}
        assert server.stop() == 0
        client.says("disconnected", seconds=60)
        assert client.stop() == 0
        assert "203" not in lab.run(CLIENT, "ip", "rule")


def sockets(program: Program) -> list[str]:
    found = []
    for table in ("udp", "udp6", "tcp", "tcp6"):
        text = Path(f"/proc/{program.process.pid}/net/{table}").read_text()
        found += text.splitlines()[1:]
    return found


def opened(program: Program) -> list[str]:
    links = [os.readlink(each) for each in Path(f"/proc/{program.process.pid}/fd").iterdir()]
    return [each[8:-1] for each in links if each.startswith("socket:")]
