"""rtnetlink: message parsing, and the socket filter."""

from __future__ import annotations

import ipaddress
import random
import socket
import struct
import time
from collections.abc import Iterator

import pytest
from tunnel import SERVER, in_namespace

from ttun.lab import netns
from ttun.lab.netns import Hosts
from ttun.network import netlink
from ttun.network.netlink import Message, Netlink, Request
from ttun.watch.device_state import address_of


def test_what_is_cut_off_or_made_up_is_left_out() -> None:
    body = netlink.LINK.pack(0, 65534, 7, 1, 0) + netlink.attribute(netlink.IFLA_IFNAME, b"ttun0\0")
    whole = netlink.HEADER.pack(16 + len(body), netlink.NEW_LINK, 0, 5, 9) + body
    (message,) = netlink.messages(whole)
    assert (message.kind, message.sequence, message.port) == (netlink.NEW_LINK, 5, 9)
    assert netlink.index_of(message) == 7
    assert message.attributes[netlink.IFLA_IFNAME] == b"ttun0\0"
    assert [len(list(netlink.messages(whole[:size]))) for size in range(len(whole))] == [0] * len(
        whole
    )
    assert len(list(netlink.messages(whole * 3))) == 3
    dice = random.Random(1)
    for _ in range(2000):
        made_up = bytearray(whole * 2)
        for _ in range(dice.choice([1, 2, 9])):
            made_up[dice.randrange(len(made_up))] = dice.choice([0, 1, 255, dice.randrange(256)])
        for message in netlink.messages(bytes(made_up)):
            netlink.next_hops(message)
    nested = netlink.ATTRIBUTE.pack(6, 3 | 0x8000) + b"xy" + bytes(2) + netlink.ATTRIBUTE.pack(3, 4)
    assert netlink.attributes(nested) == {3: b"xy"}


def test_all_next_hops_of_a_route_are_found() -> None:
    def route(kind: int, value: bytes) -> Message:
        body = netlink.ROUTE.pack(2, 24, 0, 0, 254, 3, 0, 1, 0) + netlink.attribute(kind, value)
        (message,) = netlink.messages(
            netlink.HEADER.pack(16 + len(body), netlink.NEW_ROUTE, 0, 0, 0) + body
        )
        return message

    assert netlink.next_hops(route(netlink.RTA_OIF, struct.pack("=I", 300))) == [300]
    hops = netlink.NEXT_HOP.pack(16, 0, 0, 4) + netlink.attribute(5, bytes(4))
    hops += netlink.NEXT_HOP.pack(8, 0, 0, 5)
    assert netlink.next_hops(route(netlink.RTA_MULTIPATH, hops)) == [4, 5]
    assert netlink.next_hops(route(netlink.RTA_MULTIPATH, bytes(8))) == []


@pytest.fixture
def host(pair: Hosts) -> Iterator[str]:
    name = pair.names[SERVER]
    netns.ip("-n", name, "link", "add", "va", "type", "veth", "peer", "name", "vb")
    for device in ("va", "vb"):
        netns.ip("-n", name, "link", "set", device, "addrgenmode", "none", "up")
    yield name
    netns.ip("-n", name, "link", "delete", "va")


def heard(link: Netlink) -> list[Message]:
    """The pending messages, after a moment."""
    time.sleep(0.1)
    found = []
    while True:
        try:
            found += link.receive()
        except BlockingIOError:
            return found


@pytest.mark.hosts
def test_the_kernel_leaves_out_what_is_of_no_interest(host: str) -> None:
    """Each filter passes exactly the changes that it should."""

    def ip(*commands: str) -> None:
        for command in commands:
            netns.ip("-n", host, *command.split())

    routes = ["203.0.113.0/24", "10.0.0.0/20", "2001:db8:1::/48", "2001:db8::/33", "::/0"]
    link = in_namespace(host, Netlink)
    try:
        index = in_namespace(host, lambda: socket.if_nametoindex("va"))
        link.hear_only([index], [ipaddress.ip_network(route) for route in routes])
        link.join()
        heard(link)
        ip("link set vb mtu 1300", "address add 198.51.100.9/32 dev vb", "link set vb mtu 1500",
           "address add 2001:db8:99::1/128 dev vb nodad", "route add 203.0.113.0/25 dev vb",
           "route add 203.0.114.0/24 dev va", "route add 2001:db8:1:1::/64 dev va",
           "route add 2001:db9:1::/48 dev va", "route add 2001:db8:3::/48 dev vb",
           "route add 2001:db8:8000::/33 dev va")  # fmt: skip
        assert heard(link) == []
        for route in routes:
            ip(f"route add {route} dev vb")
            (added,) = heard(link)
            ip(f"route del {route} dev vb")
            (deleted,) = heard(link)
            assert (added.kind, deleted.kind) == (netlink.NEW_ROUTE, netlink.DEL_ROUTE), route
            length = ipaddress.ip_network(route).prefixlen
            assert added.fields[1] == deleted.fields[1] == length
        ip("link set va mtu 1300")
        assert {message.kind for message in heard(link)} == {netlink.NEW_LINK}
        for address in ("198.51.100.7/32", "2001:db8:98::1/128"):
            ip(f"address add {address} dev va", f"address del {address} dev va")
            packed = ipaddress.ip_interface(address).packed
            kinds = [x.kind for x in heard(link) if address_of(x) == packed]
            assert (kinds[0], kinds[-1]) == (netlink.NEW_ADDRESS, netlink.DEL_ADDRESS)
        for change, kind in (("add", netlink.NEW_RULE), ("del", netlink.DEL_RULE)):
            ip(f"rule {change} pref 77 from 198.51.100.5 lookup main")
            assert {message.kind for message in heard(link)} == {kind}
        # Answers are no changes, whatever they are about.
        everything = netlink.ADDRESS.pack(0, 0, 0, 0, 0)
        sequence = link.ask(Request(netlink.GET_ADDRESS, netlink.NLM_DUMP, everything))
        answers = heard(link)
        assert {answer.sequence for answer in answers} == {sequence}
        assert {netlink.index_of(x) for x in answers if x.kind == netlink.NEW_ADDRESS} - {index}
        link.leave()
        ip("link set va mtu 1500")
        assert heard(link) == []
    finally:
        link.close()


@pytest.mark.hosts
def test_a_question_that_cannot_be_answered_gives_its_reason(host: str) -> None:
    link = in_namespace(host, Netlink)
    try:
        link.ask(Request(netlink.GET_LINK, 0, netlink.LINK.pack(0, 0, 99999, 0, 0)))
        (answer,) = heard(link)
        assert (answer.kind, answer.fields) == (netlink.NLMSG_ERROR, (19,))  # ENODEV
    finally:
        link.close()
