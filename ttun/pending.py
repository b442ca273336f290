"""Pending handshakes, concurrent and limited in number; the event loop of an endpoint.

Idle half-open connections must not block the real client, so handshakes run concurrently. Each
costs a descriptor and less than a kilobyte. The endpoint's thread calls turn() in a loop, without a
session and during one:

 1. A half-open connection is readable: read the client's nonce, which starts its handshake, and
    continue it. This comes before accepting more connections.
 2. The listener is readable: drop a half-open connection if the limit is reached, then accept.
    Silent ones are dropped first, those whose nonce showed the key last.
 3. A handshake has ended: return an authenticated peer; log and close a failed one. The log is rate
    limited, with a summary.
 4. A connection is closed ten seconds after it was made, however much it sends.

During a session without takeover, new connections are held: accepted, but answered only after the
session has ended. If only x1 is accepted, an unauthenticated client gets no answer, not even a
close, before a random time has passed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import resource
import select
import socket
import time
from typing import Callable

from ttun import tcp
from ttun.conversation import CLOSED, Conversation
from ttun.errors import ProtocolError, UnrecognizedError, is_lack, reason
from ttun.flag import SLICE, Flag
from ttun.handshake import NONCE_SIZE, NOT_X1, TIMEOUT, Keys, Steps
from ttun.peer import HalfOpen, Host, Peer
from ttun.summary import Summary
from ttun.transport import checked

log = logging.getLogger("ttun")

MOST = 256  # pending handshakes, if the descriptor limit allows
MOST_PER_SOURCE = 64  # of them from one IPv4 address or one IPv6 /64
SHARE = 4  # one network gets at most a quarter of the limit
MOST_HELD = 16  # during a session
HELD_TIMEOUT = 15.0  # seconds; clients time out after 10
UNRECOGNIZED_TIMEOUT = (10.0, 60.0)  # seconds: a random time in this range
RESERVE = 8  # descriptors kept for the session, hooks, name lookups, status queries
ACCEPTS = 16  # per turn
PAUSE = 1.0  # seconds without accepting after an error
GONE = select.POLLERR | select.POLLHUP | select.POLLNVAL


class Pending:
    """The pending handshakes of an endpoint. close() closes them."""

    def __init__(self, stop: Flag) -> None:
        """stop: turn() returns at once when it is set, and records its heartbeats there."""
        self.on_failure: Callable[[str], object] = lambda why: None  # of a handshake
        self._stop = stop
        self._poll = select.poll()
        self._poll.register(stop, select.POLLIN)
        self.watched: set[int] = set()  # descriptors given to watch(), until an error of them
        self._half_open: dict[int, HalfOpen] = {}  # by descriptor, oldest first
        self._host: Host | None = None
        self._silent = False  # never answer an unauthenticated client
        self._holding = False
        self._announced: set[str] = set()  # sources of clients logged as waiting
        self._resume_at: float | None = None  # when to accept again
        self._allowed, self._allowed_at = 1, float("-inf")
        # Limit the log: a flood of connections must not fill the disk.
        self._connected = Summary("%d more connected", logging.INFO)
        self._failed = Summary("%d more handshakes failed")
        self._not_accepted = Summary("%d more connections not accepted")
        self._told = False  # of the shortage that keeps it from accepting

    def listen(self, host: Host) -> None:
        """Accept the connections of a listener."""
        self._host, self._silent = host, host.silent
        self._poll.register(host.listener, select.POLLIN)

    def watch(self, descriptor: int, events: int = 0) -> None:
        """Have turn() return on events of this descriptor; the caller handles them."""
        self.watched.add(descriptor)
        self._poll.register(descriptor, events)

    def unwatch(self, descriptor: int) -> None:
        """Stop watching a descriptor, if it is watched."""
        self.watched.discard(descriptor)
        with contextlib.suppress(KeyError):
            self._poll.unregister(descriptor)

    def hold(self) -> None:
        """Hold new connections; drop handshakes already started."""
        for peer in list(self._half_open.values()):
            if peer.handshake is not None:
                self._close(peer)
            elif len(peer.nonce) == NONCE_SIZE:  # released, not yet started
                self._poll.modify(peer.sock, select.POLLRDHUP)
        self._holding = True
        self._announced.clear()

    def release(self) -> None:
        """Start the handshakes of held connections, oldest first; hold no more."""
        self._holding = False
        for peer in [each for each in self._half_open.values() if not each.unrecognized]:
            self._announce(peer, "handshaking")
            if not self._silent:
                peer.deadline = time.monotonic() + TIMEOUT
            if len(peer.nonce) == NONCE_SIZE:
                self._poll.modify(peer.sock, select.POLLOUT)  # turn() starts its handshake

    @property
    def key_waits(self) -> bool:
        """Whether a client is held that shows the key."""
        return self._holding and any(peer.knows_key for peer in self._half_open.values())

    def add(
        self, sock: socket.socket, name: str, kind: Callable[[socket.socket], str], steps: Steps,
        seconds: float | None = None,
    ) -> HalfOpen:  # fmt: skip
        """Take ownership of a connected socket, and start a handshake. kind: of its Dialer.

        seconds: its time limit, if not TIMEOUT.
        """
        now = time.monotonic()
        sock, transport = self._prepare(sock, kind)
        talk, deadline = Conversation(sock, steps), now + (seconds or TIMEOUT)
        peer = HalfOpen(sock, name, transport, name, now, deadline, talk, dialled=True)
        self._admit(peer, select.POLLOUT)
        return peer

    def is_pending(self, peer: HalfOpen) -> bool:
        """Return whether a handshake is still pending."""
        return self._half_open.get(peer.sock.fileno()) is peer

    def give_up(self, peer: HalfOpen, why: str) -> None:
        """End a pending handshake, with a reason for the log."""
        if not peer.unrecognized and not self._holding:  # held connections are not logged
            self._handshake_failed(peer, why)
        self._close(peer)

    def turn(self, seconds: float = SLICE) -> Peer | None:
        """Wait for events, for at most seconds, and handle them.

        Return an authenticated peer, or None.
        """
        seconds = min(seconds, self._stop.beat())
        now = time.monotonic()
        for peer in [peer for peer in self._half_open.values() if peer.deadline <= now]:
            self.give_up(peer, peer.explain(f"timed out after {now - peer.since:.0f} s"))
        self._sum_up(now)
        if self._resume_at is not None and now >= self._resume_at:
            assert self._host is not None
            self._resume_at = None
            self._poll.register(self._host.listener, select.POLLIN)
        first = min((peer.deadline for peer in self._half_open.values()), default=now + seconds)
        listener = None if self._host is None else self._host.listener.fileno()
        accept = False
        for descriptor, what in self._poll.poll(1000 * max(0.0, min(first - now, seconds))):
            if descriptor == listener:
                accept = True
            elif descriptor in self._half_open:
                authenticated = self._advance(self._half_open[descriptor], what)
                if authenticated is not None:
                    return authenticated
            elif descriptor == self._stop.fileno():
                self._stop.set()  # by another process, with which a fork shares it
            elif what & GONE:
                self.unwatch(descriptor)  # report it once; its owner checks it
        if accept and not self._stop.is_set():
            self._accept()
        return None

    def close(self) -> None:
        """Close all pending connections. The caller closes the listener."""
        for peer in list(self._half_open.values()):
            self._close(peer)
        self._sum_up(time.monotonic(), end=True)

    def _sum_up(self, now: float, *, end: bool = False) -> None:
        for summary in (self._connected, self._failed, self._not_accepted):
            summary.tick(now, end=end)

    # ---- accepting ----

    def _accept(self) -> None:
        """Accept some connections, up to the limit."""
        assert self._host is not None
        for number in range(ACCEPTS):
            if len(self._half_open) >= self._most_pending():
                if number > 0:
                    return  # handle readable peers first
                self._evict(list(self._half_open.values()))
            try:
                arrival = self._host.listener.accept()
            except (BlockingIOError, ConnectionError, InterruptedError):
                return  # closed meanwhile
            except OSError as error:
                self._cannot_accept(error)
                return
            try:
                sock, kind = self._prepare(arrival.sock, self._host.listener.kind)
                self._accepted(sock, arrival.name, arrival.source, kind)
                self._told = False
            except OSError as error:  # e.g. no kernel memory
                self._cannot_accept(error)
                return

    def _accepted(self, sock: socket.socket, name: str, source: str, transport: str) -> None:
        same = [peer for peer in self._half_open.values() if peer.source == source]
        if len(same) >= min(MOST_PER_SOURCE, self._most_pending() // SHARE + 1):
            self._evict(same)
        now = time.monotonic()
        if self._silent:
            deadline = now + random.uniform(*UNRECOGNIZED_TIMEOUT)
        else:
            deadline = now + (HELD_TIMEOUT if self._holding else TIMEOUT)
        self._admit(HalfOpen(sock, name, transport, source, now, deadline), select.POLLIN)

    def _announce(self, peer: HalfOpen, what: str) -> None:
        text = f"peer %s connected over %s; {what}"
        self._connected.log(time.monotonic(), text, peer.name, peer.transport)

    def _cannot_accept(self, error: OSError) -> None:
        """Log the error and drop a pending connection; if there is none, pause the listener."""
        if not self._told:  # one line, not one a second
            text = "cannot accept a connection: %s"
            self._not_accepted.log(time.monotonic(), text, error.strerror or error)
        self._told = True
        if self._half_open and is_lack(error):
            self._evict(list(self._half_open.values()))
            return
        assert self._host is not None
        self._poll.unregister(self._host.listener)
        self._resume_at = time.monotonic() + PAUSE

    def _most_pending(self) -> int:
        """Return the current limit of pending handshakes."""
        now = time.monotonic()
        if now - self._allowed_at >= 1:
            self._allowed, self._allowed_at = _descriptor_limit(len(self._half_open)), now
        # A silent server must not reveal whether a session is running.
        return min(MOST_HELD if self._holding and not self._silent else MOST, self._allowed)

    def _evict(self, many: list[HalfOpen]) -> None:
        """Drop a connection of the lowest priority: the oldest, or a random one."""
        now = time.monotonic()
        least = min(peer.worth(now) for peer in many)
        victims = [peer for peer in many if peer.worth(now) == least]
        victim = victims[0] if least <= 1 else random.choice(victims)
        self.give_up(victim, "too many pending handshakes")

    # ---- receiving ----

    def _advance(self, peer: HalfOpen, what: int) -> Peer | None:
        """Continue a handshake; return the peer if it is now authenticated."""
        if peer.unrecognized:
            self._discard(peer, what)
            return None
        if what & select.POLLOUT:
            self._poll.modify(peer.sock, select.POLLIN)
        try:
            keys = peer.handshake.advance() if peer.handshake else self._take_nonce(peer, what)
        except BlockingIOError:
            pass
        except (ProtocolError, OSError) as error:
            if self._silent and isinstance(error, UnrecognizedError):
                self._handshake_failed(peer, str(error))
                self._leave_unanswered(peer)
            else:
                self.give_up(peer, peer.explain(reason(error)))
        except BaseException:  # no memory: the handshake cannot continue
            self._close(peer)
            raise
        else:
            if keys is not None:
                self._forget(peer)
                return Peer(peer.sock, peer.name, peer.transport, keys)
        return None

    def _take_nonce(self, peer: HalfOpen, what: int) -> Keys | None:
        """Read a client's nonce; start its handshake or, during a session, hold it."""
        assert self._host is not None
        if (missing := NONCE_SIZE - len(peer.nonce)) > 0:
            data = peer.sock.recv(missing)
            if not data and self._silent:
                raise UnrecognizedError("connection closed before authentication")
            if not data:
                raise ProtocolError(CLOSED)
            peer.nonce += data
            if len(peer.nonce) < NONCE_SIZE:
                return None
            peer.knows_key = self._host.knows_key(bytes(peer.nonce))
            if self._holding:
                self._hold(peer)
        elif what & (GONE | select.POLLRDHUP):
            self._close(peer)  # disconnected while held
            return None
        return None if self._holding else self._begin(peer)

    def _hold(self, peer: HalfOpen) -> None:
        """Hold a client, and notice if it disconnects."""
        if self._silent and not peer.knows_key:
            raise UnrecognizedError(NOT_X1)
        self._limit(peer, HELD_TIMEOUT)
        self._poll.modify(peer.sock, select.POLLRDHUP)
        if peer.source not in self._announced and len(self._announced) < MOST_HELD:
            self._announced.add(peer.source)  # it reconnects every few seconds
            self._announce(peer, "waiting: another client is connected")

    def _begin(self, peer: HalfOpen) -> Keys | None:
        """Start the handshake of a client whose nonce was received."""
        assert self._host is not None
        peer.handshake = Conversation(peer.sock, self._host.begin(), peer.nonce)
        keys = peer.handshake.advance()
        self._limit(peer, TIMEOUT)
        return keys

    def _limit(self, peer: HalfOpen, seconds: float) -> None:
        """Replace a silent server's random timeout, once the nonce showed the key."""
        if self._silent:
            peer.deadline = time.monotonic() + seconds

    def _leave_unanswered(self, peer: HalfOpen) -> None:
        """Send nothing to an unauthenticated client, whatever it sends, until it times out."""
        peer.unrecognized = True
        if peer.handshake is not None:
            peer.handshake.close()
            peer.handshake = None
        peer.nonce.clear()
        self._discard(peer)

    def _discard(self, peer: HalfOpen, what: int = 0) -> None:
        try:
            if peer.sock.recv(65536):
                return
        except BlockingIOError:
            return
        except OSError:  # reset: the peer has gone
            self._close(peer)
            return
        if what & GONE:  # reset after EOF: recv() reports EOF only, and poll() would spin
            self._close(peer)
        else:
            self._poll.modify(peer.sock, 0)  # do not answer its close

    # ---- bookkeeping ----

    @staticmethod
    def _prepare(
        sock: socket.socket, kind: Callable[[socket.socket], str]
    ) -> tuple[socket.socket, str]:
        """Return its kind and a socket that nobody else can close: its number may soon be another
        file's. Close one of no use.
        """
        try:
            transport = kind(checked(sock))
            if type(sock) is socket.socket and sock.fileno() >= 0:
                sock = socket.socket(fileno=sock.detach())
            sock.setblocking(False)
        except BaseException:
            if isinstance(sock, socket.socket):
                sock.close()
            raise
        tcp.tune(sock)
        return sock, transport

    def _admit(self, peer: HalfOpen, events: int) -> None:
        self._half_open[peer.sock.fileno()] = peer
        self._poll.register(peer.sock, events)
        if not self._holding:
            self._announce(peer, "handshaking")

    def _handshake_failed(self, peer: HalfOpen, why: str) -> None:
        why = f"handshake with {peer.name} failed: {why}"
        self._failed.log(time.monotonic(), "%s", why)
        self.on_failure(why)

    def _close(self, peer: HalfOpen) -> None:
        self._forget(peer)
        peer.sock.close()

    def _forget(self, peer: HalfOpen) -> None:
        del self._half_open[peer.sock.fileno()]
        self.unwatch(peer.sock.fileno())
        if peer.handshake is not None:
            peer.handshake.close()


def _descriptor_limit(pending: int) -> int:
    """Return how many pending handshakes the descriptor limit allows."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return MOST
    try:
        used = len(os.listdir("/proc/self/fd")) - pending
    except OSError:  # no /proc, or no free descriptor
        used = 24
    return max(1, limit - used - RESERVE)
