"""The client: connect to its servers in turn, run a session, reconnect, until stopped."""

from __future__ import annotations

import collections
import errno
import ipaddress
import logging
import random
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Callable

from ttun import handshake, privileges, proxy, tcp
from ttun.endpoint import Endpoint
from ttun.errors import LACKS, TtunError, UsageError, is_lack, reason
from ttun.lifecycle import LACK_MOST
from ttun.network import default_route, name_servers, netlink
from ttun.network.resolver import AMONG_OTHERS, FIRST_PATIENCE
from ttun.peer import Peer
from ttun.settings import (
    CLIENT,
    DEFAULT_LIMITS,
    Addresses,
    Limits,
    Network,
    Settings,
    check_type,
    several,
)
from ttun.transport import Candidate, Dialer

log = logging.getLogger("ttun")

# Seconds. A server that takes longer to answer was serving another client. If it then closes the
# connection, a third client was first: this one was not rejected, and may retry soon.
WAITED = 1.0


def is_tox(server: str) -> bool:
    """Return whether a server's address is one of the Tox network."""
    return server.strip().lower().startswith("tox:")


def dialer(
    server: str, mptcp: bool | None, control: str, nodes: Path | None = None, *,
    through: str | None = None, bind: str | None = None,
) -> Dialer:  # fmt: skip
    """Return the Dialer for a server address of any kind. Raises TtunError.

    mptcp, control, bind: see tcp.Dialer. nodes: a file with bootstrap nodes of the Tox network.
    through: the URL of a proxy.
    """
    if is_tox(server):
        if through is not None or bind is not None:
            raise UsageError(f"--proxy, {proxy.VARIABLE} and --bind do not work with tox:")
        from ttun.tox.transport import Dialer as ToxDialer

        return ToxDialer(server, nodes)
    if through is not None:
        return proxy.Dialer(server, through, mptcp, control, bind)
    return tcp.Dialer(server, mptcp, control, bind)


class Backoff:
    """How long to wait before the next connection attempt, in seconds.

    The delay is 1 s, doubled with each attempt up to 30 s, with jitter so that the clients of a
    restarted server do not connect all at once. A session longer than 60 s resets it. After a
    session longer than 10 s the client reconnects at once, and waits at most 1 s for the next
    minute, as most outages are short. A short session ends that minute: two clients that keep
    taking the server over from each other are not an outage.

    A server that accepts the connection but does not answer is serving another client, or the
    relay's far end is down. Retry every few seconds, to connect soon after that changes. Likewise
    when the server answered late and then served another waiting client.
    """

    FIRST, MOST, MOST_AT_FIRST = 1.0, 30.0, 1.0
    GOOD_SESSION, LONG_SESSION, AT_FIRST = 10.0, 60.0, 60.0
    UNANSWERED = 4.0  # at most, between attempts when the server closes the connection at once

    def __init__(self) -> None:
        """Start with no previous session."""
        self._delay = self._silence = self.FIRST
        self._good_session = float("-inf")  # when it ended

    def after_session(self, duration: float, now: float) -> float:
        """Return the delay after a session of duration seconds that ended now."""
        self._silence = self.FIRST
        if duration > self.LONG_SESSION:
            self._delay = self.FIRST
        if duration > self.GOOD_SESSION:
            self._good_session = now
            return 0.0
        self._good_session = float("-inf")
        return self.after_failure(now)

    def after_failure(self, now: float) -> float:
        """Return the delay after a connection attempt or handshake that failed now."""
        wait = self._delay * random.uniform(0.75, 1.0)
        self._delay = min(2 * self._delay, self.MOST)
        if now - self._good_session < self.AT_FIRST:
            wait = min(wait, self.MOST_AT_FIRST)
        return wait

    def after_move(self, now: float) -> float:
        """Return the delay after an address change or a suspend: none."""
        self._delay, self._good_session = self.FIRST, now
        return 0.0

    def after_silence(self, seconds: float) -> float:
        """Return the delay after a connection on which the peer sent nothing for seconds."""
        wait = max(self.FIRST, self._silence - seconds) * random.uniform(0.75, 1.0)
        self._silence = min(2 * self._silence, self.UNANSWERED)
        return wait


class Client(Endpoint):
    """The end that connects.

    >>> client = ttun.Client(b"secret", server="192.0.2.1:20203")
    >>> client.start()           # opens ttunN, connects in the background; raises ttun.TtunError
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
        default_route: bool = Settings.default_route,
        users: Sequence[int] = Settings.users,
        on_connected: Callable[[str], object] | None = None,
        on_disconnected: Callable[[str, str], object] | None = None,
    ) -> None:
        """key: the pre-shared key, any bytes. For options of both ends, see Settings.

        server: HOST:PORT, tox:ID, another Dialer, or several of these, tried in turn. proxy:
        its URL. bind: an address of this machine or %DEVICE. For callbacks and errors, see
        Endpoint.
        """
        settings = Settings(
            cipher, wire, mtu, mptcp, offload, congestion_control,
            buffers, device, addresses, routes, limits, default_route, users,
        )  # fmt: skip
        super().__init__([key], settings, on_connected, on_disconnected)
        check_type("proxy", proxy, str, type(None))
        check_type("bind", bind, str, type(None))
        self._dialers = collections.deque[Dialer]()
        for each in several("server", server, str, Dialer):
            if isinstance(each, str):
                each = dialer(each, mptcp, congestion_control, through=proxy, bind=bind)  # noqa: PLW2901
            check_type("the name of a dialer", getattr(each, "name", None), str)
            each.outside = default_route
            self._dialers.append(each)
        self._dialer = self._dialers[0]
        self._known: list[tuple[str, Dialer]] = []  # server addresses that routes could match
        self._best: str | None = None  # candidate of the last session

    def _prepare(self) -> None:
        """Resolve the servers before adding routes, which may capture the DNS query."""
        if self._settings.default_route:
            privileges.check(what="the default route")
        elif not self._settings.routes:
            return
        backoff = Backoff()
        patience = self._name_patience()
        while not self._stop.is_set():
            known: list[tuple[str, Dialer]] = []
            failures = []
            for each in self._dialers:
                each.name_patience = patience
                try:
                    known += [(address, each) for address in each.look_up(self._stop)]
                except InterruptedError:
                    raise
                except OSError as error:
                    failures.append(error)
            if len(failures) < len(self._dialers):
                self._known = known
                return
            if self._settings.default_route and name_servers.are_outside():
                log.info("cannot resolve %s", failures[0])  # works behind the rules too
                return
            wait = backoff.after_failure(time.monotonic())
            why = "; ".join(map(str, failures))
            log.warning("cannot resolve %s; retrying in %.1f s", why, wait)
            self._stop.wait(wait)
            patience = min(2 * patience, FIRST_PATIENCE)  # of a child: it begins anew
        raise InterruptedError

    def _name_patience(self) -> float:
        return AMONG_OTHERS if len(self._dialers) > 1 else FIRST_PATIENCE

    @property
    def _endpoint(self) -> str:
        return self._dialer.name

    def _open(self) -> None:
        known = self._known
        if self._settings.default_route and not known:
            known = [(default_route.OUTSIDE, each) for each in self._dialers]
        reasons = [self._why_not(address, each.device) for address, each in known]
        if reasons and reasons[0] and all(reasons):
            raise reasons[0]

    def _begin(self) -> None:
        super()._begin()
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
                say: Callable[..., object] = log.log if peer is None else self._sessions.say
                say(logging.INFO, "reconnecting %s", f"in {wait:.1f} s" if wait else "at once")
                self._pause(wait)

    def _pause(self, seconds: float) -> None:
        """Wait, but return early after a system suspend."""
        end = time.monotonic() + seconds
        while not self._stop.is_set() and (left := end - time.monotonic()) > 0:
            if why := self._why_dead():
                log.info("reconnecting now: %s", why)
                return
            self._pending.turn(left)

    def _why_dead(self) -> str | None:
        assert self._watch is not None
        if self._watch.suspended:
            return f"the system was suspended for {self._watch.suspended:.0f} s"
        return super()._why_dead()

    def _why_not(self, address: str, bound_to: str | None = None) -> TtunError | None:
        """Return an error if the tunnel would capture its own connection to this address.

        bound_to: the device that the connection is bound to, which no route changes.
        """
        assert self._device is not None
        try:
            target = ipaddress.ip_address(address)
        except ValueError:
            return None
        if isinstance(target, ipaddress.IPv6Address):
            target = target.ipv4_mapped or target
        if target.is_link_local:
            return None
        tunnel, way = self._device.index, netlink.device_to(target, self._users[0], bound_to)
        if way == tunnel and bound_to is None:
            found = [each for each in self._settings.routes if target in each]
            what = f"a route of {self._device.name} (ip route get {address})"
            if found:
                what = f"--route {max(found, key=lambda each: each.prefixlen)}"
            elif self._settings.default_route:
                what = "--route default"
            why = f"{what} would route the tunnel's own connection to {address} into the tunnel"
            return UsageError(why)
        if way and self._settings.default_route:
            dropped = default_route.why_dropped(target, way, tunnel)
            return TtunError(dropped) if dropped else None
        return None

    def _connect(self, backoff: Backoff) -> tuple[Peer | None, float]:
        """Try each server in turn, from the last one on, until one authenticates.

        Return that peer, or None and the seconds to wait.
        """
        self._watch_connection(None)
        waits: list[float] = []
        for _ in range(len(self._dialers)):  # not over it: it is turned meanwhile
            self._dialer = self._dialers[0]
            self._dialer.name_patience = self._name_patience()
            try:
                peer = self._try(backoff, waits)
            except TtunError as error:  # this one is over for good, or the device is gone
                assert self._watch is not None
                if len(self._dialers) == 1 or self._watch.device_gone:
                    raise
                log.warning("%s; going on without it", error)
                self._dialers.popleft().close()
                continue
            if peer is not None or self._stop.is_set():
                return peer, 0.0
            self._dialers.rotate(-1)
        return None, min(waits) if waits else backoff.after_failure(time.monotonic())

    def _try(self, backoff: Backoff, waits: list[float]) -> Peer | None:
        """Dial each address of a server and shake hands, until one has proved the key.

        Returns that peer, or None; adds to waits how many seconds may be waited.
        """
        failures = []
        try:
            found = self._dialer.candidates(self._stop)
            for candidate in sorted(found, key=lambda each: each.name != self._best):
                log.debug("connecting to %s", candidate.name)
                try:
                    sock = self._dial(candidate)
                except InterruptedError:
                    raise
                except LACKS as error:
                    failures.append(error)
                    if getattr(error, "errno", None) == errno.ECONNRESET:
                        # Accepted, then reset; otherwise ECONNREFUSED (tcp_reset() in Linux).
                        waits.append(backoff.after_silence(0.0))
                    continue
                peer, silence = self._shake_hands(sock, candidate)
                if peer is not None:
                    self._best = candidate.name
                    return peer
                if silence is not None:
                    waits.append(backoff.after_silence(silence))
        except InterruptedError:
            return None
        except LACKS as error:
            failures.append(error)
        if failures and not self._stop.is_set():
            name = self._dialer.name
            host = name.rpartition(":")[0]  # the server is named once
            reasons = (reason(x).removeprefix(f"{name}: ") for x in failures)
            why = "; ".join(each.removeprefix(f"{host}: ") for each in reasons)
            log.warning("cannot connect to %s: %s", name, why)
            self._attempt_failed(why)
        if any(map(is_lack, failures)):
            waits.append(LACK_MOST)
        return None

    def _dial(self, candidate: Candidate) -> socket.socket:
        address, device = candidate.address, self._dialer.device
        if address is not None and (why := self._why_not(address, device)):
            raise OSError(str(why))
        return candidate.dial(self._stop)

    def _shake_hands(
        self, sock: socket.socket, candidate: Candidate
    ) -> tuple[Peer | None, float | None]:
        """Run the handshake.

        Return the peer, or None and the seconds of silence, None if it answered.
        """
        began = time.monotonic()
        steps = handshake.client(self._ks[0], self._terms)
        patience = self._dialer.patience
        attempt = self._pending.add(sock, candidate.name, self._dialer.kind, steps, patience)
        try:
            self._watch_connection(attempt.sock)
            answered_after = float("inf")  # until its first byte
            while not self._stop.is_set():
                why = self._why_dead()
                if why is not None and self._pending.is_pending(attempt):
                    self._pending.give_up(attempt, why)
                    self._moved = True
                if attempt.spoke:
                    answered_after = min(answered_after, time.monotonic() - began)
                if not self._pending.is_pending(attempt):
                    waited = patience is None and answered_after > WAITED
                    return None, time.monotonic() - began if waited else None
                peer = self._pending.turn()
                if peer is not None:
                    return peer._replace(name=self._dialer.name), None
        except BaseException as error:  # or it would go on beside the next attempt
            if self._pending.is_pending(attempt):
                self._pending.give_up(attempt, reason(error))
            raise
        raise InterruptedError
