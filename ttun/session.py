"""One authenticated peer: the codec's session, its four threads, and why it ended.

1. Drop what waits in the device: stale packets do not go into a new session.
2. Start two threads per direction, each inside one long C call (csrc/session.h) without the GIL.
   On wire x1 a fifth one handles control frames (control.py).
3. Wait for all of them. The first thing that goes wrong ends all of them.
4. Wipe the keys and say why it ended and what went through.
"""

from __future__ import annotations

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

FEW_CORES = 2  # up to here a thread empties its own slot where it can: see csrc/session.h


class Counters(NamedTuple):
    """What a session counted; csrc/session.h says what each of them is."""

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
    """Carries packets between a device and a peer until one of them ends it.

    Its life: __init__ starts it, end() may end it, wait() must be called once, by one thread.
    """

    def __init__(
        self,
        sock: socket.socket,
        device: Device,
        keys: Keys,
        limits: Limits = DEFAULT_LIMITS,
        buffers: Buffers = NORMAL,
    ) -> None:
        """Take over the socket and the keys, and start. The device stays the caller's."""
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
        # Freed with its last user: asking for counters while it ends takes no lock, so a signal
        # handler may end it whatever the thread below is doing.
        session = ffi.gc(session, lib.ttun_session_free)
        self._c = session
        self._counters = Counters()
        self._way: congestion.Way | None = None  # at its end
        self._why: str | None = None  # why it was ended, if not by itself
        self.control: Control | None = None
        if keys.agreement is not None:
            self.control = Control(session, sock, keys.agreement, limits)
        bodies = [
            lib.ttun_uplink_seal,
            lib.ttun_uplink_send,
            lib.ttun_downlink_receive,
            lib.ttun_downlink_open,
        ]
        self._threads = [
            threading.Thread(target=body, args=(session,), name="ttun-pump", daemon=True)
            for body in bodies
        ]
        started = []
        try:
            for thread in self._threads:
                thread.start()
                started.append(thread)
            if self.control is not None:
                self.control.start()
        except BaseException as error:  # no thread may outlive this call's socket
            self._threads = started
            self.end(str(error))
            self.wait()
            if isinstance(error, RuntimeError):  # the process may have no more threads
                raise OSError(str(error)) from None
            raise

    def fileno(self) -> int:
        """Return the connection's descriptor: it hangs up when the session is over."""
        return self._sock.fileno()

    def end(self, why: str) -> None:
        """End the session for a reason that it does not know itself, from any thread."""
        self._why = self._why or why
        session = self._c
        if session is not None:
            lib.ttun_session_stop(session)

    @property
    def is_over(self) -> bool:
        """Whether it has ended, so that wait() returns soon."""
        session = self._c
        return session is None or lib.ttun_session_reason(session, ffi.NULL) != lib.TTUN_RUNNING

    def wait(self) -> str:
        """Wait until it is over, release all, and return why it ended."""
        for thread in self._threads:
            thread.join()
        if self.control is not None:
            self.control.join()
        detail = ffi.new("int *")
        reason = lib.ttun_session_reason(self._c, detail)
        self._counters = _read_counters(self._c)
        self._c = None  # its keys are wiped now
        self._way = congestion.way(self._sock)
        self._sock.close()
        self.duration = time.monotonic() - self._started
        self.device_lost = reason == lib.TTUN_END_DEVICE
        if reason == lib.TTUN_END_STOPPED:
            control = self.control.reason if self.control is not None else None
            return self._why or control or "stopped"
        return _reason(reason, detail[0])

    def counters(self) -> Counters:
        """Return what it carried so far, from any thread, also afterwards."""
        session = self._c
        return self._counters if session is None else _read_counters(session)

    def way(self) -> congestion.Way | None:
        """Return what the kernel knows of its connection, from any thread, also afterwards."""
        return congestion.way(self._sock) or self._way

    def silence(self) -> float | None:
        """Return for how many seconds no frame of the peer was opened; None when it is over."""
        session = self._c
        return None if session is None else lib.ttun_session_silence(session) / 1000


def _read_counters(session: Any) -> Counters:
    return Counters(*(lib.ttun_session_counter(session, which) for which in IN_CODEC))


def _wire(keys: Keys) -> int:
    """Return the wire as the codec takes it: v1, or x1 and what the peer's device takes."""
    if keys.agreement is None:
        return 0
    takes = keys.agreement.features << 1  # of an offer; the codec's bits are one higher
    return int(lib.TTUN_X1 | takes & (lib.TTUN_OFFLOAD_TCP | lib.TTUN_OFFLOAD_UDP))


def _reason(reason: int, detail: int) -> str:
    """Put the codec's reason into words for the log."""
    reasons = {
        lib.TTUN_END_STOPPED: "stopped",
        lib.TTUN_END_CLOSED: "the peer closed the connection",
        lib.TTUN_END_TRUNCATED: f"connection closed {detail} bytes into a frame",
        lib.TTUN_END_LENGTH: f"the peer sent a frame of length {detail}, shorter than the tag",
        lib.TTUN_END_TAG: f"a frame of length {detail} failed authentication",
        lib.TTUN_END_SOCKET: os.strerror(detail),
        lib.TTUN_END_DEVICE: f"TUN device failed: {os.strerror(detail)}",
        lib.TTUN_END_NONCES: "the session ran out of nonces",
        lib.TTUN_END_CONTROL: f"the peer sent an unexpected {NAMES.get(detail)} frame",
    }
    return reasons[reason]
