"""Both ends of a real connection in this process, of each kind."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest

from ttun import tcp
from ttun.flag import Flag
from ttun.tcp import Address


@contextlib.contextmanager
def connected(
    stop: Flag, listener_mptcp: bool | None = False, dial_mptcp: bool | None = None
) -> Iterator[list[socket.socket]]:
    """Both ends of a connection, after a byte was sent."""
    with tcp.listen(Address("127.0.0.1", 0), listener_mptcp) as listener:
        address = Address("127.0.0.1", listener.getsockname()[1])
        with tcp.dial(address, dial_mptcp, stop) as sock:
            listener.setblocking(True)
            with listener.accept()[0] as accepted:
                sock.setblocking(True)
                sock.send(b"1")
                assert accepted.recv(1) == b"1"
                yield [sock, accepted]


KINDS = pytest.mark.parametrize(
    ("listener_mptcp", "dial_mptcp", "expected"),
    [(None, True, "mptcp"), (None, None, "tcp"), (False, True, "tcp"), (True, True, "mptcp")],
)


def need_mptcp() -> None:
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, tcp.IPPROTO_MPTCP).close()
    except OSError:
        pytest.skip("no Multipath TCP in this kernel")


SO_MAX_PACING_RATE = 47  # asm-generic/socket.h


def paced(rate: int) -> tuple[socket.socket, socket.socket]:
    """Both ends of a TCP connection; the first one sends so many bytes a second at most."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sock = socket.create_connection(listener.getsockname())
        sock.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, rate)
        return sock, listener.accept()[0]
