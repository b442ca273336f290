"""Notice a peer that vanished, over Multipath TCP, where the kernel alone takes too long.

TCP ends a connection by itself: keepalive while it is idle, TCP_USER_TIMEOUT while data is
unacknowledged. MPTCP has no TCP_USER_TIMEOUT, and when keepalive has closed its last path it waits
a minute more for a new one (sysctl net.mptcp.close_timeout). So there a thread

1. asks the kernel every few seconds, for each path, when it last heard from the peer: an
   acknowledgement or data (struct tcp_info). A peer that lives answers keepalive on every path.
2. ends the session when no path has heard anything for as long as TCP would wait.

Sources: linux/mptcp.h (MPTCP_TCPINFO, from Linux 5.16 on), linux/tcp.h (struct tcp_info).
"""

from __future__ import annotations

import contextlib
import ctypes
import socket
import struct
import threading
from typing import Callable

from ttun import link

INTERVAL = 5.0  # seconds between two looks
PATHS_MAX = 16
TCP_INFO_SIZE = 64  # bytes of struct tcp_info up to the two fields below
LAST_DATA_RECEIVED, LAST_ACK_RECEIVED = 52, 56  # where they are in it: u32, ms ago
MPTCP_TCPINFO = 2
SUBFLOW_DATA = struct.Struct("=4I")  # its own size; paths; the kernel's and our size of a tcp_info

_libc = ctypes.CDLL(None, use_errno=True)


class Watch:
    """Calls end with a reason, once, when the peer has vanished. Stop it when the session is over.

    Where the kernel sees to it by itself, and where it does not tell, there is no thread.
    """

    def __init__(self, sock: socket.socket, end: Callable[[str], None]) -> None:
        """Start to watch a connection. The socket stays the caller's."""
        self._end = end
        self._over = threading.Event()
        if _kernel_does_it(sock) or silence(sock) is None:
            return
        # Out of descriptors or threads the session does without, and waits for the kernel.
        with contextlib.suppress(OSError, RuntimeError):
            # One of its own: the session may close the other while a look is under way.
            own = sock.dup()
            threading.Thread(
                target=self._watch, args=(own,), name="ttun-watch", daemon=True
            ).start()

    def stop(self) -> None:
        """Stop watching, from any thread."""
        self._over.set()

    def _watch(self, sock: socket.socket) -> None:
        with sock:
            while not self._over.wait(INTERVAL):
                silent = silence(sock)
                if silent is not None and silent >= link.USER_TIMEOUT:
                    self._end(f"nothing came from the peer for {silent // 1000} s, over any path")
                    return


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
