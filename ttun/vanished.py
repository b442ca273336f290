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

import ctypes
import socket
import struct
import time

from ttun import link

INTERVAL = 5.0  # seconds between two looks
PATHS_MAX = 16
TCP_INFO_SIZE = 64  # bytes of struct tcp_info up to the two fields below
LAST_DATA_RECEIVED, LAST_ACK_RECEIVED = 52, 56  # where they are in it: u32, ms ago
MPTCP_TCPINFO = 2
SUBFLOW_DATA = struct.Struct("=4I")  # its own size; paths; the kernel's and our size of a tcp_info

_libc = ctypes.CDLL(None, use_errno=True)


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
        if silent is None or silent < link.USER_TIMEOUT:
            return None
        return f"nothing came from the peer for {silent // 1000} s, over any path"


def silence(sock: socket.socket) -> int | None:
    """Return for how many ms no path of an MPTCP connection has heard from the peer.

    None where the kernel does not tell.
    """
    size = SUBFLOW_DATA.size + PATHS_MAX * TCP_INFO_SIZE
    buffer = ctypes.create_string_buffer(size)
    SUBFLOW_DATA.pack_into(buffer, 0, SUBFLOW_DATA.size, 0, 0, TCP_INFO_SIZE)
    length = ctypes.c_uint32(size)
    # Python's getsockopt hands no values to the kernel, which this option wants.
    failed = _libc.getsockopt(
        sock.fileno(), link.SOL_MPTCP, MPTCP_TCPINFO, buffer, ctypes.byref(length)
    )
    if failed:
        return None
    _, paths, _, step = SUBFLOW_DATA.unpack_from(buffer)
    least = None
    for start in range(SUBFLOW_DATA.size, SUBFLOW_DATA.size + min(paths, PATHS_MAX) * step, step):
        for field in (LAST_DATA_RECEIVED, LAST_ACK_RECEIVED):
            (ms,) = struct.unpack_from("=I", buffer, start + field)
            least = ms if least is None else min(least, ms)
    return least


def _kernel_does_it(sock: socket.socket) -> bool:
    """Return whether the timeouts of link.tune() are in force on this connection."""
    try:
        return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) > 0
    except OSError:
        return False
