"""A server's friends, played by the test: real sockets, real toxcore, but packets of our making.

toxcore is not on any network here, so what the server says stays in ``Multiplexer.control``, where
the test reads it.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Callable, TypeVar

import pytest
from toxnet import on_loop
from tunnel import eventually

from ttun.tox import protocol, toxcore
from ttun.tox.instance import FriendPacket, FriendStatus, Tox
from ttun.tox.link import Link
from ttun.tox.loop import Loop
from ttun.tox.packet import unpack
from ttun.tox.protocol import Growth, Multiplexer, Tunnel
from ttun.tox.server import ForwardingServer

FRIEND, OTHER = 7, 8
T = TypeVar("T")


def offline_tox() -> Tox:
    return Tox(udp_ports=None)


class Friend:
    """A friend of a server on its loop. What forge() says need not be what a ttun peer would."""

    def __init__(self, server: ForwardingServer, number: int) -> None:
        self.server, self.number = server, number
        self.mux = Multiplexer(server=False, first_id=100 * number, growth=Growth())
        self.refusals: list[int] = []
        self.said: list[int] = []  # types of packets
        self._do(lambda: server.on_event(FriendStatus(number, toxcore.UDP)))
        self.talk()

    @property
    def link(self) -> Link:
        return self.server.links[self.number]

    def _do(self, function: Callable[[], T]) -> T:
        return on_loop(self.server.loop, function)

    def forge(self, *packets: bytes) -> None:
        """Have the server receive packets, and hear what it says to them."""

        def receive() -> list[bytes]:
            for data in packets:
                self.server.on_event(FriendPacket(self.number, data))
            return self._heard()

        self._hear(self._do(receive))

    def talk(self) -> None:
        """Exchange what waits on both sides."""
        packets = list(self.mux.control)
        self.mux.control.clear()
        self.forge(*packets)

    def _heard(self) -> list[bytes]:
        link = self.server.links.get(self.number)
        said = list(link.mux.control) if link else []
        if link:
            link.mux.control.clear()
        return said

    def _hear(self, packets: list[bytes]) -> None:
        for data in packets:
            self.said.append(unpack(data)[0])
            event = self.mux.receive(data)
            if isinstance(event, protocol.Opened):
                event.tunnel.owner = event.owner
            elif isinstance(event, protocol.Denied):
                self.refusals.append(event.reason)

    def open(self, port: int) -> Tunnel:
        """Open a tunnel to a port of this host."""
        owner = object()
        self.mux.request("127.0.0.1", port, owner)

        def opened() -> Tunnel | None:
            self.talk()
            return next((each for each in self.mux.tunnels.values() if each.owner is owner), None)

        return eventually(opened, "a tunnel")


@pytest.fixture(name="server")
def serving() -> Iterator[ForwardingServer]:
    """A server on its loop."""
    loop = Loop(offline_tox())
    made = ForwardingServer(loop)
    loop.start(made)
    yield made
    loop.stop()
    assert loop.error is None


@pytest.fixture(name="target")
def listening() -> Iterator[socket.socket]:
    """A listening socket; what connects there is not read unless a test does."""
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as listener:
        listener.settimeout(20)
        yield listener


def port_of(listener: socket.socket) -> int:
    return int(listener.getsockname()[1])
