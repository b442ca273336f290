"""A session with one authenticated peer: the codec's session, its threads, why it ended.

1. Discard packets queued in the device, which are stale.
2. Start two threads per direction, each in one long C call (csrc/session.h) without the GIL. In
   protocol x1 a fifth thread handles control frames (control.py).
3. Wait for all of them. The first error ends all of them.
4. Wipe the keys; report why it ended, and the counters.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from typing import Any, NamedTuple

from ttun import congestion
from ttun._codec import ffi, lib
from ttun.control import NAMES, Control
from ttun.device import Device
from ttun.handshake import Keys
from ttun.settings import DEFAULT_LIMITS, NORMAL, Buffers, Limits

CLOSED = "the peer closed the connection"

FEW_CORES = 2  # up to so many, use `direct` of csrc/session.h


class Counters(NamedTuple):
    """The counters of a session: see enum ttun_counter in csrc/session.h."""

    uplink_packets: int = 0
    uplink_bytes: int = 0
    downlink_packets: int = 0
    downlink_bytes: int = 0
    refused: int = 0
    empty: int = 0
    unsendable: int = 0
    congested: int = 0
    ignored: int = 0
    forged: int = 0

    def plus(self, other: Counters) -> Counters:
        """Return the sum of both."""
        return Counters(*map(sum, zip(self, other)))


IN_CODEC = [getattr(lib, f"TTUN_COUNT_{name.upper()}") for name in Counters._fields]


class Session:
    """Carry packets between a device and a peer until it ends.

    __init__ starts it, end() may end it, one thread must call wait() once.
    """

    def __init__(
        self,
        sock: socket.socket,
        device: Device,
        keys: Keys,
        limits: Limits = DEFAULT_LIMITS,
        buffers: Buffers = NORMAL,
    ) -> None:
        """Take ownership of the socket and the keys, and start. The caller keeps the device.

        Raises OSError, MemoryError or RuntimeError on a shortage.
        """
        self._sock = sock
        self._started = time.monotonic()
        sock.setblocking(True)
        device.drain()
        session = lib.ttun_session_new(
            device.fileno(),
            sock.fileno(),
            device.offload,
            _wire(keys),
            keys.sending.c,
            keys.receiving.c,
            len(os.sched_getaffinity(0)) <= FEW_CORES,
            buffers.slots,
            buffers.waiting,
        )
        keys.wipe()
        if session == ffi.NULL:
            sock.close()
            raise OSError(ffi.errno, os.strerror(ffi.errno))
        # Freed with its last reference: reading counters takes no lock, so a signal handler may end
        # the session at any time.
        session = ffi.gc(session, lib.ttun_session_free)
        self._c = session
        self._counters = Counters()
        self._tcp_stats: congestion.TcpStats | None = None  # at the end
        self._why: str | None = None  # reason given to end()
        self.control: Control | None = None
        if keys.agreement is not None:
            self.control = Control(session, sock, keys.agreement, limits)
        bodies = [
            lib.ttun_uplink_seal,
            lib.ttun_uplink_send,
            lib.ttun_downlink_receive,
            lib.ttun_downlink_open,
        ]
        self._threads: list[threading.Thread] = []
        try:
            for body in bodies:
                thread = threading.Thread(
                    target=body, args=(session,), name="ttun-pump", daemon=True
                )
                thread.start()
                self._threads.append(thread)
            if self.control is not None:
                self.control.start()
        except BaseException as error:  # threads must not outlive the socket
            self.end(str(error))
            self.wait()
            raise

    def fileno(self) -> int:
        """Return the connection's descriptor: poll() reports POLLHUP when the session has ended."""
        return self._sock.fileno()

    def end(self, why: str) -> None:
        """End the session for the given reason, from any thread."""
        self._why = self._why or why
        session = self._c
        if session is not None:
            lib.ttun_session_stop(session)

    @property
    def is_over(self) -> bool:
        """Whether the session has ended, so that wait() returns soon."""
        session = self._c
        return session is None or lib.ttun_session_reason(session, ffi.NULL) != lib.TTUN_RUNNING

    def wait(self) -> str:
        """Wait until the session has ended, release its resources, and return the reason."""
        for thread in self._threads:
            thread.join()
        if self.control is not None:
            self.control.join()
        detail = ffi.new("int *")
        reason = lib.ttun_session_reason(self._c, detail)
        self._counters = _read_counters(self._c)
        self._c = None  # wipes the keys
        self._tcp_stats = congestion.tcp_stats(self._sock)
        self._sock.close()
        self.duration = time.monotonic() - self._started
        self.device_lost = reason == lib.TTUN_END_DEVICE
        if reason == lib.TTUN_END_STOPPED:
            control = self.control.reason if self.control is not None else None
            return self._why or control or "stopped"
        return _reason(reason, detail[0])

    def counters(self) -> Counters:
        """Return the counters, from any thread, also after the end."""
        session = self._c
        return self._counters if session is None else _read_counters(session)

    def tcp_stats(self) -> congestion.TcpStats | None:
        """Return the TCP statistics, from any thread, also after the end."""
        return congestion.tcp_stats(self._sock) or self._tcp_stats

    def silence(self) -> float | None:
        """Return the seconds since the last frame from the peer; None after the end."""
        session = self._c
        return None if session is None else lib.ttun_session_silence(session) / 1000


def _read_counters(session: Any) -> Counters:
    return Counters(*(lib.ttun_session_counter(session, which) for which in IN_CODEC))


def _wire(keys: Keys) -> int:
    """Return the protocol for the codec: 0 for v1, or TTUN_X1 with the peer's offload bits."""
    if keys.agreement is None:
        return 0
    takes = keys.agreement.features << 1  # offer bits, shifted to the codec's
    return int(lib.TTUN_X1 | takes & (lib.TTUN_OFFLOAD_TCP | lib.TTUN_OFFLOAD_UDP))


def _reason(reason: int, detail: int) -> str:
    """Return the text of a ttun_reason, unless it is TTUN_END_STOPPED."""
    reasons = {
        lib.TTUN_END_CLOSED: CLOSED,
        lib.TTUN_END_TRUNCATED: f"connection closed {detail} bytes into a frame",
        lib.TTUN_END_LENGTH: f"the peer sent a frame of length {detail}, shorter than the tag",
        lib.TTUN_END_TAG: f"a frame of length {detail} failed authentication",
        # A sender may notice the close before the receiver does.
        lib.TTUN_END_SOCKET: CLOSED if detail == errno.EPIPE else os.strerror(detail),
        lib.TTUN_END_DEVICE: f"TUN device failed: {os.strerror(detail)}",
        lib.TTUN_END_NONCES: "the session ran out of nonces",
        lib.TTUN_END_CONTROL: f"the peer sent an unexpected {NAMES.get(detail)} frame",
    }
    return reasons[reason]
