"""rtnetlink: message parsing, and the answer to a request that fails."""

from __future__ import annotations

import random
import struct
import time

import pytest
from tunnel import SERVER, in_namespace

from ttun.lab.netns import Hosts
from ttun.network import netlink
from ttun.network.netlink import Message, Netlink, Request


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
def test_a_question_that_cannot_be_answered_gives_its_reason(pair: Hosts) -> None:
    link = in_namespace(pair.names[SERVER], Netlink)
    try:
        link.ask(Request(netlink.GET_LINK, 0, netlink.LINK.pack(0, 0, 99999, 0, 0)))
        (answer,) = heard(link)
        assert (answer.kind, answer.fields) == (netlink.NLMSG_ERROR, (19,))  # ENODEV
    finally:
        link.close()
