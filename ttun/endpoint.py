"""What server and client share: the device, one session at a time, start and stop.

A background thread waits for a peer, supervises its session until it ends, and starts over. It
waits in one place (pending.py), for at most a second, so it notices everything that ends a session
and keeps its heartbeat. open() or start() opens the device, which outlives the sessions.

An endpoint is created, opened, run and stopped once each; docs/library.md says what each call does
in each state. stop() and status() take no lock, so a signal handler may call them. All methods may
be called from any thread.
"""

from __future__ import annotations

import abc
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Callable, ClassVar, TypeVar

from ttun import congestion, default_route, privileges
from ttun.device import Device
from ttun.device_state import some
from ttun.device_watch import DeviceWatch
from ttun.errors import LACKS, TtunError, UsageError, reason
from ttun.flag import SLICE, Flag
from ttun.handshake import agreeable, psk_key
from ttun.mptcp import Watch
from ttun.peer import Peer
from ttun.pending import Pending
from ttun.record import MOST_CHARACTERS, Record, Status, carried, in_tunnel, lost
from ttun.session import Session
from ttun.settings import BUFFERS, MAX_KEYS, Addresses, Settings, check_type
from ttun.version import __version__

log = logging.getLogger("ttun")

LACK_FIRST, LACK_MOST = 1.0, 4.0  # seconds until the next attempt, doubled each time
ALIVE_WITHIN = 10.0  # seconds
MISSING_SHOWN = 32  # items in Status.missing


_E = TypeVar("_E", bound="Endpoint")


class Endpoint(abc.ABC):
    """One end of a tunnel. Use Server or Client.

    As a context manager, start on entry and stop on exit. on_connected is called with the peer's
    address, on_disconnected with the address and the reason, both on the endpoint's thread;
    exceptions are logged.
    """

    role: ClassVar[str]
    addresses: ClassVar[Addresses]  # the defaults of this side
    on_connected: Callable[[str], object] | None = None  # a subclass may define them as methods
    on_disconnected: Callable[[str, str], object] | None = None

    def __init__(
        self,
        keys: Sequence[bytes],
        settings: Settings,
        on_connected: Callable[[str], object] | None = None,
        on_disconnected: Callable[[str, str], object] | None = None,
    ) -> None:
        """Check the options; open nothing. Raises UsageError for an invalid one, TtunError for one
        that this machine does not support.
        """
        self.use_keys(keys)
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
        try:
            self._stop, self._over = Flag(), Flag()
        except OSError as error:
            raise TtunError(f"cannot start: {error.strerror}") from None
        self._taken: dict[str, list[int]] = {}  # step of the life cycle: the thread that took it
        self._process = os.getpid()  # that took the last step
        self._is_open = False
        self._runner: int | None = None  # the endpoint's thread
        self._device: Device | None = None
        self._device_name_shown: str | None = None
        self._watch: DeviceWatch | None = None
        self._pending = Pending(self._stop)
        self._pending.on_failure = self._attempt_failed
        self._record = Record()
        self._created = time.monotonic()
        self._moved = False  # _why_dead() ended the last connection
        self._error: TtunError | None = None

    def use_keys(self, keys: Sequence[bytes]) -> None:
        """Replace the pre-shared keys; before start(). Raises UsageError for an invalid one."""
        for key in keys:
            check_type("the key", key, bytes)
        if not all(keys) or not keys:
            raise UsageError("the key is empty")
        if len(keys) > MAX_KEYS:
            raise UsageError(f"{len(keys)} keys are too many (at most {MAX_KEYS})")
        self._ks = [psk_key(key) for key in keys]
        self.key_names = [f"{n} of {len(keys)}" for n in range(1, len(keys) + 1)]

    def open(self) -> None:
        """Open the device and the server's port: all that needs privileges. Raises TtunError."""
        if not self._take("open"):
            raise TtunError(f"this {self.role} was already opened (create another)")
        try:
            log.info("ttun %s %s", __version__, self.role)
            self._prepare()
            self._congestion.prepare()
            given = self._settings
            self._device = Device(
                self._addresses, given.mtu, given.offload, given.device, given.routes,
                queue=self._buffers.queue,
            )  # fmt: skip
            self._device_name_shown = self._device.name
            if given.default_route:
                self._device.default_route = True
                default_route.add(self._device.index, self._device.has_ipv6, self._users)
                log.info(
                    "default route: %s for all but the LAN and user %s",
                    self._device.name,
                    ", ".join(map(str, self._users)),
                )
            self._watch = DeviceWatch(self._device)
            self._terms = replace(self._terms, features=self._device.offload >> 1)
            self._open()
            # In this order: stop() sets the flag first, then checks whether it is open.
            self._is_open = True
            if self._stop.is_set() and self._take("start"):
                raise InterruptedError
        except InterruptedError:
            self._finish()
            raise TtunError("stopped while opening") from None
        except BaseException:
            self._finish()
            raise

    def hold_device(self) -> int:
        """Keep an open device until the process ends; return the kernel's number for it.

        Nothing leaves outside while the program stops.
        """
        assert self._device is not None
        os.dup(self._device.fileno())
        return self._device.index

    def start(self) -> None:
        """Start in a background thread, after open() if needed. Raises TtunError."""
        if "open" not in self._taken:
            self.open()
        if not self._is_open or not self._take("start"):
            raise TtunError(f"this {self.role} was already started (create another)")
        thread = threading.Thread(target=self._main, name=f"ttun-{self.role}", daemon=True)
        try:
            self._begin()
            assert self._device is not None
            self._device.keep_from_children()
            thread.start()
        except BaseException as error:
            self._stop.set()
            if self._take("run"):  # else the thread is running, and does it
                self._finish()
            if isinstance(error, RuntimeError):  # no thread available
                raise TtunError(f"cannot start: {error}") from None
            raise
        self._runner = thread.ident

    def __enter__(self: _E) -> _E:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop the session and the endpoint; return when both have ended, within a second.

        No effect in a forked child: the tunnel is its parent's.
        """
        if self._process != os.getpid():
            return
        self._stop.set()
        if self._take("open") or (self._is_open and self._take("start")):
            self._finish()  # not running: no thread does it
        elif not self._depends_on_this_thread():
            self._over.wait()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the endpoint to stop, at most timeout seconds; return whether it has.

        Raises TtunError if it stopped because of an error, or in a callback without a timeout.
        """
        if timeout is None and self._runner == threading.get_ident():
            raise TtunError("wait() in a callback would wait for itself")
        over = self._over.wait(timeout)
        if over and self._error is not None:
            raise self._error
        return over

    def when_over(self, call: Callable[[], object]) -> None:
        """Call `call` on another thread when the endpoint stops; at once if it has."""

        def wait_and_call() -> None:
            self._over.wait()
            call()

        threading.Thread(target=wait_and_call, name="ttun-over", daemon=True).start()

    def fileno(self) -> int:
        """Return a descriptor for select() and poll(), readable once the endpoint has stopped."""
        return self._over.fileno()

    def is_alive(self) -> bool:
        """Return whether its thread had a heartbeat within ALIVE_WITHIN seconds.

        There is one about every second; only a slow callback or a bug delays it. Return True
        while the endpoint is not running.
        """
        running = "start" in self._taken and not self._over.is_set()
        return not running or self._stop.quiet_for() < ALIVE_WITHIN

    def status(self) -> Status:
        """Return the current status, from any thread."""
        missing = some(self._watch.missing, MISSING_SHOWN) if self._watch else []
        return self._record.status(
            role=self.role,
            device=self._device_name_shown,
            missing=missing,
            uptime=time.monotonic() - self._created,
            endpoint=self._endpoint[:MOST_CHARACTERS],
            **in_tunnel(self._device),
        )

    def facts(self) -> dict[str, str | None]:
        """Return what stays the same during a session, as text."""
        return self._record.facts(self.role, self._device_name_shown, self._addresses)

    # ---- overridden by Server and Client ----

    def _prepare(self) -> None:  # noqa: B027 - a server needs nothing
        """Prepare before the device and its routes exist. Raises TtunError."""

    def _open(self) -> None:  # noqa: B027 - a client needs nothing
        """Open resources other than the device. Raises TtunError."""

    def _begin(self) -> None:  # noqa: B027
        """Start additional threads. Raises TtunError."""

    def _close(self) -> None:  # noqa: B027
        """Close what _open() opened."""

    @abc.abstractmethod
    def _run(self) -> None:
        """Wait for a peer, run its session, start over, until stop is set.

        Called again after an OSError, MemoryError or RuntimeError (a temporary shortage).
        """

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

    # ---- its thread ----

    def _take(self, step: str) -> bool:
        """Return whether this call is the first to take a step; atomic without a lock."""
        mine = [threading.get_ident()]
        if self._taken.setdefault(step, mine) is not mine:
            return False
        self._process = os.getpid()
        return True

    def _depends_on_this_thread(self) -> bool:
        """Return whether waiting here for the endpoint to stop would deadlock.

        It would on the endpoint's thread, and in a signal handler that interrupted open(), start()
        or stop().
        """
        thread = threading.get_ident()
        if self._runner is not None:
            return self._runner == thread
        return self._taken["start" if self._is_open else "open"][0] == thread

    def _main(self) -> None:
        if not self._take("run"):
            return
        self._runner = threading.get_ident()
        self._stop.on_beat = self._look
        wait = LACK_FIRST
        try:
            while not self._stop.is_set():
                began = time.monotonic()
                try:
                    self._run()
                except LACKS as error:
                    # No descriptor, thread or memory: a temporary shortage.
                    wait = LACK_FIRST if time.monotonic() - began > LACK_MOST else wait
                    log.warning("%s; retrying in %.0f s", reason(error), wait)
                    self._stop.wait(wait)
                    wait = min(2 * wait, LACK_MOST)
        except TtunError as error:
            self._error = error
        except BaseException as error:  # a bug: log one line, without a traceback
            self._error = TtunError(f"internal error: {type(error).__name__}: {error}")
        finally:
            self._finish()

    def _finish(self) -> None:
        """Close everything that open() opened, and mark the endpoint as stopped."""
        self._stop.on_beat = None
        try:
            self._pending.close()
            self._close()
            if self._watch is not None:
                self._watch.close()
        except Exception as error:
            log.warning("cleanup failed: %s", reason(error))
        finally:
            if self._device is not None:
                self._device.close()
                if self._device.default_route:
                    self._remove_rules(self._device.index)
            self._over.set()

    @staticmethod
    def _remove_rules(index: int) -> None:
        """Remove the rules of the default route; without privileges somebody else has to."""
        if privileges.has(privileges.NET_ADMIN):
            try:
                default_route.remove(index)
            except OSError as error:
                log.warning("cannot remove the rules of the default route: %s", reason(error))

    def _look(self) -> None:
        """Check the device, about every second. Raises TtunError if it was removed."""
        watch, device = self._watch, self._device
        assert watch is not None and device is not None
        watch.look(time.monotonic())
        self._device_name_shown = device.name
        if watch.device_gone:
            raise TtunError(f"TUN device lost (was {device.name} removed?)")
        if watch.fileno() >= 0:  # each time, as an error unregisters it
            self._pending.watch(watch.fileno(), select.POLLIN)

    def _turn(self, seconds: float = SLICE) -> Peer | None:
        """Wait for events and handle them: see Pending.turn()."""
        assert self._watch is not None
        return self._pending.turn(min(seconds, max(0.0, self._watch.due - time.monotonic())))

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
            self._congestion.choose(peer.sock)
            limits = self._settings.limits
            session = Session(peer.sock, self._device, peer.keys, limits, self._buffers)
        except LACKS as error:
            peer.close()
            why = f"cannot start a session with {peer.name}: {reason(error)}"
            log.warning("%s", why)
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
            log.info(
                "peer %s disconnected after %.0f s: %s; %s%s",
                peer.name,
                session.duration,
                why,
                carried(session.counters()),
                lost(session.tcp_stats()),
            )
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
                try:
                    peer = self._turn()
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
        which = f", key {self.key_names[peer.keys.key]}" if len(self._ks) > 1 else ""
        log.info("peer %s authenticated: %s%s%s", peer.name, peer.keys.describe(), which, then)
        agreement, mtu = peer.keys.agreement, self._terms.mtu
        if agreement and agreement.mtu not in (0, mtu):
            fix = "start both ends with the same -mtu"
            log.warning("MTU differs: %d here, %d at the peer (%s)", mtu, agreement.mtu, fix)
