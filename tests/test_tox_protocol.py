"""The Tuntox protocol without any I/O: two peers that hand each other packets."""

from __future__ import annotations

import random
import struct

import pytest
from multiplexers import carry, mux, original, pair, tunnel

from ttun.errors import ProtocolError
from ttun.tox import packet as packets
from ttun.tox import protocol
from ttun.tox.packet import (
    ACKTUNNEL,
    DENYTUNNEL,
    EOF,
    HELLO,
    MAX_DATA,
    PING,
    PONG,
    REQUESTTUNNEL,
    TCP,
    TCP_FIN,
    WINDOW,
    pack,
    unpack,
)
from ttun.tox.protocol import (
    FIRST_WINDOW,
    Closed,
    Data,
    Denied,
    Ended,
    Opened,
    Pong,
    Requested,
    Restarted,
)


@pytest.mark.parametrize(
    ("packet", "hexadecimal"),
    [
        (pack(PING, 0, b"Hello"), "a26b 0108 0000 0005 48656c6c6f"),
        (pack(PONG, 0, b"Hello"), "a26b 0100 0000 0005 48656c6c6f"),
        (pack(TCP, 0xBEEF, b"\0"), "a26b 0600 beef 0001 00"),
        (pack(TCP_FIN, 1), "a26b 0601 0001 0000"),
        (pack(HELLO, 0, b"\1\0"), "a26b 0120 0000 0002 0100"),
        (pack(DENYTUNNEL, 0, b"\0\0\0\7\1"), "a26b 0604 0000 0005 00000007 01"),
        (pack(WINDOW, 9, b"\0\4\0\0"), "a26b 0606 0009 0004 00040000"),
        (pack(EOF, 9), "a26b 0608 0009 0000"),
    ],
)
def test_packets_are_what_the_wire_has(packet: bytes, hexadecimal: str) -> None:
    assert packet == bytes.fromhex(hexadecimal)


def test_a_request_and_its_acknowledgement_on_the_wire() -> None:
    client, server = mux(server=False, first_id=0x01020303), mux(server=True, first_id=0xFFFE)
    client.control.clear()
    original(server)
    client.request("localhost", 8022, None)
    request = client.control.popleft()
    assert request == bytes.fromhex("a26b 0602 1f56 000d 01020304") + b"localhost"
    requested = server.receive(request)
    assert isinstance(requested, Requested)
    server.accept(requested.forward_id, None)
    assert server.control.popleft() == bytes.fromhex("a26b 0610 ffff 0004 01020304")


@pytest.mark.parametrize(
    ("packet", "said"),
    [
        (b"", "too short for a header"),
        (b"\xa2\x6b\x06\x00\x00\x01\x00", "too short for a header"),
        (pack(TCP, 1, b"abc")[:-1], "too short for 3 bytes of data"),
        (b"\xa2\x6a" + pack(TCP, 1)[2:], "version 1"),
        (b"\x00\x00" + pack(TCP, 1)[2:], "magic 0x0000"),
        (pack(0x0999), "unknown type 0x0999"),
        (pack(REQUESTTUNNEL, 22, b"\0\0\0"), "forward ID"),
        (pack(ACKTUNNEL, 22, b"\0\0\0"), "forward ID"),
        (pack(DENYTUNNEL, 0, b"\0\0\0\1"), "forward ID"),
        (pack(HELLO, 0, b""), "version"),
    ],
)
def test_what_is_not_to_be_understood_is_refused_and_changes_nothing(
    packet: bytes, said: str
) -> None:
    client, server = pair()
    ours, theirs = tunnel(client, server)
    with pytest.raises(ProtocolError, match=said):
        server.receive(packet)
    assert server.tunnels == {theirs.id: theirs}
    assert server.receive(client.data(ours, b"x")) == Data(theirs, b"x")


def test_random_packets_do_no_harm() -> None:
    client, server = pair()
    _, theirs = tunnel(client, server)
    chance = random.Random(5)
    kinds = [PING, PONG, HELLO, TCP, REQUESTTUNNEL, ACKTUNNEL, DENYTUNNEL, WINDOW]
    for _ in range(20_000):
        body = chance.randbytes(chance.choice([0, 1, 3, 4, 5, 9, 40]))
        packet = pack(chance.choice(kinds), chance.choice([0, 1, theirs.id, 65535]), body)
        packet = packet[: chance.choice([len(packet), len(packet) - 1])]
        try:
            event = server.receive(packet)
        except ProtocolError:
            continue
        if isinstance(event, Data):
            assert event.tunnel.id in server.tunnels
        if isinstance(event, Requested):
            server.deny(event.forward_id, packets.RULE)
        server.control.clear()
    assert not server.asked


def test_bytes_go_both_ways() -> None:
    client, server = pair()
    ours, theirs = tunnel(client, server)
    assert server.receive(client.data(ours, b"up")) == Data(theirs, b"up")
    assert client.receive(server.data(theirs, b"down")) == Data(ours, b"down")


def test_a_ping_is_answered_with_its_own_data() -> None:
    client, server = pair()
    client.ping(b"12345678")
    assert carry(client, server) == []
    assert carry(server, client) == [Pong(b"12345678")]


def test_a_flood_of_pings_is_not_answered_without_bound() -> None:
    _, server = pair()
    for _ in range(3 * protocol.MAX_CONTROL):
        server.receive(pack(PING, 0, b"x"))
    assert len(server.control) <= protocol.MAX_CONTROL


def test_half_a_connection_ends_and_the_other_half_goes_on() -> None:
    client, server = pair()
    ours, theirs = tunnel(client, server)
    client.end(ours)
    client.end(ours)
    assert carry(client, server) == [Ended(theirs)]
    assert client.receive(server.data(theirs, b"answer")) == Data(ours, b"answer")
    server.end(theirs)
    assert carry(server, client) == [Ended(ours)]
    client.forget(ours)
    server.forget(theirs)
    assert not client.control
    assert not server.control


def test_a_refusal_says_why_and_is_for_that_request_alone() -> None:
    client, server = pair()
    first, second = client.request("a", 1, "first"), client.request("b", 2, "second")
    carry(client, server)
    server.deny(second, packets.REFUSED)
    assert carry(server, client) == [Denied("second", packets.REFUSED)]
    server.deny(second, packets.REFUSED)
    assert not server.control
    assert server.accept(first, None) is not None
    assert isinstance(carry(server, client)[0], Opened)


def test_the_original_gets_nothing_that_it_does_not_know() -> None:
    server = mux(server=True)
    original(server)
    for forward_id in (1, 2):
        server.receive(pack(REQUESTTUNNEL, 22, struct.pack(">I", forward_id) + b"host"))
    theirs = server.accept(1, None)
    assert theirs is not None
    server.deny(2, packets.REFUSED)
    server.consumed(theirs, 10 * FIRST_WINDOW, now=1.0)
    server.end(theirs)
    kinds = [unpack(packet)[:2] for packet in server.control]
    refused = theirs.id + 1
    assert kinds == [
        (ACKTUNNEL, theirs.id),
        (ACKTUNNEL, refused),
        (TCP_FIN, refused),
        (TCP_FIN, theirs.id),
    ]
    assert not server.tunnels


def test_the_original_has_a_bounded_buffer() -> None:
    server = mux(server=True)
    original(server)
    server.receive(pack(REQUESTTUNNEL, 22, b"\0\0\0\1host"))
    theirs = server.accept(1, None)
    assert theirs is not None
    packet = pack(TCP, theirs.id, bytes(MAX_DATA))
    for _ in range(protocol.BUFFER // MAX_DATA):
        assert isinstance(server.receive(packet), Data)
    assert server.receive(packet) == Closed(theirs)


def test_a_forward_id_twice_opens_two_tunnels_one_after_the_other() -> None:
    """Tuntox's client uses the id of a -L again for its next connection."""
    server = mux(server=True)
    original(server)
    request = pack(REQUESTTUNNEL, 22, b"\0\0\0\1host")
    server.receive(request)
    first = server.accept(1, None)
    server.receive(request)
    second = server.accept(1, None)
    assert first is not None
    assert second is not None
    assert first.id != second.id


def test_nobody_reaches_a_tunnel_of_another_friend() -> None:
    client, server = pair()
    ours, theirs = tunnel(client, server)
    stranger_end = mux(server=True, first_id=7000)
    for kind in (TCP, WINDOW, EOF, TCP_FIN):
        assert stranger_end.receive(pack(kind, theirs.id, b"\0\0\0\1")) is None
    assert server.receive(client.data(ours, b"x")) == Data(theirs, b"x")


def test_a_client_is_not_asked_for_tunnels() -> None:
    client, _ = pair()
    with pytest.raises(ProtocolError, match="this is a client"):
        client.receive(pack(REQUESTTUNNEL, 22, b"\0\0\0\1host"))


def test_what_nobody_waits_for_any_more_is_closed_when_it_opens() -> None:
    client, server = pair()
    forward_id = client.request("host", 1, "impatient")
    client.cancel(forward_id)
    carry(client, server)
    theirs = server.accept(forward_id, None)
    assert carry(server, client) == []
    assert carry(client, server) == [Closed(theirs)]
    assert not client.tunnels
    assert not server.tunnels


def test_tunnels_are_bounded() -> None:
    client, server = pair()
    for _ in range(protocol.MAX_TUNNELS):
        tunnel(client, server)
    client.request("host", 1, "one too many")
    assert carry(client, server) == []
    assert carry(server, client) == [Denied("one too many", packets.FULL)]


def test_an_id_is_not_used_again_soon() -> None:
    client, server = pair()
    seen = set()
    for _ in range(2000):
        ours, theirs = tunnel(client, server)
        client.close(ours)
        assert carry(client, server) == [Closed(theirs)]
        assert ours.id not in seen
        seen.add(ours.id)


def test_a_peer_that_says_hello_again_has_lost_everything() -> None:
    client, server = pair()
    tunnel(client, server)
    reborn = mux(server=False, first_id=900)
    assert carry(reborn, server) == [Restarted()]
    assert not server.tunnels
    assert carry(server, reborn) == [], "it answers with its own HELLO, once"
    assert reborn.extended
    tunnel(reborn, server)


def test_hellos_that_cross_come_to_an_end() -> None:
    """The friend came, left and came again before the first answer: each HELLO caused another."""
    client = mux(server=False)
    servers = [mux(server=True, first_id=first_id) for first_id in (1000, 2000, 3000)]
    for server in servers[:-1]:
        carry(server, client)
    server = servers[-1]
    for _ in range(5):
        packets_ = list(client.control), list(server.control)
        client.control.clear()
        server.control.clear()
        for packet in packets_[0]:
            server.receive(packet)
        for packet in packets_[1]:
            client.receive(packet)
    assert not client.control
    assert not server.control
    assert client.extended
    assert server.extended
    tunnel(client, server)


@pytest.mark.parametrize("host", [b"", b"\n", b"\xff\0x"])
def test_a_request_for_no_host_is_refused(host: bytes) -> None:
    client, server = pair()
    assert server.receive(pack(REQUESTTUNNEL, 22, b"\0\0\0\1" + host)) is None
    kind, _, data = unpack(server.control.pop())
    assert (kind, data[4]) == (DENYTUNNEL, packets.NAME)
    assert not client.tunnels


def test_an_answer_that_is_refused_leaves_the_request_to_a_later_one() -> None:
    client, server = pair()
    ours, _ = tunnel(client, server)
    forward_id = client.request("host", 1, "waiting")
    with pytest.raises(ProtocolError, match="already open"):
        client.receive(pack(ACKTUNNEL, ours.id, struct.pack(">I", forward_id)))
    answer = pack(DENYTUNNEL, 0, struct.pack(">IB", forward_id, packets.REFUSED))
    assert client.receive(answer) == Denied("waiting", packets.REFUSED)
