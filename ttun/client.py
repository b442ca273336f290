"""The client: dials its servers in turn, runs a session, and dials again, for ever."""

from __future__ import annotations

import collections
import errno
import logging
import random
import socket
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Callable

from ttun import handshake, proxy, tcp
from ttun.endpoint import LACK_MOST, Endpoint
from ttun.errors import LACKS, UsageError, is_lack
from ttun.peer import Peer
from ttun.routes import catching
from ttun.settings import (
    CLIENT,
    DEFAULT_LIMITS,
    Addresses,
    Limits,
    Network,
    Settings,
    several,
)
from ttun.transport import Candidate, Dialer

log = logging.getLogger("ttun")

# Seconds. A server that took so long to answer had another client. If it then closes the connection
# it has taken the next one who waited: this one was not refused, and waits again.
WAITED = 1.0


def dialer(
    server: str,
    mptcp: bool | None,
    control: str,
    nodes: Path | None = None,
    *,
    through: str | None = None,
    bind: str | None = None,
) -> Dialer:
    """Return what reaches a server, whatever its address is like. Raises TtunError.

    mptcp, control, bind: as tcp.Dialer takes them. nodes: a file of nodes to enter the Tox network
    by. through: the URL of a proxy.
    """
    if server.strip().lower().startswith("tox:"):
        if through is not None or bind is not None:
            raise UsageError(f"--proxy, {proxy.VARIABLE} and --bind do not work with tox:")
        from ttun.tox.transport import Dialer as ToxDialer

        return ToxDialer(server, nodes)
    if through is not None:
        return proxy.Dialer(server, through, mptcp, control, bind)
    return tcp.Dialer(server, mptcp, control, bind)


class Backoff:
    """How long to wait before the next dial, in seconds.

    1 s, doubled with each attempt up to 30 s, with jitter so that many clients of a server that
    comes back do not come all at once; back to 1 s after a session of over 60 s. At once after a
    session of over 10 s, and for a minute after it never more than 1 s: most outages are short.
    That ends with the first short session: two clients with one key that take the server over from
    each other are no outage.

    A server that takes the connection and does not answer has another client, or its end of a
    relay is away: it is dialled again every few seconds, to be in soon after that changes.
    The same holds for one that answered late and took another client that had waited too.
    """

    FIRST, MOST, MOST_AT_FIRST = 1.0, 30.0, 1.0
    GOOD_SESSION, LONG_SESSION, AT_FIRST = 10.0, 60.0, 60.0
    UNANSWERED = 4.0  # at most, from one dial to the next where the server hung up at once

    def __init__(self) -> None:
        """Start as if there had never been a session."""
        self._delay = self._silence = self.FIRST
        self._good_session = float("-inf")  # when it ended

    def after_session(self, duration: float, now: float) -> float:
        """Return the wait after a session that lasted duration seconds and ended now."""
        self._silence = self.FIRST
        if duration > self.LONG_SESSION:
            self._delay = self.FIRST
        if duration > self.GOOD_SESSION:
            self._good_session = now
            return 0.0
        self._good_session = float("-inf")
        return self.after_failure(now)

    def after_failure(self, now: float) -> float:
        """Return the wait after a dial or a handshake that failed now."""
        wait = self._delay * random.uniform(0.75, 1.0)
        self._delay = min(2 * self._delay, self.MOST)
        if now - self._good_session < self.AT_FIRST:
            wait = min(wait, self.MOST_AT_FIRST)
        return wait

    def after_move(self, now: float) -> float:
        """Return the wait after this end has moved or slept: none, as after an outage."""
        self._delay, self._good_session = self.FIRST, now
        return 0.0

    def after_silence(self, seconds: float) -> float:
        """Return the wait after a connection whose peer said nothing for so many seconds."""
        wait = max(self.FIRST, self._silence - seconds) * random.uniform(0.75, 1.0)
        self._silence = min(2 * self._silence, self.UNANSWERED)
        return wait


class Client(Endpoint):
    """The end that dials.

    >>> client = ttun.Client(b"secret", server="192.0.2.1:20203")
    >>> client.start()           # opens ttunN, then dials in the background; raises ttun.TtunError
    >>> client.status().peer     # None until it is connected
    >>> client.stop()
    """

    role = "client"
    addresses = CLIENT

    def __init__(
        self,
        key: bytes,
        *,
        server: str | Dialer | Sequence[str | Dialer],
        proxy: str | None = None,
        bind: str | None = None,
        cipher: str | None = Settings.cipher,
        wire: str = Settings.wire,
        mtu: int = Settings.mtu,
        mptcp: bool | None = Settings.mptcp,
        offload: bool = Settings.offload,
        congestion_control: str = Settings.congestion_control,
        buffers: str = Settings.buffers,
        device: str = Settings.device,
        addresses: Addresses | None = Settings.addresses,
        routes: Sequence[Network] = Settings.routes,
        limits: Limits = DEFAULT_LIMITS,
        on_connected: Callable[[str], object] | None = None,
        on_disconnected: Callable[[str, str], object] | None = None,
    ) -> None:
        """Take the pre-shared key, any bytes; see Settings for what both ends can be told.

        server: HOST:PORT, tox:ID, another Dialer, or several of these, to be tried in turn. proxy:
        its URL. bind: an address of this machine or %DEVICE. Callbacks and errors: see Endpoint.
        """
        settings = Settings(
            cipher, wire, mtu, mptcp, offload, congestion_control,
            buffers, device, addresses, routes, limits,
        )  # fmt: skip
        super().__init__(key, settings, on_connected, on_disconnected)
        self._dialers = collections.deque[Dialer]()
        for each in several("server", server, str, Dialer):
            if isinstance(each, str):
                each = dialer(each, mptcp, congestion_control, through=proxy, bind=bind)  # noqa: PLW2901
            self._dialers.append(each)
        self._dialer = self._dialers[0]
        self._known: Sequence[str] = ()  # addresses that routes could catch
        self._best: str | None = None  # the candidate of the last session

    def _prepare(self) -> None:
        """Find the servers' addresses before routes are there that may catch the question."""
        if not self._settings.routes:
            return
        backoff = Backoff()
        while not self._stop.is_set():
            known: list[str] = []
            failures = []
            for each in self._dialers:
                try:
                    known += each.look_up(self._stop)
                except InterruptedError:
                    raise
                except OSError as error:
                    failures.append(error)
            if len(failures) < len(self._dialers):
                self._known = known
                return
            wait = backoff.after_failure(time.monotonic())
            what = "; ".join(map(str, failures))
            log.info("cannot look up %s; trying again in %.1f s", what, wait)
            self._stop.wait(wait)
        raise InterruptedError

    def _open(self) -> None:
        reasons = [self._caught(address) for address in self._known]
        if reasons and all(reasons):
            raise UsageError(str(reasons[0]))

    def _begin(self) -> None:
        for each in self._dialers:
            each.start()

    def _close(self) -> None:
        for each in self._dialers:
            each.close()

    def _run(self) -> None:
        backoff = Backoff()
        while not self._stop.is_set():
            self._moved = False
            peer, wait = self._connect(backoff)
            if peer is not None:
                self._authenticated(peer)
                duration = self._carry(peer)
                wait = backoff.after_session(duration, time.monotonic())
            if self._moved:
                wait = backoff.after_move(time.monotonic())
            if not self._stop.is_set():
                log.info("reconnecting %s", f"in {wait:.1f} s" if wait else "at once")
                self._pause(wait)

    def _pause(self, seconds: float) -> None:
        """Wait so long, or until the machine has slept meanwhile."""
        end = time.monotonic() + seconds
        while not self._stop.is_set() and (left := end - time.monotonic()) > 0:
            if why := self._why_dead():
                log.info("dialling now: %s", why)
                return
            self._turn(left)

    def _why_dead(self) -> str | None:
        assert self._watch is not None
        if self._watch.suspended:
            return f"the machine was suspended for {self._watch.suspended:.0f} s"
        return super()._why_dead()

    def _caught(self, address: str) -> str | None:
        """Return why an address cannot be dialled: a route of ours would carry it."""
        assert self._device is not None
        route = catching(self._settings.routes, address, self._device.name)
        if route is None:
            return None
        return f"the route to {route} would carry the tunnel's own way to {address}"

    def _connect(self, backoff: Backoff) -> tuple[Peer | None, float]:
        """Try each server in turn, from the last one on, until one has proved the key.

        Returns that peer, or None and how many seconds to wait.
        """
        self._watch_connection(None)
        waits: list[float] = []
        for _ in self._dialers:
            self._dialer = self._dialers[0]
            peer = self._try(backoff, waits)
            if peer is not None or self._stop.is_set():
                return peer, 0.0
            self._dialers.rotate(-1)
        usual = backoff.after_failure(time.monotonic()) if len(waits) == 0 else 0.0
        return None, min(waits, default=usual)

    def _try(self, backoff: Backoff, waits: list[float]) -> Peer | None:
        """Dial each address of a server and shake hands, until one has proved the key.

        Returns that peer, or None; adds to waits how many seconds may be waited.
        """
        failures = []
        try:
            found = self._dialer.candidates(self._stop)
            for candidate in sorted(found, key=lambda each: each.name != self._best):
                try:
                    sock = self._dial(candidate)
                except InterruptedError:
                    raise
                except LACKS as error:
                    failures.append(error)
                    if getattr(error, "errno", None) == errno.ECONNRESET:
                        # It was taken; one that was not is ECONNREFUSED: tcp_reset() of Linux.
                        waits.append(backoff.after_silence(0.0))
                    continue
                peer, silent_for = self._shake_hands(sock, candidate)
                if peer is not None:
                    self._best = candidate.name
                    return peer
                if silent_for is not None:
                    waits.append(backoff.after_silence(silent_for))
        except InterruptedError:
            return None
        except LACKS as error:
            failures.append(error)
        if failures and not self._stop.is_set():
            log.info("cannot connect to %s: %s", self._dialer.name, "; ".join(map(str, failures)))
        if any(map(is_lack, failures)):
            waits.append(LACK_MOST)
        return None

    def _dial(self, candidate: Candidate) -> socket.socket:
        if candidate.address is not None and (why := self._caught(candidate.address)):
            raise OSError(why)
        return candidate.dial(self._stop)

    def _shake_hands(
        self, sock: socket.socket, candidate: Candidate
    ) -> tuple[Peer | None, float | None]:
        """Prove the key to each other.

        Returns the peer, or None and for how many seconds it was silent, None if it was not.
        """
        began = time.monotonic()
        steps = handshake.client(self._k, self._terms)
        attempt = self._pending.add(sock, candidate.name, self._dialer.kind(sock), steps)
        try:
            self._watch_connection(sock)
            silent_for: float | None = None  # until it answered
            while not self._stop.is_set():
                why = self._why_dead()
                if why is not None and self._pending.is_pending(attempt):
                    self._pending.give_up(attempt, why)
                    self._moved = True
                if silent_for is None and attempt.spoke:
                    silent_for = time.monotonic() - began
                if not self._pending.is_pending(attempt):
                    waited = silent_for is None or silent_for > WAITED
                    return None, time.monotonic() - began if waited else None
                peer = self._turn()
                if peer is not None:
                    return replace(peer, name=self._dialer.name), None
        except BaseException as error:  # else it would be served beside the next one
            if self._pending.is_pending(attempt):
                self._pending.give_up(attempt, str(error))
            raise
        raise InterruptedError
