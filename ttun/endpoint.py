"""What a server and a client have in common: the device, one session at a time, start and stop.

A thread of the endpoint's own looks for a peer, looks after its session until that ends, and looks
again. It waits in one place (pending.py), a second at most, so it notices everything that is to
end a session, and shows that it lives. The device is opened by open() or start() and outlives the
sessions.

An endpoint is made, open, running, over, once each; docs/library.md has what each call does then.
stop() and status() take no lock: a signal handler may call them. Everything may be called from any
thread.
"""

from __future__ import annotations

import abc
import logging
import os
import select
import socket
import threading
import time
from dataclasses import replace
from typing import Callable, ClassVar, TypeVar

from ttun import congestion, default_route, privileges
from ttun.device import Device
from ttun.device_state import some
from ttun.device_watch import DeviceWatch
from ttun.errors import LACKS, TtunError, UsageError, reason
from ttun.flag import SLICE, Flag
from ttun.handshake import Keys, agreeable, psk_key
from ttun.mptcp import Watch
from ttun.peer import Peer
from ttun.pending import Pending
from ttun.record import Record, Status, carried, lost
from ttun.session import Session
from ttun.settings import BUFFERS, Addresses, Settings, check_type
from ttun.version import __version__

log = logging.getLogger("ttun")

LACK_FIRST, LACK_MOST = 1.0, 4.0  # seconds until the next try, doubled each time
ALIVE_WITHIN = 10.0  # seconds
MISSING_SHOWN = 32  # words of what the device lacks, in a status


_E = TypeVar("_E", bound="Endpoint")


class Endpoint(abc.ABC):
    """One end of a tunnel. Use Server or Client.

    As a context manager it is started at the beginning and stopped at the end. on_connected is
    called with the peer's address, on_disconnected with that and the reason, both on the endpoint's
    thread; what they raise is logged.
    """

    role: ClassVar[str]
    addresses: ClassVar[Addresses]  # the usual ones of this side

    def __init__(
        self,
        key: bytes,
        settings: Settings,
        on_connected: Callable[[str], object] | None = None,
        on_disconnected: Callable[[str, str], object] | None = None,
    ) -> None:
        """Check the values; nothing is opened before open() or start(). Raises UsageError for one
        that makes no sense, TtunError for what this machine lacks.
        """
        check_type("the key", key, bytes)
        if not key:
            raise UsageError("the key is empty")
        for callback in (on_connected, on_disconnected):
            if callback is not None and not callable(callback):
                raise UsageError(f"a callback has to be callable, not {type(callback).__name__}")
        self._settings = settings
        self._terms = agreeable(settings.wire, settings.cipher, settings.mtu)
        self._k = psk_key(key)
        self._addresses = settings.addresses or self.addresses
        self._users = settings.users or (os.geteuid(),)
        self._buffers = BUFFERS[settings.buffers]
        self._congestion = congestion.Choice(settings.congestion_control)
        self.on_connected = on_connected
        self.on_disconnected = on_disconnected
        try:
            self._stop, self._over = Flag(), Flag()
        except OSError as error:
            raise TtunError(f"cannot start: {error.strerror}") from None
        self._taken: dict[str, list[int]] = {}  # the steps of its life, each taken by one thread
        self._is_open = False
        self._runner: int | None = None  # the endpoint's own
        self._device: Device | None = None
        self._device_name_shown: str | None = None
        self._watch: DeviceWatch | None = None
        self._pending = Pending(self._stop)
        self._record = Record()
        self._moved = False  # the last connection was given up for what _why_dead() said
        self._error: TtunError | None = None

    def open(self) -> None:
        """Open the device (and the server's port): all that takes privileges. Raises TtunError."""
        if not self._take("open"):
            raise TtunError(f"this {self.role} was opened before: make another one")
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
            # In this order: stop() sets the flag first, then looks whether it is open.
            self._is_open = True
            if self._stop.is_set() and self._take("start"):
                raise InterruptedError
        except InterruptedError:
            self._finish()
            raise TtunError("stopped while it was opened") from None
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
        """Start in a background thread; open() first, if that was not done. Raises TtunError."""
        if "open" not in self._taken:
            self.open()
        if not self._is_open or not self._take("start"):
            raise TtunError(f"this {self.role} was started before: make another one")
        thread = threading.Thread(target=self._main, name=f"ttun-{self.role}", daemon=True)
        try:
            self._begin()
            thread.start()
        except BaseException as error:
            self._stop.set()
            if self._take("run"):  # else the thread is there, and does it
                self._finish()
            if isinstance(error, RuntimeError):  # the process may have no more threads
                raise TtunError(f"cannot start: {error}") from None
            raise
        self._runner = thread.ident

    def __enter__(self: _E) -> _E:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the session and the endpoint; return when both are gone, within a second."""
        self._stop.set()
        if self._take("open") or (self._is_open and self._take("start")):
            self._finish()  # nothing runs: nobody else does it
        elif not self._depends_on_this_thread():
            self._over.wait()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is over, timeout seconds at most, and return whether it is.

        Raises TtunError if it ended by itself because it could not go on.
        """
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
        """Return a descriptor that turns readable once it is over, for select() and poll()."""
        return self._over.fileno()

    def is_alive(self) -> bool:
        """Return whether its thread has shown within ALIVE_WITHIN seconds that it goes on.

        It does so about every second, whatever it waits for. Only a callback that takes long, or a
        bug, holds it up. True where it does not run.
        """
        running = "start" in self._taken and not self._over.is_set()
        return not running or self._stop.quiet_for() < ALIVE_WITHIN

    def status(self) -> Status:
        """Return what it is doing now, from any thread."""
        missing = some(self._watch.missing, MISSING_SHOWN) if self._watch else []
        return self._record.status(self.role, self._device_name_shown, missing)

    def facts(self) -> dict[str, str | None]:
        """Return what does not change while a session lasts, in words."""
        return self._record.facts(self.role, self._device_name_shown, self._addresses)

    # ---- what a side adds ----

    def _prepare(self) -> None:  # noqa: B027 - a server needs nothing
        """Do what has to be done before the device and its routes are there. Raises TtunError."""

    def _open(self) -> None:  # noqa: B027 - a client needs nothing
        """Open what this side needs besides the device. Raises TtunError."""

    def _begin(self) -> None:  # noqa: B027
        """Start what threads this side needs besides its own. Raises TtunError."""

    def _close(self) -> None:  # noqa: B027
        """Close it again."""

    @abc.abstractmethod
    def _run(self) -> None:
        """Look for a peer, run its session, look again, until stop is set.

        What is lacking for a while may raise OSError, MemoryError or RuntimeError: it is called
        again then.
        """

    def _newcomer(self, session: Session, peer: Peer) -> None:
        """Take a peer that proved the key while a session runs."""
        peer.close()

    # ---- its thread ----

    def _take(self, step: str) -> bool:
        """Return whether this call is the first to take a step: one lookup, so no lock is held."""
        mine = [threading.get_ident()]
        return self._taken.setdefault(step, mine) is mine

    def _depends_on_this_thread(self) -> bool:
        """Return whether it cannot be over before this thread goes on with something.

        It is the endpoint's own, or it was interrupted by a signal handler in a call that opens,
        starts or closes.
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
                    # No descriptor, thread or memory: others give theirs back sooner or later.
                    wait = LACK_FIRST if time.monotonic() - began > LACK_MOST else wait
                    log.warning("%s: trying again in %.0f s", reason(error), wait)
                    self._stop.wait(wait)
                    wait = min(2 * wait, LACK_MOST)
        except TtunError as error:
            self._error = error
        except BaseException as error:  # a bug: say so in one line, without what is in memory
            self._error = TtunError(f"internal error: {type(error).__name__}: {error}")
        finally:
            self._finish()

    def _finish(self) -> None:
        """Close all that open() opened; it is over."""
        self._stop.on_beat = None
        try:
            self._pending.close()
            self._close()
            if self._watch is not None:
                self._watch.close()
        except Exception as error:
            log.warning("at the end: %s", reason(error))
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
        """Look after the device, wherever this thread waits. Raises TtunError when it is gone."""
        watch, device = self._watch, self._device
        assert watch is not None and device is not None
        watch.look(time.monotonic())
        self._device_name_shown = device.name
        if watch.device_gone:
            raise TtunError(f"the TUN device is gone: was {device.name} removed?")
        if watch.fileno() >= 0:  # anew each time: after an error nobody waits for it
            self._pending.watch(watch.fileno(), select.POLLIN)

    def _turn(self, seconds: float = SLICE) -> Peer | None:
        """Wait for something to happen and look after it, as Pending.turn() does."""
        assert self._watch is not None
        return self._pending.turn(min(seconds, max(0.0, self._watch.due - time.monotonic())))

    def _watch_connection(self, sock: socket.socket | None) -> None:
        """Have _why_dead() speak of this connection; of none: it begins anew."""
        assert self._watch is not None
        self._watch.watch_connection(sock)

    def _why_dead(self) -> str | None:
        """Return why the connection cannot live, as far as this end shows it by itself."""
        assert self._watch is not None
        return self._watch.lost_local

    def _carry(self, peer: Peer) -> float:
        """Run a session to its end; return how many seconds it lasted."""
        assert self._device is not None
        try:
            self._congestion.choose(peer.sock)
            limits = self._settings.limits
            session = Session(peer.sock, self._device, peer.keys, limits, self._buffers)
        except LACKS as error:
            peer.close()
            log.warning("no session with %s: %s", peer.name, reason(error))
            return 0.0
        try:
            self._record = self._record.begun(session, peer)
            self._tell(self.on_connected, peer.name)
            self._attend(session, peer.sock)
        except BaseException as error:  # no thread of a session may outlive the device
            session.end(reason(error))
            raise
        finally:
            why = session.wait()
            self._record = self._record.ended()
            log.info(
                "peer %s disconnected after %.0f s: %s; %s%s",
                peer.name,
                session.duration,
                why,
                carried(session.counters()),
                lost(session.way()),
            )
            self._tell(self.on_disconnected, peer.name, why)
        if session.device_lost:
            raise TtunError(f"{why}: was {self._device.name} removed?")
        return session.duration

    def _attend(self, session: Session, sock: socket.socket) -> None:
        """Look after everything around a session until it is over."""
        # Wire x1 asks the peer itself whether it is there.
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
                    newcomer = self._turn()
                except LACKS as error:  # it is for those outside, not for this session
                    if not lacking:
                        log.warning("%s: new connections have to wait", reason(error))
                    lacking = True
                    self._stop.wait(1.0)
                    continue
                lacking = False
                if newcomer is not None:
                    self._newcomer(session, newcomer)
        finally:
            self._pending.unwatch(descriptor)
            self._watch_connection(None)

    def _tell(self, callback: Callable[..., object] | None, *arguments: str) -> None:
        """Call a callback of the program's. What it raises is its own trouble: the tunnel stays."""
        if callback is None:
            return
        try:
            callback(*arguments)
        except BaseException as error:
            log.exception("a callback failed: %s: %s", type(error).__name__, error)

    def _authenticated(self, peer: Peer, then: str = "") -> None:
        keys: Keys = peer.keys
        log.info(
            "peer %s authenticated: wire %s, %s%s%s",
            peer.name,
            keys.wire,
            keys.sending.cipher.name,
            ", forward secrecy" if keys.agreement else "",
            then,
        )
