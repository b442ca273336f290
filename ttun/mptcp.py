"""Detect a vanished peer over Multipath TCP, where the kernel takes too long.

TCP ends a dead connection by itself: keepalive while it is idle, TCP_USER_TIMEOUT while data is
unacknowledged. MPTCP has no TCP_USER_TIMEOUT, and after keepalive has closed the last subflow it
waits another minute for a new one (sysctl net.mptcp.close_timeout). So for MPTCP the endpoint

1. asks the kernel every few seconds, for each subflow, when it last received data or an
   acknowledgement (struct tcp_info). A live peer answers keepalive probes on every subflow.
2. ends the session when no subflow has received anything for TCP's USER_TIMEOUT.

Sources: linux/mptcp.h (MPTCP_TCPINFO, since Linux 5.16), linux/tcp.h (struct tcp_info).
"""

from __future__ import annotations

import socket
import struct
import time

from ttun import tcp
from ttun._codec import ffi, lib

INTERVAL = 5.0  # seconds between checks
PATHS_MAX = 16
MPTCP_SUBFLOW_ADDRS = 3
# Family of the local address; the rest of it, and of the peer's: two struct sockaddr_storage
SUBFLOW_ADDRS = struct.Struct("=H126x128x")
# struct tcp_info, up to the ms since data, and an acknowledgement, were last received
TCP_INFO = struct.Struct("=52x2I")
MPTCP_TCPINFO = 2
SUBFLOW_DATA = struct.Struct("=4I")  # own size; subflows; size of tcp_info: kernel's, ours


class Watch:
    """Check periodically whether the peer of a connection has vanished.

    Never reports it for TCP, where the kernel does, or if the kernel has no MPTCP_TCPINFO.
    """

    def __init__(self, sock: socket.socket) -> None:
        """Watch a connection. The caller keeps ownership of the socket."""
        self._sock = sock
        self._tells = not _kernel_does_it(sock) and silence(sock) is not None
        self._next_look = time.monotonic() + INTERVAL

    def look(self, now: float) -> str | None:
        """Return why the session must end, or None. Call it about every second."""
        if not self._tells or now < self._next_look:
            return None
        self._next_look = now + INTERVAL
        silent = silence(self._sock)
        if silent is None or silent < tcp.USER_TIMEOUT:
            return None
        return f"peer timed out: last received {silent // 1000} s ago"


def silence(sock: socket.socket) -> int | None:
    """Return the ms since any subflow of an MPTCP connection last received something.

    None if the kernel does not report it.
    """
    paths = _paths(sock, MPTCP_TCPINFO, TCP_INFO.size)
    return min((min(TCP_INFO.unpack_from(info)) for info in paths), default=None)


def local_addresses(sock: socket.socket) -> list[str]:
    """Return the local addresses of all subflows; empty before Linux 5.16."""
    found = []
    for addresses in _paths(sock, MPTCP_SUBFLOW_ADDRS, SUBFLOW_ADDRS.size):
        (family,) = SUBFLOW_ADDRS.unpack_from(addresses)
        # sockaddr_in: family, port, address; sockaddr_in6 has 4 bytes before the address.
        at, size = (4, 4) if family == socket.AF_INET else (8, 16)
        found.append(socket.inet_ntop(family, addresses[at : at + size]))
    return found


def _paths(sock: socket.socket, option: int, size: int) -> list[bytes]:
    """Return a SOL_MPTCP option: up to size bytes for each subflow."""
    buffer = bytearray(SUBFLOW_DATA.size + PATHS_MAX * size)
    SUBFLOW_DATA.pack_into(buffer, 0, SUBFLOW_DATA.size, 0, 0, size)
    length = ffi.new("uint32_t *", len(buffer))
    # These options read the buffer too, which Python's getsockopt does not support.
    value = ffi.from_buffer(buffer)
    if lib.getsockopt(sock.fileno(), tcp.SOL_MPTCP, option, value, length) != 0:
        return []
    _, paths, _, step = SUBFLOW_DATA.unpack_from(buffer)
    first = SUBFLOW_DATA.size
    return [
        bytes(buffer[at : at + step])
        for at in range(first, first + min(paths, PATHS_MAX) * step, step)
    ]


def _kernel_does_it(sock: socket.socket) -> bool:
    """Return whether the timeouts of tcp.tune() apply to this connection."""
    try:
        return bool(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT))
    except OSError:
        return False
