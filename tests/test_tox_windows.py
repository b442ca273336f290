"""Windows of the Tuntox protocol between two ttun ends: what may be sent, and how they grow."""

from __future__ import annotations

from multiplexers import carry, mux, pair, tunnel

from ttun.tox import protocol
from ttun.tox.packet import MAX_DATA
from ttun.tox.protocol import FIRST_WINDOW, Closed, Data, Growth, MaySend, Multiplexer


def test_each_side_may_send_a_window_and_then_what_it_was_granted() -> None:
    client, server = pair()
    ours, theirs = tunnel(client, server)
    sent = 0
    while ours.room():
        piece = bytes(ours.room())
        assert isinstance(server.receive(client.data(ours, piece)), Data)
        client.sent(ours, len(piece))
        sent += len(piece)
    assert sent == FIRST_WINDOW
    server.consumed(theirs, 1000, now=100.0)
    assert not server.control, "a window that small is not worth a packet"
    server.consumed(theirs, FIRST_WINDOW - 1000, now=100.0)
    assert carry(server, client) == [MaySend(ours)]
    assert ours.send_window == FIRST_WINDOW
    assert ours.room() == MAX_DATA


def test_who_overruns_its_window_loses_that_tunnel_alone() -> None:
    client, server = pair()
    ours, theirs = tunnel(client, server)
    other, others = tunnel(client, server)
    for _ in range(FIRST_WINDOW // MAX_DATA):
        server.receive(client.data(ours, bytes(MAX_DATA)))
    assert server.receive(client.data(ours, bytes(MAX_DATA))) == Closed(theirs)
    assert carry(server, client) == [Closed(ours)]
    assert server.receive(client.data(other, b"x")) == Data(others, b"x")


def test_a_window_grows_where_the_round_trip_is_long_and_within_the_budget() -> None:
    growth = Growth(7 * FIRST_WINDOW)
    client, server = mux(server=False), mux(server=True, growth=growth)
    carry(client, server)
    carry(server, client)
    server.round_trip = 1.0
    _, theirs = tunnel(client, server)
    now = 1000.0
    for _ in range(20):
        now += 0.1
        theirs.buffered += theirs.window // 4
        server.consumed(theirs, theirs.window // 4, now)
    assert theirs.window == 4 * FIRST_WINDOW
    assert growth.left == 4 * FIRST_WINDOW
    carry(server, client)
    _, slow = tunnel(client, server)
    server.consumed(slow, FIRST_WINDOW, now + 10)
    assert slow.window == FIRST_WINDOW
    server.close(theirs)
    assert growth.left == 7 * FIRST_WINDOW


def test_windows_of_one_friend_leave_room_for_those_of_another() -> None:
    """A friend chooses its round trip by when it answers a PING: its windows took all there was."""
    growth = Growth()
    greedy, good = (mux(server=True, growth=growth) for _ in range(2))
    now = 1000.0

    def grown(server: Multiplexer, tunnels: int) -> int:
        """Use up each window often; return the size of the last one."""
        nonlocal now
        client = mux(server=False)
        carry(client, server)
        carry(server, client)
        server.round_trip = 60.0
        for _ in range(tunnels):
            _, theirs = tunnel(client, server)
            for _ in range(20):
                now += 0.1
                theirs.buffered += theirs.window // 4
                server.consumed(theirs, theirs.window // 4, now)
            carry(server, client)
        return theirs.window

    grown(greedy, 100)
    assert grown(good, 2) == protocol.MAX_WINDOW
