"""What a server and a client have in common: the device, one session at a time, start and stop.

A thread of the endpoint's own looks for a peer, runs its session to the end, and looks again. The
device is opened by open() or start() and outlives the sessions.
"""

from __future__ import annotations

import abc
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Callable, ClassVar

from ttun import cipher as ciphers
from ttun import link
from ttun._codec import lib
from ttun.buffers import find as find_buffers
from ttun.control import DEFAULT_LIMITS, Limits
from ttun.device import DEFAULT_MTU, FIRST_FREE, MAX_MTU, MIN_MTU, Addresses, Device
from ttun.errors import TtunError, UsageError
from ttun.handshake import V1_DEFAULT, Keys, Terms, psk_key
from ttun.handshakes import Peer
from ttun.routes import Network
from ttun.session import Counters, Session
from ttun.stop import StopFlag
from ttun.vanished import Watch
from ttun.version import __version__

log = logging.getLogger("ttun")

WIRES = ["auto", "v1", "x1"]
V1_CIPHERS = ["chacha20-poly1305", "aes-256-gcm"]


@dataclass(frozen=True)
class Status:
    """What an endpoint is doing now."""

    role: str  # "server" or "client"
    device: str | None  # "ttun0"; None before start
    peer: str | None  # "192.0.2.1:20203"; None while there is no session
    transport: str | None  # "tcp" or "mptcp"
    wire: str | None  # "v1" or "x1"
    cipher: str | None  # of the session
    round_trip: float | None  # seconds, when it was measured last; on wire x1
    rekeys: int | None  # how often this session got fresh keys; on wire x1
    connected_for: float | None  # seconds
    silent_for: float | None  # seconds since a frame of the peer was opened
    sessions: int  # how many there have been, this one included
    counters: Counters  # of this session, or the last one
    totals: Counters  # of all sessions


class Endpoint(abc.ABC):
    """One end of a tunnel. Use Server or Client.

    key: the pre-shared key, any bytes. cipher: a name of ttun.cipher.CIPHERS, the only one that may
    carry packets; None for the best that both ends have. mtu: of the device, 576 to 65519. mptcp:
    True, False, or None for what is usual on that side. offload: use what the kernel has of it at
    the device. wire: "v1", "x1", or "auto" for x1 with a peer that has it. limits: how long keys of
    wire x1 live. device: its name, with %d for the first free number. addresses: in the tunnel, if
    not the usual ones. routes: networks to be reached through it. buffers: "normal", or "small"
    where memory is scarce. on_connected is called with the peer's address, on_disconnected with
    that and the reason, both on the endpoint's thread. Raises UsageError for a bad value, TtunError
    for what this machine lacks.
    """

    role: ClassVar[str]
    addresses: ClassVar[Addresses]

    def __init__(
        self,
        key: bytes,
        *,
        cipher: str | None = None,
        mtu: int = DEFAULT_MTU,
        mptcp: bool | None = None,
        offload: bool = True,
        wire: str = "auto",
        limits: Limits = DEFAULT_LIMITS,
        device: str = FIRST_FREE,
        addresses: Addresses | None = None,
        routes: Sequence[Network] = (),
        buffers: str = "normal",
        on_connected: Callable[[str], None] | None = None,
        on_disconnected: Callable[[str, str], None] | None = None,
    ) -> None:
        """Check the values; nothing is opened before open() or start()."""
        if not key:
            raise UsageError("the key is empty")
        if not MIN_MTU <= mtu <= MAX_MTU:
            raise UsageError(f"an MTU of {mtu}: it goes from {MIN_MTU} to {MAX_MTU}")
        self._terms = _terms(wire, cipher, mtu)
        self._limits = limits
        self._k = psk_key(key)
        self._mtu = mtu
        self._name = _device_name(device)
        self._addresses = addresses or self.addresses
        self._routes = list(routes)
        self._buffers = find_buffers(buffers)
        self._mptcp = mptcp
        self._offload = offload
        self.on_connected = on_connected
        self.on_disconnected = on_disconnected
        self._stop = StopFlag()
        self._over = threading.Event()
        self._lock = threading.Lock()  # over what follows, down to _since
        self._device: Device | None = None
        self._session: Session | None = None
        self._peer: str | None = None
        self._transport: str | None = None
        self._wire = self._cipher = self._last_peer = ""
        self._why: str | None = None  # why the session is ended, if not by itself
        self._sessions = 0
        self._earlier = Counters()  # of all sessions before this one
        self._since = 0.0
        self._error: TtunError | None = None
        self._thread = threading.Thread(target=self._main, name=f"ttun-{self.role}", daemon=True)

    def open(self) -> None:
        """Open the device (and the server's port): all that takes privileges. Raises TtunError."""
        log.info("ttun %s %s", __version__, self.role)
        self._device = Device(
            self._addresses,
            self._mtu,
            self._offload,
            self._name,
            self._routes,
            queue=self._buffers.queue,
        )
        self._terms = replace(self._terms, features=self._device.offload >> 1)
        try:
            self._open()
        except BaseException:
            self._release()
            raise

    def start(self) -> None:
        """Go to work on a thread; open() first, if that was not done. Raises TtunError."""
        if self._device is None:
            self.open()
        try:
            self._begin()
            self._thread.start()
        except BaseException:  # the process may have no more threads
            self._release()
            raise

    def stop(self) -> None:
        """End the session and the endpoint; return when both are gone, within a second."""
        self._stop.set()
        with self._lock:
            session = self._session
        if session is not None:
            session.stop()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is over, timeout seconds at most, and return whether it is.

        Raises TtunError if it ended by itself because it could not go on.
        """
        over = self._over.wait(timeout)
        if over and self._error is not None:
            raise self._error
        return over

    def when_over(self, call: Callable[[], object]) -> None:
        """Have call called, on some thread, once it is over; at once if it is."""

        def wait_and_call() -> None:
            self._over.wait()
            call()

        threading.Thread(target=wait_and_call, name="ttun-over", daemon=True).start()

    def status(self) -> Status:
        """Return what it is doing now, from any thread."""
        with self._lock:
            session, connected = self._session, self._peer is not None
            control = session.control if session and connected else None
            counters = session.counters() if session else Counters()
            return Status(
                role=self.role,
                device=self._device.name if self._device else None,
                peer=self._peer,
                transport=self._transport if connected else None,
                wire=self._wire if connected else None,
                cipher=self._cipher if connected else None,
                round_trip=control.rtt if control else None,
                rekeys=control.rekeys if control else None,
                connected_for=time.monotonic() - self._since if connected else None,
                silent_for=session.silence() if session and connected else None,
                sessions=self._sessions,
                counters=counters,
                totals=self._earlier.plus(counters),
            )

    def facts(self) -> dict[str, str | None]:
        """Return what does not change while a session lasts, in words."""
        ours, device = self._addresses, self._device
        with self._lock:
            return {
                "role": self.role,
                "device": device.name if device else None,
                "peer": self._last_peer,
                "wire": self._wire,
                "cipher": self._cipher,
                "local4": str(ours.ipv4),
                "local6": str(ours.ipv6),
            }

    def _open(self) -> None:  # noqa: B027 - a client needs nothing
        """Open what this side needs besides the device. Raises TtunError."""

    def _begin(self) -> None:  # noqa: B027
        """Start what threads this side needs besides its own. Raises TtunError."""

    def _close(self) -> None:  # noqa: B027
        """Close it again."""

    @abc.abstractmethod
    def _run(self) -> None:
        """Look for a peer, run its session, look again, until stop is set."""

    def _main(self) -> None:
        try:
            self._run()
        except TtunError as error:
            self._error = error
        except Exception as error:  # a bug: say so in one line, without what is in memory
            self._error = TtunError(f"internal error: {type(error).__name__}: {error}")
        finally:
            self._release()
            self._over.set()

    def _release(self) -> None:
        """Close all that open() opened."""
        self._close()
        assert self._device is not None
        self._device.close()

    def _carry(self, peer: Peer) -> float:
        """Run a session to its end; return how many seconds it lasted."""
        assert self._device is not None
        transport = link.transport(peer.sock)
        try:
            link.choose_congestion_control(peer.sock)
            session = Session(peer.sock, self._device, peer.keys, self._limits, self._buffers)
        except OSError as error:
            log.warning("no session with %s: %s", peer.name, error.strerror or error)
            return 0.0
        with self._lock:
            if self._session is not None:
                self._earlier = self._earlier.plus(self._session.counters())
            self._session, self._peer, self._transport = session, peer.name, transport
            self._last_peer = peer.name
            self._wire, self._cipher = peer.keys.wire, peer.keys.sending.cipher.name
            self._sessions += 1
            self._since = time.monotonic()
            self._why = None
        if self._is_unwanted():  # since the handshake
            session.stop()
        try:
            if self.on_connected:
                self.on_connected(peer.name)
        except BaseException:  # no thread may outlive the device
            session.stop()
            session.wait()
            raise
        watch = None
        if session.control is None:  # wire x1 asks the peer itself
            watch = Watch(peer.sock, lambda why: self._end_session(session, why))
        reason = session.wait()
        if watch is not None:
            watch.stop()
        with self._lock:
            reason, self._peer = self._why or reason, None
        log.info(
            "peer %s disconnected after %.0f s: %s; %s",
            peer.name,
            session.duration,
            reason,
            describe(session.counters()),
        )
        if self.on_disconnected:
            self.on_disconnected(peer.name, reason)
        if session.device_lost:
            raise TtunError(f"{reason}: was {self._device.name} removed?")
        return session.duration

    def _is_unwanted(self) -> bool:
        """Return whether a session that begins now has to end at once."""
        return self._stop.is_set()

    def _end_session(self, session: Session, why: str) -> None:
        """End a session for a reason that it does not know itself."""
        with self._lock:
            if session is self._session:
                self._why = self._why or why
        session.stop()

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


def _device_name(name: str) -> str:
    """Return a name that the kernel and every reader takes. Raises UsageError.

    The kernel wants 1 to 15 bytes, one %d at most, and none of what its isspace() knows, the byte
    0xA0 among it: dev_valid_name() and __dev_alloc_name() in net/core/dev.c. Quotes, backslashes
    and what does not print are refused too: the name goes into logs, terminals and metrics.
    """
    encoded = name.encode(errors="surrogatepass")
    if (
        not 0 < len(encoded) <= 15
        or name in (".", "..", "all", "default")  # directories of sysctl
        or set(name) & set("/: \"'`\\")
        or "%" in name.replace("%d", "", 1)
        or b"\xa0" in encoded
        or not name.isprintable()  # control and format characters; bytes that are no UTF-8
    ):
        raise UsageError(
            f"{name!r} is not a valid device name: 1 to 15 bytes of UTF-8, no blank, slash, colon, "
            "quote, backslash, control character or %, but for one %d"
        )
    return name


def _terms(wire: str, name: str | None, mtu: int) -> Terms:
    """Return what to agree to. Raises UsageError for what no peer could agree to."""
    if wire not in WIRES:
        raise UsageError(f"unknown wire {wire!r}: choose {', '.join(WIRES)}")
    cipher = None if name is None else ciphers.find(name)
    offers = [
        offer
        for offer in ([cipher] if cipher else ciphers.fast())
        if mtu + offer.tag_size <= lib.TTUN_LENGTH_MAX
    ]
    if not offers:
        raise UsageError(f"{name} and an MTU of {mtu}: with its tag a packet fits no frame")
    if cipher is None or cipher.name in V1_CIPHERS:
        return Terms(wire, cipher or V1_DEFAULT, offers)
    if wire == "v1":
        raise UsageError(f"wire v1 does not know {cipher.name}: leave --wire v1 out")
    return Terms("x1", V1_DEFAULT, offers, needs_x1=f"{cipher.name} needs wire x1")


def describe(counters: Counters) -> str:
    """Return what went through in words."""
    text = (
        f"sent {counters.uplink_packets} packets, {size_in_words(counters.uplink_bytes)}; "
        f"received {counters.downlink_packets} packets, {size_in_words(counters.downlink_bytes)}"
    )
    if counters.refused:
        text += f"; {counters.refused} of the peer's packets were refused by the kernel"
    if counters.unsendable:
        text += f"; {counters.unsendable} could not be sent"
    if counters.congested:
        text += f"; {counters.congested} were dropped as the link was full"
    if counters.forged:
        text += f"; {counters.forged} of the peer's packets did not add up"
    return text


def size_in_words(size: float) -> str:
    """Return a number of bytes in the unit that suits it."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.1f} {unit}" if unit != "B" else f"{size:.0f} B"
        size /= 1024
    return f"{size:.1f} TiB"
