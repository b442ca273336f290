"""One authenticated peer: the codec's session, its four threads, and why it ended.

1. Drop what waits in the device: stale packets do not go into a new session.
2. Start two threads per direction, each inside one long C call (csrc/pump.c) without the GIL.
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

from ttun._codec import ffi, lib
from ttun.buffers import NORMAL, Buffers
from ttun.control import DEFAULT_LIMITS, NAMES, Control, Limits
from ttun.device import Device
from ttun.handshake import Keys

FEW_CORES = 2  # up to here a thread empties its own slot where it can: see csrc/pump.c


class Counters(NamedTuple):
    """What a session carried. Packets as they stand in frames, and their bytes."""

    uplink_packets: int = 0
    uplink_bytes: int = 0
    downlink_packets: int = 0
    downlink_bytes: int = 0
    refused: int = 0  # packets of the peer that the kernel did not take
    empty: int = 0  # frames without a packet
    unsendable: int = 0  # packets of ours that fit no frame or contradict their vnet header
    congested: int = 0  # packets of ours dropped because the queue stood too long
    ignored: int = 0  # frames of a type that is not known
    forged: int = 0  # offloaded packets of the peer that do not add up

    def plus(self, other: Counters) -> Counters:
        """Return the sum of both."""
        return Counters(*map(sum, zip(self, other)))


class Session:
    """Carries packets between a device and a peer until one of them ends it."""

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
        buffers.apply(sock)
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
        )
        keys.wipe()
        if session == ffi.NULL:
            sock.close()
            raise OSError(ffi.errno, os.strerror(ffi.errno))
        self._c = session
        self._freed = threading.Lock()  # held while the C session is used from outside, or freed
        self._counters = Counters()
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
        except RuntimeError as error:  # the process may have no more threads
            self._threads = started
            self.stop()
            self.wait()
            raise OSError(str(error)) from None

    def stop(self) -> None:
        """End the session, from any thread."""
        with self._freed:
            if self._c is not None:
                lib.ttun_session_stop(self._c)

    def wait(self) -> str:
        """Wait until it is over, release all, and return why it ended."""
        for thread in self._threads:
            thread.join()
        if self.control is not None:
            self.control.join()
        with self._freed:
            detail = ffi.new("int *")
            end = lib.ttun_session_end(self._c, detail)
            self._counters = self._read_counters()
            lib.ttun_session_free(self._c)
            self._c = None
        self._sock.close()
        self.duration = time.monotonic() - self._started
        self.device_lost = end == lib.TTUN_END_DEVICE
        if self.control is not None and self.control.reason and end == lib.TTUN_END_STOPPED:
            return self.control.reason
        return _reason(end, detail[0])

    def counters(self) -> Counters:
        """Return what it carried so far, from any thread, also afterwards."""
        with self._freed:
            return self._counters if self._c is None else self._read_counters()

    def silence(self) -> float | None:
        """Return for how many seconds no frame of the peer was opened; None when it is over."""
        with self._freed:
            return None if self._c is None else lib.ttun_session_silence(self._c) / 1000

    def _read_counters(self) -> Counters:
        counters: Any = ffi.new("struct ttun_counters *")
        lib.ttun_session_counters(self._c, counters)
        return Counters(*(getattr(counters, name) for name in Counters._fields))


def _wire(keys: Keys) -> int:
    """Return the wire as the codec takes it: v1, or x1 and what the peer's device takes."""
    if keys.agreement is None:
        return 0
    takes = [lib.TTUN_OFFLOAD_TCP, lib.TTUN_OFFLOAD_UDP]
    bits = [bit for n, bit in enumerate(takes) if keys.agreement.features >> n & 1]
    return int(lib.TTUN_X1 + sum(bits))


def _reason(end: int, detail: int) -> str:
    """Put the codec's reason into words for the log."""
    reasons = {
        lib.TTUN_END_STOPPED: "stopped",
        lib.TTUN_END_CLOSED: "the peer closed the connection",
        lib.TTUN_END_TRUNCATED: f"the connection ended {detail} bytes into a frame",
        lib.TTUN_END_LENGTH: f"the peer sent a frame with a length of {detail}, less than its tag",
        lib.TTUN_END_TAG: f"a frame with a length of {detail} failed authentication",
        lib.TTUN_END_SOCKET: os.strerror(detail),
        lib.TTUN_END_DEVICE: f"the TUN device failed: {os.strerror(detail)}",
        lib.TTUN_END_NONCES: "this session ran out of nonces",
        lib.TTUN_END_CONTROL: f"the peer sent a {NAMES.get(detail)} frame out of place",
    }
    return reasons[end]
