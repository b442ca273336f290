"""The network between two ends of a Tox session fails for a while, or for UDP alone."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import toxlab
from toxlab import CLIENT, NODE, Lab, Program
from toxnet import exchange
from tunnel import eventually

from ttun.lab import netns

pytestmark = [pytest.mark.hosts, pytest.mark.tox, pytest.mark.slow]

ECHO, FIRST = 7001, 2001
# toxcore sends a ping of its own every 9 s, and ends a connection 32 s after the last one that came
# (friend_connection.h, and its clock has whole seconds).
PING = 9.0
OUTAGE = 23.0
SHARING = 6.0  # seconds until both ends know a relay in common
REFUSE_UDP = """
add table inet outage
add chain inet outage in { type filter hook input priority 0; }
add chain inet outage out { type filter hook output priority 0; }
add rule inet outage in meta l4proto udp drop
add rule inet outage out meta l4proto udp drop"""


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with Lab(tmp_path) as made:
        made.echo(ECHO)
        yield made


def connect(lab: Lab, count: int) -> tuple[list[Program], list[socket.socket]]:
    """As many clients, and a connection through each, over UDP."""

    def is_over_udp(client: Program) -> bool:
        return any(f"{word} over UDP" in client.log() for word in ("connected", "now"))

    _, server_id = lab.serve("-t", "0", "-s", "x", "-C", str(lab.directory / "server"))
    ports = range(FIRST, FIRST + count)
    to_server = ("-t", "0", "-s", "x", "-i", server_id)
    clients = [lab.tox(CLIENT, *to_server, f"-L{port}:127.0.0.1:{ECHO}") for port in ports]
    for client in clients:
        eventually(lambda client=client: is_over_udp(client), "it is connected over UDP", 90)
    socks = [lab.connect(port) for port in ports]
    for sock in socks:
        assert exchange(sock, b"before") == b"before"
    return clients, socks


def lives(sock: socket.socket) -> bool:
    with sock:
        try:
            return exchange(sock, b"and after") == b"and after"
        except OSError:
            return False


def seconds_used(program: Program) -> float:
    """The time that a program has had a processor (proc(5), stat)."""
    fields = Path(f"/proc/{program.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_connection_outlives_an_outage_that_toxcore_outlives(lab: Lab) -> None:
    _, (sock,) = connect(lab, 1)
    time.sleep(PING + 1)  # so both have just heard one
    cable = ("-n", lab.names[NODE], "link", "set", f"to-{CLIENT}")
    netns.ip(*cable, "down")
    time.sleep(OUTAGE)
    netns.ip(*cable, "up")
    assert lives(sock)


@pytest.mark.skipif(bool(toxlab.no_nat()), reason=toxlab.no_nat())
def test_a_connection_goes_on_over_a_relay_where_udp_is_refused_meanwhile(lab: Lab) -> None:
    """By the client's own firewall: each packet is an error at once, and may be tried at once.

    One in three may be lost: it is toxcore that has to find a relay in time.
    """
    clients, socks = connect(lab, 3)
    time.sleep(SHARING)
    before = [seconds_used(client) for client in clients]
    lab.run(CLIENT, "nft", REFUSE_UDP)
    time.sleep(7)
    used = [seconds_used(client) - was for client, was in zip(clients, before)]
    assert max(used) < 0.7, "it does not try all the time"
    assert sum(lives(sock) for sock in socks) >= 2
