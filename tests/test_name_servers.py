"""Name servers that are asked directly: what a response may be, and that none does harm."""

from __future__ import annotations

import os
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ttun.network import name_servers
from ttun.network.name_servers import AAAA, A, parse, query

NAME = "vpn.example"


def response(
    asked: bytes, *records: tuple[int, bytes], flags: int = 0x8180, group: int = 1
) -> bytes:
    """Answer a query with records, each a type and data, that belong to the name in it."""
    head = asked[:2] + struct.pack(">5H", flags, 1, len(records), 0, 0)
    made = (
        struct.pack(">3HIH", 0xC00C, kind, group, 60, len(data)) + data for kind, data in records
    )
    return head + asked[12:] + b"".join(made)


V4, V6 = socket.inet_aton("192.0.2.7"), socket.inet_pton(socket.AF_INET6, "2001:db8::7")


def test_a_response_gives_the_addresses_of_the_type_that_was_asked_for() -> None:
    asked = query(NAME, A)
    cname = (5, b"\x05other\x07example\x00")
    assert parse(asked, response(asked, cname, (A, V4), (AAAA, V6), (A, V4[::-1]))) == [
        "192.0.2.7", "7.2.0.192",
    ]  # fmt: skip
    asked = query(NAME, AAAA)
    assert parse(asked, response(asked, (A, V4), (AAAA, V6))) == ["2001:db8::7"]
    assert parse(asked, response(asked, flags=0x8183)) == []  # no such name


def test_a_response_to_something_else_is_none() -> None:
    asked = query(NAME, A)
    right = response(asked, (A, V4))
    other = query("vpn.example.net", A)
    for wrong in (
        b"", right[:11], asked,  # the query itself is no response
        bytes([right[0] ^ 1]) + right[1:],
        response(asked[:2] + other[2:], (A, V4)),
        response(asked[:2] + query(NAME, AAAA)[2:], (A, V4)),
        response(asked, (A, V4), flags=0x8182),  # the server failed
        response(asked, (A, V4), flags=0x8185),  # refused
    ):  # fmt: skip
        assert parse(asked, wrong) is None
    assert parse(asked, response(asked, (A, V4), group=3)) == []
    assert parse(asked, response(asked, (A, V4 + b"\0"))) == []
    assert parse(asked, response(asked, (A, V4), (A, V4))[:-1]) == ["192.0.2.7"]
    upper = asked[:2] + asked[2:].upper()
    assert parse(asked, response(upper, (A, V4))) == ["192.0.2.7"]


def test_no_response_is_more_than_addresses_or_takes_long() -> None:
    random.seed(5)
    asked = query(NAME, A)
    seed = response(asked, (5, b"\x01x\xc0\x0c"), (A, V4), (AAAA, V6), (A, V4))
    began = time.monotonic()
    for _ in range(20000):
        hostile = bytearray(seed)
        for _ in range(random.randrange(1, 8)):
            hostile[random.randrange(2, len(hostile))] = random.randrange(256)
        found = parse(asked, bytes(hostile[: random.randrange(len(hostile) + 1)]))
        assert found is None or all(socket.inet_aton(each) for each in found)
    endless = response(asked)[:6] + b"\xff\xff" + response(asked)[8:] + b"\xc0\x0c" * 2000
    assert parse(asked, endless) == []
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("name", ["", ".", "a..b", "x" * 64 + ".example", "a" * 70])
def test_what_cannot_be_a_name_has_no_address(name: str) -> None:
    assert name_servers.look_up(name, ["127.0.0.1"]) == []


# Addresses of this process: other tests run beside it.
NETWORK = f"127.{64 + (os.getpid() >> 8 & 63)}.{os.getpid() & 0xFF}"
BOTH = [f"{NETWORK}.1", f"{NETWORK}.2"]


class Server:
    """Sends the responses that it is given to each query, on a loopback address."""

    def __init__(self, address: str) -> None:
        self.responses: dict[int, list[tuple[int, bytes]]] = {}
        self.deaf = 0  # queries that get no response
        self.asked = 0
        self.junk: list[bytes] = []
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.bind((address, 53))
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def serve(self) -> None:
        while True:
            asked, client = self.sock.recvfrom(512)
            if not asked:
                self.sock.close()
                return
            self.asked += 1
            for junk in self.junk:
                self.sock.sendto(junk, client)
            kind = asked[-3]
            if self.asked > self.deaf and kind in self.responses:
                self.sock.sendto(response(asked, *self.responses[kind]), client)


@pytest.fixture
def servers() -> Iterator[list[Server]]:
    try:
        made = [Server(address) for address in BOTH]
    except PermissionError:
        pytest.skip("port 53 needs root")
    yield made
    for each in made:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"", each.sock.getsockname())
        each.thread.join(5)


def test_both_types_are_asked_for_and_one_server_is_enough(servers: list[Server]) -> None:
    servers[1].responses = {A: [(A, V4)], AAAA: [(AAAA, V6)]}
    assert name_servers.look_up(NAME, BOTH) == ["192.0.2.7", "2001:db8::7"]


def test_a_lost_query_is_repeated_and_junk_is_passed_over(servers: list[Server]) -> None:
    servers[0].responses, servers[0].deaf = {A: [(A, V4)], AAAA: []}, 2
    servers[1].junk = [b"", b"junk" * 400, bytes(12)]
    assert name_servers.look_up(NAME, BOTH) == ["192.0.2.7"]
    assert servers[0].asked >= 4


def test_a_name_without_an_address_is_known_when_all_have_said_so(servers: list[Server]) -> None:
    for each in servers:
        each.responses = {A: [], AAAA: []}
    began = time.monotonic()
    assert name_servers.look_up(NAME, BOTH) == []
    assert time.monotonic() - began < name_servers.PATIENCE


def test_servers_that_say_nothing_are_given_up(
    servers: list[Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(name_servers, "PATIENCE", 1.5)
    with pytest.raises(OSError, match="no response from name server 127"):
        name_servers.look_up(NAME, BOTH)


def test_files_say_which_servers_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    monkeypatch.setattr(name_servers, "RESOLV_CONF", first)
    monkeypatch.setattr(name_servers, "UPSTREAM", (tmp_path / "none", first, second))
    monkeypatch.setattr(name_servers, "HOSTS", first)
    second.write_text("nameserver 192.0.2.53 # ours\nnameserver fe80::1%lo\nnameserver\n")
    assert name_servers.local() == "127.0.0.1"  # resolv.conf(5): where there is none
    for text, local in (
        ("nameserver 127.0.0.53\noptions edns0\n", "127.0.0.53"),
        ("; nameserver 192.0.2.1\nnameserver ::1\n", "::1"),
        ("nameserver 127.0.0.53\nnameserver 192.0.2.1\n", None),
        ("nameserver 192.0.2.1\n", None),
    ):
        first.write_text(text)
        assert name_servers.local() == local
    first.write_text("127.0.0.1 localhost  VPN.example # vpn.example.net\n")
    assert name_servers.is_in_hosts("vpn.example")
    assert not name_servers.is_in_hosts("vpn.example.net")
    assert name_servers.upstream() == ["192.0.2.53", "fe80::1%lo"]


def test_on_openwrt_the_servers_of_the_provider_are_beside_the_file_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_use, provider = tmp_path / "tmp/resolv.conf", "tmp/resolv.conf.d/resolv.conf.auto"
    (tmp_path / provider).parent.mkdir(parents=True)
    (tmp_path / provider).write_text("# Interface wan\nnameserver 192.0.2.53\n")
    in_use.write_text("search lan\nnameserver 127.0.0.1\nnameserver ::1\n")
    etc = tmp_path / "resolv.conf"
    monkeypatch.setattr(name_servers, "RESOLV_CONF", etc)
    monkeypatch.setattr(name_servers, "UPSTREAM", (tmp_path / "none",))
    etc.write_text(in_use.read_text())
    assert name_servers.upstream() == [], "anybody could have written it"
    etc.unlink()
    etc.symlink_to("tmp/resolv.conf")
    assert name_servers.local() == "127.0.0.1"
    assert name_servers.upstream() == ["192.0.2.53"]
    assert name_servers.are_outside()
