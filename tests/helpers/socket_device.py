"""A datagram socketpair in the place of a TUN device: it keeps packets apart as that does, so that
the four threads run without root."""

from __future__ import annotations

import socket

from ttun.session import Session


class SocketDevice:
    """What Session wants of a device, on a datagram socketpair."""

    def __init__(self, offload: int = 0) -> None:
        self.offload = offload
        self.inside, self.outside = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        for sock in (self.inside, self.outside):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
        self.inside.setblocking(False)
        self.outside.settimeout(10)

    def fileno(self) -> int:
        return self.inside.fileno()

    def drain(self) -> int:
        return 0


class RunningSession:
    """A session on such a device; a test gives it a peer."""

    device: SocketDevice
    session: Session
    reason: str | None = None  # why it ended

    def end(self) -> str:
        """Stop it, if it runs; why it ended."""
        if self.reason is None:
            self.session.end("stopped")
            self.reason = self.session.wait()
        return self.reason

    def ended(self) -> str:
        """Wait for it to end by itself."""
        self.reason = self.session.wait()
        return self.reason
