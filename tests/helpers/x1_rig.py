"""An x1 session over socketpairs: one is the device, one the connection to the independent peer."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

from peer import X1Peer
from shaking import OURS, ROLES, K, shake, terms
from socket_device import RunningSession, SocketDevice

from ttun.session import Session
from ttun.settings import DEFAULT_LIMITS, NORMAL, Buffers, Limits

PACKET = b"\x45 a packet"


class Rig(RunningSession):
    """A session in a role, its device, and the independent peer at the other end."""

    def __init__(
        self,
        role: str = "server",
        limits: Limits = DEFAULT_LIMITS,
        offload: int = 0,
        features: int = 3,
        buffers: Buffers = NORMAL,
    ) -> None:
        """offload: of the device; features: offered by the peer."""
        self.device = SocketDevice(offload)
        ours, theirs = socket.socketpair()
        self.peer = X1Peer(theirs, features=features)
        peer = threading.Thread(target=self.peer.shake, args=(1 - ROLES[role],))
        peer.start()
        keys = shake(OURS[role](K, terms("chacha20-poly1305")), ours)
        peer.join()
        self.session = Session(
            ours,
            self.device,  # type: ignore[arg-type]
            keys,
            limits,
            buffers,
        )

    def carries_up(self) -> None:
        self.device.outside.send(PACKET)
        assert self.peer.receive_packet() == PACKET

    def carries_down(self) -> None:
        self.peer.send(PACKET)
        assert self.device.outside.recv(70000) == PACKET

    def carries(self) -> None:
        """Carry a packet in each direction."""
        self.carries_up()
        self.carries_down()


@contextlib.contextmanager
def rigged(*arguments: object, **options: object) -> Iterator[Rig]:
    rig = Rig(*arguments, **options)  # type: ignore[arg-type]
    try:
        yield rig
    finally:
        rig.end()
        rig.peer.sock.close()
