"""Control frames of a protocol x1 session: liveness, round-trip time, rekeying.

One thread beside the four packet threads. It takes the peer's control frames from the inbox, checks
timers in between, and posts its own frames to the outbox; it never blocks a packet.

1. Send PING after 2.5 s without a frame from the peer; PONG gives the round-trip time. The peer has
   timed out after 16 s without a frame, unless its kernel still acknowledges data (a full queue on
   a slow link), and after 60 s without a frame in any case. If another client waits, which may be
   the same one, 1 and 8 s count instead of 2.5 and 16. In doubt() the peer gets a PING at once, and
   has timed out if its kernel acknowledges nothing for 5 s.
2. Rekey: the client sends REKEY, the server answers with REKEY. Each side then computes the next
   keys and passes them to the codec. SWITCH is the last frame under an old key: the client sends
   it first, the server answers with its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
import struct
import threading
import time
from typing import Any

from ttun._codec import ffi, lib
from ttun.errors import ProtocolError
from ttun.settings import Limits
from ttun.sodium import KeyPair
from ttun.x1 import Agreement

log = logging.getLogger("ttun")

PING_AFTER, DEAD_AFTER, LOST_AFTER = 2.5, 16.0, 60.0  # seconds without a frame
# These replace the first two while another client waits. A session survives an outage of 5 s then:
# 2 s may pass until a PING is sent, which the kernel repeats after 3.0, 5.0 and 7.0 s.
PING_FOR_OTHERS, DEAD_TO_OTHERS = 1.0, 8.0
DOUBTED_FOR = 5.0  # seconds without an acknowledgement
# TCP doubles its retransmission timeout each time: after an outage of 10 s it may wait 10 s more.
# With a limit of 2 s, a session survives such an outage before the liveness check ends it.
RETRANSMIT_WITHIN = 2000  # ms
TCP_RTO_MAX_MS = 44  # linux/tcp.h, since Linux 6.15; not for Multipath TCP
LOOK_AT_CLOCK = 1.0  # seconds
# Seconds between two looks: this end did not run, and may have frames to read. The peer may have
# been silent for 3.5 s before, as it is asked only then: together less than DEAD_TO_OTHERS.
STOPPED = 2.0
STORM_PAUSE = 0.005  # seconds after each frame: limits the CPU time of a flood
REKEY_TIMEOUT = 60.0  # seconds
PING_SIZE: int = lib.TTUN_PING_SIZE
NAMES = {
    lib.TTUN_PING: "PING",
    lib.TTUN_PONG: "PONG",
    lib.TTUN_REKEY: "REKEY",
    lib.TTUN_SWITCH: "SWITCH",
}


class Control:
    """The control thread of one session. The C session must outlive it."""

    def __init__(
        self, session: Any, sock: socket.socket, agreement: Agreement, limits: Limits
    ) -> None:
        """Take ownership of agreement. limits: a server allows twice as much."""
        self.rtt: float | None = None  # seconds, last measured
        self.rekeys = 0
        self.reason: str | None = None  # set if this thread ended the session
        self.others_wait = False  # for this session to end; set by another thread
        self._c = session
        self._sock = sock
        with contextlib.suppress(OSError):  # an older kernel
            sock.setsockopt(socket.IPPROTO_TCP, TCP_RTO_MAX_MS, RETRANSMIT_WITHIN)
        self._agreement = agreement
        factor = 1 if agreement.is_client else 2
        self._limits = Limits(limits.seconds * factor, limits.bytes * factor)
        self._frame: Any = ffi.new("struct ttun_control *")
        self._pinged_at = float("-inf")
        self._ping = b""
        self._acknowledged = -1
        self._progress_at = 0.0
        self._runs_since = float("-inf")
        self._in_doubt = False  # set by another thread
        self._doubt: tuple[float, int] | None = None  # since when; bytes sent by then
        self._pair: KeyPair | None = None  # the client's, until the server's REKEY
        self._expected: int | None = None  # the next frame of a rekey in progress
        self._rekey_at = 0.0
        self._begin_epoch()
        self._thread = threading.Thread(target=self._run, name="ttun-control", daemon=True)

    def start(self) -> None:
        """Start the thread. Raises RuntimeError if no thread is available."""
        self._thread.start()

    def doubt(self) -> None:
        """Ask the peer whether it can still be reached, from any thread."""
        self._in_doubt = True

    def join(self) -> None:
        """Wait until the session has ended, then wipe the key material."""
        if self._thread.ident is not None:
            self._thread.join()
        self._agreement.p.wipe()
        self._pair = None  # of a rekey that was not completed: its last reference
        self._c = None  # so that the session can be freed

    def _run(self) -> None:
        try:
            self._send_ping()
            while (taken := self._take()) >= 0:
                if taken > 0:
                    self._receive(self._frame.type, bytes(ffi.buffer(self._frame.body)))
                    time.sleep(STORM_PAUSE)
                self._look_at_clock(time.monotonic())
        except ProtocolError as error:
            self.reason = str(error)
        except Exception as error:  # a bug ends this session, not the program
            self.reason = f"internal error: {type(error).__name__}"
        lib.ttun_session_stop(self._c)

    def _take(self) -> int:
        """Wait for a control frame, until the next timer check."""
        wait = LOOK_AT_CLOCK
        if self._expected is None:
            now = time.monotonic()
            due = (self._used_since or now) + self._limits.seconds - now
            wait = min(max(due, 0.001), wait)
        taken: int = lib.ttun_session_take(self._c, self._frame, int(wait * 1000))
        return taken

    def _post(self, kind: int, body: bytes = b"") -> None:
        lib.ttun_session_post(
            self._c, ffi.new("struct ttun_control *", {"type": kind, "body": body})
        )

    # ---- liveness ----

    def _receive(self, kind: int, body: bytes) -> None:
        if kind == lib.TTUN_PING:
            self._post(lib.TTUN_PONG, body[:PING_SIZE])
        elif kind == lib.TTUN_PONG:
            if body[:PING_SIZE] == self._ping:
                self.rtt = time.monotonic() - self._pinged_at
                self._ping = b""
        elif kind != self._expected and (self._expected or kind != self._first()):
            raise ProtocolError(f"the peer sent an unexpected {NAMES[kind]} frame")
        elif kind == lib.TTUN_REKEY:
            self._go_on(body)
        else:
            self._finish()

    def _send_ping(self) -> None:
        self._pinged_at, self._ping = time.monotonic(), os.urandom(PING_SIZE)
        self._post(lib.TTUN_PING, self._ping)

    def _look_at_clock(self, now: float) -> None:
        sent = lib.ttun_session_counter(self._c, lib.TTUN_COUNT_SENT)
        acknowledged = sent - self._unacknowledged()
        if acknowledged > self._acknowledged:
            self._acknowledged, self._progress_at = acknowledged, now
        if now - self._looked_at >= STOPPED:  # SIGSTOP, a frozen container or virtual machine
            self._runs_since = now
        silence = min(lib.ttun_session_silence(self._c) / 1000, now - self._runs_since)
        ping_after, dead_after = PING_AFTER, DEAD_AFTER
        if self.others_wait:
            ping_after, dead_after = PING_FOR_OTHERS, DEAD_TO_OTHERS
        if silence >= LOST_AFTER or min(silence, now - self._progress_at) >= dead_after:
            raise ProtocolError(f"peer timed out: last received {silence:.0f} s ago")
        self._look_at_doubt(now, sent)
        if silence >= ping_after and now - self._pinged_at >= ping_after:
            self._send_ping()
        self._check_key(now)

    def _look_at_doubt(self, now: float, sent: int) -> None:
        if self._in_doubt:
            self._in_doubt, self._doubt = False, (now, sent)
            self._send_ping()
        if self._doubt is None:
            return
        since, sent_before = self._doubt
        if self._acknowledged > sent_before:
            self._doubt = None
        elif now - max(since, self._progress_at, self._runs_since) >= DOUBTED_FOR:
            raise ProtocolError(
                f"no acknowledgement for {DOUBTED_FOR:.0f} s since the route to the peer changed"
            )

    def _unacknowledged(self) -> int:
        """Return the bytes in the send buffer, unsent or not acknowledged."""
        try:
            answer = fcntl.ioctl(self._sock, lib.TIOCOUTQ, bytes(4))
        except OSError:  # MPTCP in an old kernel: count all that was sent
            return 0
        return int(struct.unpack("=i", answer)[0])

    # ---- rekeying ----

    def _begin_epoch(self) -> None:
        """Start counting time and bytes under the current keys."""
        self._carried = self._bytes()
        self._used_since: float | None = None
        self._looked_at = time.monotonic()

    def _bytes(self) -> tuple[int, int]:
        return (
            lib.ttun_session_counter(self._c, lib.TTUN_COUNT_UPLINK_BYTES),
            lib.ttun_session_counter(self._c, lib.TTUN_COUNT_DOWNLINK_BYTES),
        )

    def _check_key(self, now: float) -> None:
        if self._expected is not None and now - self._rekey_at >= REKEY_TIMEOUT:
            raise ProtocolError("the peer did not complete the rekey")
        most = max(now - before for now, before in zip(self._bytes(), self._carried))
        if most and self._used_since is None:
            # In use since the last check or later. The client rekeys early, the server is lenient.
            self._used_since = self._looked_at if self._agreement.is_client else now
        self._looked_at = now
        if self._used_since is None or self._expected is not None:
            return
        if now - self._used_since < self._limits.seconds and most < self._limits.bytes:
            return
        if not self._agreement.is_client:
            raise ProtocolError("the peer did not rekey in time")
        self._pair = KeyPair()
        self._expect(lib.TTUN_REKEY)
        self._post(lib.TTUN_REKEY, self._pair.public)

    def _first(self) -> int | None:
        """Return the peer's frame that starts a rekey; only a client may start one."""
        return None if self._agreement.is_client else int(lib.TTUN_REKEY)

    def _expect(self, kind: int) -> None:
        self._expected, self._rekey_at = kind, time.monotonic()

    def _go_on(self, public: bytes) -> None:
        """Compute the next keys, on the peer's REKEY."""
        pair = self._pair or KeyPair()
        self._pair = None
        self._agreement.rekey(pair, public)
        sending, receiving = self._agreement.states()
        if not lib.ttun_session_rekey(self._c, sending.c, receiving.c):
            raise ProtocolError("the peer began a rekey during another")
        self._expect(lib.TTUN_SWITCH)
        if self._agreement.is_client:
            self._post(lib.TTUN_SWITCH)
        else:
            self._post(lib.TTUN_REKEY, pair.public)

    def _finish(self) -> None:
        """Complete the rekey, on the peer's SWITCH: its next frames use the new key."""
        self._expected = None
        self.rekeys += 1
        log.debug("rekey %d of this session", self.rekeys)
        self._begin_epoch()
        if not self._agreement.is_client:
            self._post(lib.TTUN_SWITCH)
