"""Two ends of the Tuntox protocol that hand each other packets, without any I/O."""

from __future__ import annotations

from ttun.tox.packet import HELLO, unpack
from ttun.tox.protocol import Event, Growth, Multiplexer, Opened, Requested, Tunnel


def mux(*, server: bool, first_id: int = 100, growth: Growth | None = None) -> Multiplexer:
    return Multiplexer(server=server, first_id=first_id, growth=growth or Growth())


def carry(source: Multiplexer, target: Multiplexer) -> list[Event]:
    """Hand over everything that waits; what it meant."""
    events = []
    while source.control:
        event = target.receive(source.control.popleft())
        if event is not None:
            events.append(event)
    return events


def pair() -> tuple[Multiplexer, Multiplexer]:
    """A ttun client and a ttun server that have exchanged their HELLO."""
    client, server = mux(server=False), mux(server=True, first_id=7000)
    carry(client, server)
    carry(server, client)
    return client, server


def tunnel(
    client: Multiplexer, server: Multiplexer, owner: str = "stream"
) -> tuple[Tunnel, Tunnel]:
    """An open tunnel: the client's end and the server's."""
    forward_id = client.request("127.0.0.1", 22, owner)
    assert carry(client, server) == [Requested(forward_id, "127.0.0.1", 22)]
    theirs = server.accept(forward_id, "target")
    assert theirs is not None
    (opened,) = carry(server, client)
    assert isinstance(opened, Opened)
    assert opened.owner == owner
    return opened.tunnel, theirs


def original(server: Multiplexer) -> None:
    """Forget what was said to an original, which ignores HELLO."""
    assert [unpack(packet)[0] for packet in server.control] == [HELLO]
    server.control.clear()
