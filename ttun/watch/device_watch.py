"""Monitor the tunnel's device, and the local address of its connection.

 1. state_reader.py reads the state of both through rtnetlink after every change.
 2. Deviations from the wanted state (device_state.py) are in ``missing`` and, when they change, in
    the log, with the commands that restore it. With CAP_NET_ADMIN, addresses, routes and rules are
    restored automatically. If ``rules_are_kept``, another process restores rules.
 3. A connection whose local address was removed is dead: ``lost_local`` says so (roaming.py).

The endpoint's thread calls look() when the descriptor is readable, when ``due`` has passed (which
a call may change), and once a second. No call blocks.
"""

from __future__ import annotations

import errno
import logging
import socket
import time
from functools import partial

from ttun.device import Device
from ttun.errors import reason
from ttun.summary import Allowance
from ttun.watch.device_state import Lack, Seen, Wanted, describe, key
from ttun.watch.roaming import LocalAddress, Sleep
from ttun.watch.state_reader import StateReader

log = logging.getLogger("ttun")

RETRY = 60.0  # seconds until the netlink socket is opened again after an error
MEND_INTERVAL = 10.0  # seconds between attempts to restore
KEPT_TIME = 1.5  # seconds until a rule that another process should have restored is missing
LINES, LINE_AFTER = 20, 30.0  # log lines about changes: a burst of 20, then one per 30 s


class DeviceWatch:
    """Monitor one device. Without netlink, only its removal is noticed.

    missing: deviations, as text; the list is replaced, never modified, so any thread may read it.
    device_gone: the device was removed. lost_local: why the connection given to
    watch_connection() is dead, judged by its local address. rules_are_kept: see above.
    """

    def __init__(self, device: Device) -> None:
        """Start monitoring a device that was just opened. The caller keeps ownership."""
        self._device = device
        self._wanted = Wanted.of(device)
        self.missing: list[str] = []
        self.device_gone = False
        self.lost_local: str | None = None
        self.rules_are_kept = False
        self._sleep = Sleep()
        self._local: LocalAddress | None = None
        self._reader: StateReader | None = None
        self._open_at = 0.0
        self._complained = False
        self._read_before = False
        self._said: list[Lack] = []  # as last logged
        self._was_complete = not device.prepared
        self._lines = Allowance(LINES, LINE_AFTER)
        self._may_mend, self._mend_at = True, 0.0
        self._put_back: list[str] = []
        self._no_rule_since: float | None = None
        self.look(time.monotonic())

    def fileno(self) -> int:
        """Return the descriptor to poll, or -1 if there is none."""
        return -1 if self._reader is None else self._reader.fileno()

    @property
    def due(self) -> float:
        """When to call look() at the latest (time.monotonic())."""
        return self._open_at if self._reader is None else self._reader.due

    @property
    def suspended(self) -> float:
        """Seconds of system suspend since watch_connection(), ignoring short ones."""
        return self._sleep.seconds

    def watch_connection(self, sock: socket.socket | None) -> None:
        """Monitor the local address of a connected socket, or None to stop.

        The socket must stay open until the next call.
        """
        self._local = None if sock is None else LocalAddress(sock)
        self.lost_local, self._sleep.seconds = None, 0.0
        if self._reader is not None:
            self._reader.addresses = self._local.addresses if self._local else set()
            if self._local is not None:
                self._reader.read_within(time.monotonic(), 0)

    def close(self) -> None:
        """Stop monitoring."""
        if self._reader is not None:
            self._reader.close()
        self._reader = None

    def look(self, now: float) -> None:
        """Process some of the pending changes; never block, never raise."""
        self._sleep.look()
        try:
            self._look(now)
        except (OSError, MemoryError) as error:  # no netlink, or a temporary shortage
            self._complain(error)

    def _look(self, now: float) -> None:
        if not self.device_gone and self._device.is_gone():
            self.device_gone, self.missing = True, ["device removed"]
        if self._reader is None:
            if now < self._open_at:
                return
            self._open_at = now + RETRY
            self._reader = StateReader(self._device.index, self._wanted)
            self._reader.addresses = self._local.addresses if self._local else set()
        seen = self._reader.look(now)
        if seen is not None and not self.device_gone:
            self._complained = False
            self._judge(self._reader, seen, now)

    def _complain(self, error: BaseException) -> None:
        if not self._complained:
            self._complained = True
            log.warning("cannot monitor %s: netlink: %s", self._device.name, reason(error))

    def _judge(self, reader: StateReader, seen: Seen, now: float) -> None:
        if not self._read_before:  # connected routes differ between kernels
            self._read_before = True
            self._wanted.connected = [x for x in self._wanted.connected if key(x) in seen.routes]
            self._wanted.rules = [x for x in self._wanted.rules if x.is_in(seen.rules)]
        lacks = self._wanted.lacks(seen)
        self.missing = [lack.what for lack in lacks]
        self._was_complete |= not lacks
        self._follow_name(seen, now)
        if self._put_back and self._lines.take(now):
            log.info("restored on %s: %s", self._device.name, ", ".join(self._put_back))
        self._put_back = []
        if not self._mend(reader, lacks, now):
            self._say(lacks, now)
        local = self._local
        if local is not None and self.lost_local is None and reader.sees(local.sock):
            self.lost_local, again = local.judge(seen, now)
            reader.addresses = local.addresses
            if again is not None:
                reader.read_within(now, again)

    def _follow_name(self, seen: Seen, now: float) -> None:
        if seen.name is not None and seen.name != self._device.name:
            if self._lines.take(now):
                log.info("%s was renamed to %s", self._device.name, seen.name)
            self._device.name = seen.name

    # ---- what is missing ----

    def _mend(self, reader: StateReader, lacks: list[Lack], now: float) -> bool:
        """Request what is missing from the kernel; return whether to wait for the result."""
        if self._is_being_kept(reader, lacks, now):
            return True
        mendable = [(lack, lack.order) for lack in lacks if lack.order is not None]
        if not mendable or not self._may_mend:
            return False
        if now < self._mend_at:
            reader.read_within(now, self._mend_at - now)
            return False
        self._mend_at = now + MEND_INTERVAL
        for lack, order in mendable:
            reader.request(order(self._device.index), partial(self._ordered, lack))
        reader.read_within(now, 0)
        return True

    def _is_being_kept(self, reader: StateReader, lacks: list[Lack], now: float) -> bool:
        """Return whether the other process may still restore the rules that are missing."""
        if not self.rules_are_kept or not any(lack.is_rule for lack in lacks):
            self._no_rule_since = None
            return False
        if self._no_rule_since is None:
            self._no_rule_since = now
        left = self._no_rule_since + KEPT_TIME - now
        if left > 0:
            reader.read_within(now, left)
        return left > 0

    def _ordered(self, lack: Lack, failed: int) -> None:
        if failed == errno.EPERM:  # privileges were dropped for good
            self._may_mend, self._mend_at = False, 0.0
        elif failed == 0:
            self._put_back.append(lack.what.replace(" missing", ""))

    def _say(self, lacks: list[Lack], now: float) -> None:
        """Log changes since the last line about them."""
        before, after = ({x.what for x in found} for found in (self._said, lacks))
        if before == after or not self._lines.take(now):
            return  # the next reading tries again
        self._said = lacks
        if after - before:
            what = "changed" if self._was_complete else "is incomplete"
            told = describe(lacks, self._device.prepared)
            log.warning("%s %s: %s", self._device.name, what, told)
        elif lacks:
            log.warning("%s is still incomplete: %s", self._device.name, describe(lacks))
        else:
            log.info("%s is complete again", self._device.name)
