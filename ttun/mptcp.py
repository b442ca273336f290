"""Notice a peer that vanished, over Multipath TCP, where the kernel alone takes too long.

TCP ends a connection by itself: keepalive while it is idle, TCP_USER_TIMEOUT while data is
unacknowledged. MPTCP has no TCP_USER_TIMEOUT, and when keepalive has closed its last path it waits
a minute more for a new one (sysctl net.mptcp.close_timeout). So there the endpoint

1. asks the kernel every few seconds, for each path, when it last heard from the peer: an
   acknowledgement or data (struct tcp_info). A peer that lives answers keepalive on every path.
2. ends the session when no path has heard anything for as long as TCP would wait.

Sources: linux/mptcp.h (MPTCP_TCPINFO, from Linux 5.16 on), linux/tcp.h (struct tcp_info).
"""

from __future__ import annotations

import socket
import struct
import time

from ttun import tcp
from ttun._codec import ffi, lib

INTERVAL = 5.0  # seconds between two looks
PATHS_MAX = 16
MPTCP_SUBFLOW_ADDRS = 3  # a struct sockaddr_storage of ours and one of the peer's for each path
ADDRESS_SIZE = 128  # bytes of a struct sockaddr_storage
TCP_INFO_SIZE = 64  # bytes of struct tcp_info up to the two fields below
LAST_DATA_RECEIVED, LAST_ACK_RECEIVED = 52, 56  # where they are in it: u32, ms ago
MPTCP_TCPINFO = 2
SUBFLOW_DATA = struct.Struct("=4I")  # its own size; paths; the kernel's and our size of a tcp_info


class Watch:
    """Looks now and then whether the peer of a connection has vanished.

    Where the kernel sees to it by itself, and where it does not tell, it never says so.
    """

    def __init__(self, sock: socket.socket) -> None:
        """Watch a connection. The socket stays the caller's."""
        self._sock = sock
        self._tells = not _kernel_does_it(sock) and silence(sock) is not None
        self._next_look = time.monotonic() + INTERVAL

    def look(self, now: float) -> str | None:
        """Return why the session has to end, or None; to be called about every second."""
        if not self._tells or now < self._next_look:
            return None
        self._next_look = now + INTERVAL
        silent = silence(self._sock)
        if silent is None or silent < tcp.USER_TIMEOUT:
            return None
        return f"peer timed out: last received {silent // 1000} s ago"


def silence(sock: socket.socket) -> int | None:
    """Return for how many ms no path of an MPTCP connection has heard from the peer.

    None where the kernel does not tell.
    """
    paths = _paths(sock, MPTCP_TCPINFO, TCP_INFO_SIZE)
    times = [
        struct.unpack_from("=I", info, field)[0]
        for info in paths
        for field in (LAST_DATA_RECEIVED, LAST_ACK_RECEIVED)
    ]
    return min(times, default=None)


def local_addresses(sock: socket.socket) -> list[str]:
    """Return our addresses on the paths of an MPTCP connection; none where the kernel does not
    tell (before Linux 5.16).
    """
    found = []
    for addresses in _paths(sock, MPTCP_SUBFLOW_ADDRS, 2 * ADDRESS_SIZE):
        (family,) = struct.unpack_from("=H", addresses)
        # struct sockaddr_in: family, port, address; sockaddr_in6 has 4 bytes more between.
        at, size = (4, 4) if family == socket.AF_INET else (8, 16)
        found.append(socket.inet_ntop(family, addresses[at : at + size]))
    return found


def _paths(sock: socket.socket, option: int, size: int) -> list[bytes]:
    """Return what an option of SOL_MPTCP says about each path, size bytes of it."""
    buffer = bytearray(SUBFLOW_DATA.size + PATHS_MAX * size)
    SUBFLOW_DATA.pack_into(buffer, 0, SUBFLOW_DATA.size, 0, 0, size)
    length = ffi.new("uint32_t *", len(buffer))
    # Python's getsockopt hands no values to the kernel, which these options want.
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
    """Return whether the timeouts of link.tune() are in force on this connection."""
    try:
        return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) > 0
    except OSError:
        return False
