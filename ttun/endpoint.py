"""What server and client share: the device, and one session at a time.

A background thread (lifecycle.py) waits for a peer, supervises its session until it ends, and
starts over. It waits in one place (pending.py), for at most a second, so it notices everything that
ends a session and keeps its heartbeat. open() or start() opens the device, which outlives the
sessions.
"""

from __future__ import annotations

import abc
import logging
import os
import select
import socket
import time
from collections.abc import Sequence
from typing import Callable, ClassVar

from ttun import congestion
from ttun.device import Device
from ttun.errors import LACKS, TtunError, UsageError, reason
from ttun.flag import SLICE
from ttun.handshake import agreeable, psk_key
from ttun.lifecycle import Lifecycle
from ttun.mptcp import Watch
from ttun.network import default_route
from ttun.peer import Peer
from ttun.pending import Pending
from ttun.record import MOST_CHARACTERS, Record, Status, carried, in_tunnel, lost
from ttun.session import Session
from ttun.settings import BUFFERS, MAX_KEYS, Addresses, Settings, several
from ttun.summary import Sessions
from ttun.users import user_name
from ttun.watch.device_state import some
from ttun.watch.device_watch import DeviceWatch
from ttun.watch.roaming import SourceAddress

log = logging.getLogger("ttun")

MISSING_SHOWN = 32  # items in Status.missing
SOON = 0.02  # seconds until the threads of a session notice that its connection was reset


class Endpoint(Lifecycle):
    """One end of a tunnel. Use Server or Client.

    As a context manager, start on entry and stop on exit. on_connected is called with the peer's
    address, on_disconnected with the address and the reason, both on the endpoint's thread;
    exceptions are logged.
    """

    addresses: ClassVar[Addresses]  # the defaults of this side
    on_connected: Callable[[str], object] | None = None  # a subclass may define them as methods
    on_disconnected: Callable[[str, str], object] | None = None

    def __init__(
        self,
        keys: bytes | Sequence[bytes],
        settings: Settings,
        on_connected: Callable[[str], object] | None = None,
        on_disconnected: Callable[[str, str], object] | None = None,
    ) -> None:
        """Check the options; open nothing. Raises UsageError for an invalid one, TtunError for one
        that this machine does not support.
        """
        for callback in (on_connected, on_disconnected):
            if callback is not None and not callable(callback):
                raise UsageError(f"a callback must be callable, not {type(callback).__name__}")
        self._settings = settings
        self._terms = agreeable(settings.wire, settings.cipher, settings.mtu)
        self._addresses = settings.addresses or self.addresses
        self._users = settings.users or (os.geteuid(),)
        self._buffers = BUFFERS[settings.buffers]
        self._congestion = congestion.Choice(settings.congestion_control)
        self.on_connected = on_connected or self.on_connected
        self.on_disconnected = on_disconnected or self.on_disconnected
        self.on_device: Callable[[str], object] | None = None  # given its name, before packets
        # Another process, with privileges, restores and removes the rules of the default route.
        self.rules_are_kept = False
        super().__init__()
        self.use_keys(keys)
        self._device: Device | None = None
        self._watch: DeviceWatch | None = None
        self._pending = Pending(self._stop)
        self._pending.on_failure = self._attempt_failed
        self._record = Record()
        self._sessions = Sessions()  # their lines in the log
        self._created = time.monotonic()
        self._moved = False  # _why_dead() ended the last connection

    def use_keys(self, keys: bytes | Sequence[bytes]) -> None:
        """Replace the pre-shared keys. Raises UsageError for an invalid one, TtunError after
        start(): the keys of a handshake must not change during it; after stop() nothing uses them.
        """
        if "start" in self._taken or self._over.is_set():
            what = "started" if "start" in self._taken else "stopped"
            raise TtunError(f"this {self.role} was already {what} (create another)")
        found = several("the key", keys, bytes)
        if not all(found):
            raise UsageError("the key is empty")
        if len(found) > MAX_KEYS:
            raise UsageError(f"{len(found)} keys are too many (at most {MAX_KEYS})")
        self._ks = [psk_key(key) for key in found]
        self.key_names = [f"{n} of {len(self._ks)}" for n in range(1, len(self._ks) + 1)]

    def hold_device(self) -> tuple[int, Sequence[int]]:
        """Keep an open device until the process ends: nothing leaves outside while that stops.

        Return the kernel's number for it, and the users whose packets its default route leaves out.
        """
        assert self._device is not None
        os.dup(self._device.fileno())
        return self._device.index, self._users

    def status(self) -> Status:
        """Return the current status, from any thread."""
        missing = some(self._watch.missing, MISSING_SHOWN) if self._watch else []
        return self._record.status(
            role=self.role,
            missing=missing,
            uptime=time.monotonic() - self._created,
            endpoint=self._endpoint[:MOST_CHARACTERS],
            **in_tunnel(self._device),
        )

    def facts(self) -> dict[str, str | None]:
        """Return what stays the same during a session, as text."""
        return self._record.facts(self.role, in_tunnel(self._device))

    # ---- overridden by Server and Client ----

    def _prepare(self) -> None:
        """Prepare before the device and its routes exist. Raises TtunError."""

    def _open(self) -> None:
        """Open resources other than the device. Raises TtunError."""

    def _close(self) -> None:
        """Close what _open() opened."""

    @property
    @abc.abstractmethod
    def _endpoint(self) -> str:
        """Where it listens, or the server that it dials."""

    def _attempt_failed(self, why: str) -> None:
        """Record it for the status."""
        self._record = self._record.failure(why)

    def _new_peer(self, session: Session, peer: Peer) -> None:
        """Handle a peer that authenticates during a session."""
        peer.close()

    # ---- its steps ----

    def _acquire(self) -> None:
        self._prepare()
        given = self._settings
        congestion.prepare(given.congestion_control)
        self._device = Device(
            self._addresses, given.mtu, given.offload, given.device, given.routes,
            queue=self._buffers.queue,
        )  # fmt: skip
        if self.on_device is not None:
            self.on_device(self._device.name)
        if given.default_route:
            self._device.outside = self._users
            default_route.add(self._device.index, self._device.has_ipv6, self._users)
            log.info(
                "default route: %s for all but the LAN and user %s",
                self._device.name,
                ", ".join(map(user_name, self._users)),
            )
            for line in default_route.exceptions(self._device.index, self._users):
                log.warning("%s", line)
        self._watch = DeviceWatch(self._device)
        self._watch.rules_are_kept = self.rules_are_kept
        self._terms = self._terms._replace(features=self._device.offload >> 1)
        self._open()

    def _begin(self) -> None:
        assert self._device is not None
        self._device.keep_from_children()

    def _release(self) -> None:
        try:
            self._pending.close()
            self._sessions.tick(time.monotonic(), end=True)
            if self._watch is not None:
                self._watch.close()
            self._close()  # last: a Dialer or Listener of the program may raise
        finally:
            if self._device is not None:
                self._device.close()
                if self._device.outside and not self.rules_are_kept:
                    default_route.release(self._device.index)

    def _look(self) -> float:
        watch, device = self._watch, self._device
        assert watch is not None and device is not None
        watch.look(time.monotonic())
        self._sessions.tick(time.monotonic())
        if watch.device_gone:
            raise TtunError(f"TUN device lost (was {device.name} removed?)")
        if watch.fileno() >= 0:  # each time, as an error unregisters it
            self._pending.watch(watch.fileno(), select.POLLIN)
        return watch.due - time.monotonic()

    def _watch_connection(self, sock: socket.socket | None) -> None:
        """Set the connection that _why_dead() judges; None resets it."""
        assert self._watch is not None
        self._watch.watch_connection(sock)

    def _why_dead(self) -> str | None:
        """Return why the connection is dead, judged by this end alone, or None."""
        assert self._watch is not None
        return self._watch.lost_local

    def _carry(self, peer: Peer) -> float:
        """Run a session until it ends; return its duration in seconds."""
        assert self._device is not None
        try:
            self._congestion.choose(peer.sock, self._sessions.say)
            limits = self._settings.limits
            session = Session(peer.sock, self._device, peer.keys, limits, self._buffers)
        except LACKS as error:
            peer.close()
            why = f"cannot start a session with {peer.name}: {reason(error)}"
            self._sessions.say(logging.WARNING, "%s", why)
            self._sessions.end()
            self._attempt_failed(why)
            return 0.0
        try:
            self._record = self._record.begun(session, peer)
            self._tell(self.on_connected, peer.name)
            self._attend(session, peer.sock)
        except BaseException as error:  # session threads must not outlive the device
            session.end(reason(error))
            raise
        finally:
            why = session.wait()
            self._record = self._record.ended(why)
            if self._stop.is_set():  # it is the last one
                self._sessions.tick(time.monotonic(), end=True)
            self._sessions.say(
                logging.INFO,
                "peer %s disconnected after %.0f s: %s; %s%s",
                peer.name,
                session.duration,
                why,
                carried(session.counters()),
                lost(session.tcp_stats()),
            )
            self._sessions.end()
            self._tell(self.on_disconnected, peer.name, why)
        if session.device_lost:
            raise TtunError(f"{why} (was {self._device.name} removed?)")
        return session.duration

    def _attend(self, session: Session, sock: socket.socket) -> None:
        """Supervise a session until it ends."""
        # Protocol x1 has its own liveness check.
        watch = Watch(sock) if session.control is None else None
        descriptor = session.fileno()
        self._pending.watch(descriptor)
        self._watch_connection(sock)
        source = SourceAddress(sock)
        self._moved = lacking = False
        try:
            while not session.is_over:
                if self._stop.is_set():
                    session.end("stopped")
                    break
                if watch is not None and (why := watch.look(time.monotonic())):
                    session.end(why)
                    break
                if why := self._why_dead():
                    self._moved = True
                    session.end(why)
                    break
                if session.control is not None:
                    session.control.others_wait = self._pending.key_waits
                    if source.has_changed(time.monotonic()):
                        session.control.doubt()
                try:
                    peer = self._pending.turn(
                        SLICE if descriptor in self._pending.watched else SOON
                    )
                except LACKS as error:  # affects new connections only
                    if not lacking:
                        log.warning("not accepting connections: %s", reason(error))
                    lacking = True
                    self._stop.wait(1.0)
                    continue
                lacking = False
                if peer is not None:
                    self._new_peer(session, peer)
        finally:
            self._pending.unwatch(descriptor)
            self._watch_connection(None)

    def _tell(self, callback: Callable[..., object] | None, *arguments: str) -> None:
        """Call a callback; log its exceptions."""
        if callback is None:
            return
        try:
            callback(*arguments)
        except BaseException as error:
            log.exception("callback failed: %s: %s", type(error).__name__, error)

    def _authenticated(self, peer: Peer, then: str = "") -> None:
        """Log that a session begins."""
        self._sessions.begin(time.monotonic())
        which = f", key {self.key_names[peer.keys.key]}" if len(self._ks) > 1 else ""
        described = peer.keys.describe()
        self._sessions.say(
            logging.INFO, "peer %s authenticated: %s%s%s", peer.name, described, which, then
        )
        agreement, mtu = peer.keys.agreement, self._terms.mtu
        if agreement and agreement.mtu not in (0, mtu):
            fix = "start both ends with the same -mtu"
            self._sessions.say(
                logging.WARNING,
                "MTU differs: %d here, %d at the peer (%s)",
                mtu,
                agreement.mtu,
                fix,
            )
