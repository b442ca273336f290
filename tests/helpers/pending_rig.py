"""Pending handshakes with a real listener, whose event loop a test runs itself."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import socket
import time
from collections.abc import Iterator

from shaking import K, terms

from ttun import handshake, tcp
from ttun.flag import Flag
from ttun.peer import Host
from ttun.pending import Pending
from ttun.x1 import AnsweredNonces


class Harness:
    """Pending handshakes and a real listener."""

    def __init__(self, silent: bool = False) -> None:
        self.answered = AnsweredNonces(100)
        ours = terms(wire="x1" if silent else "auto")
        self.listener = tcp.Listener("127.0.0.1:0", None, "system")
        self.listener.open(Flag())
        self.stop = Flag()
        self.pending = Pending(self.stop)
        self.pending.listen(
            Host(
                self.listener,
                lambda: handshake.server(K, ours, self.answered),
                lambda nonce: handshake.knows_key(K, ours, nonce, self.answered),
                silent,
            )
        )
        self.socks: list[socket.socket] = []

    def connect(self, data: bytes = b"", source: str = "127.0.0.1") -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self.listener.port), 5, (source, 0))
        self.socks.append(sock)
        if data:
            sock.sendall(data)
        return sock

    def turns(self, seconds: float = 0.05) -> None:
        """Run the event loop for so long."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.pending.turn(0.01)

    def close(self) -> None:
        self.pending.close()
        self.listener.close()
        for sock in self.socks:
            sock.close()


@contextlib.contextmanager
def no_descriptors() -> Iterator[None]:
    """This process has all that it may have, and what it closes it may have again."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    gc.collect()  # or sockets of tests before would be closed meanwhile
    with contextlib.ExitStack() as opened:
        highest = max(map(int, os.listdir("/proc/self/fd")))
        while (free := opened.enter_context(socket.socket())).fileno() < highest:
            pass  # below the limit, no number is free
        next_one = free.fileno()
        free.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (next_one, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)


def is_open(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        return sock.recv(100) != b""
    except BlockingIOError:
        return True
    except ConnectionError:
        return False
