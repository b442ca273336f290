"""Pending handshakes, side by side and within bounds, and the one place where an endpoint waits.

Twenty silent connections must not keep the real client out, so each handshake waits for its own
peer only. A half-open connection costs a descriptor and less than a kilobyte. turn() is called
again and again, without a session and inside one:

 1. A peer can be read: take a client's nonce, which begins its handshake, and go on with that. This
    comes before the next connection is accepted.
 2. The listener is readable: make room if there is none, and accept. A peer that showed the key is
    dropped last, one that sent something before that, a silent one first.
 3. A handshake ended: a peer that proved the key is returned, a failed one is logged and closed. Of
    many that fail only some are logged, and the number of the others.
 4. Ten seconds after a connection was made it is closed, however much it sends.

While a session runs and no other client may take over, new peers are held: accepted, not answered,
and served once the session has ended. Where only x1 is accepted, a stranger gets no answer at all,
not even the end of the connection, until a random time has passed.
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

from ttun import tcp
from ttun.conversation import CLOSED, Conversation
from ttun.errors import ProtocolError, UnrecognizedError
from ttun.flag import SLICE, Flag
from ttun.handshake import NONCE_SIZE, TIMEOUT, Keys, Steps
from ttun.peer import HalfOpen, Host, Peer
from ttun.summary import Summary

log = logging.getLogger("ttun")

MOST = 256  # pending handshakes, where the limit on descriptors leaves room for so many
MOST_PER_SOURCE = 64  # of them from one IPv4 address or one IPv6 /64
SHARE = 4  # of what there is room for, one network gets this part
MOST_HELD = 16  # while a session runs
HELD_TIMEOUT = 15.0  # seconds; a client gives up after 10
UNRECOGNIZED_TIMEOUT = (10.0, 60.0)  # seconds: a random time between them
RESERVE = 8  # descriptors left to a session, hooks, look-ups and questions for the status
ACCEPTS = 16  # of one turn
PAUSE = 1.0  # seconds without accepting where that is impossible
GONE = select.POLLERR | select.POLLHUP | select.POLLNVAL


class Pending:
    """The pending handshakes of an endpoint. Close it to close all that are left."""

    def __init__(self, stop: Flag) -> None:
        """Begin with none. turn() returns at once when stop is set, and leaves its beats there."""
        self._stop = stop
        self._poll = select.poll()
        self._poll.register(stop, select.POLLIN)
        self._half_open: dict[int, HalfOpen] = {}  # by descriptor, the oldest first
        self._host: Host | None = None
        self._silent = False  # strangers get no answer
        self._holding = False
        self._told: set[str] = set()  # networks of clients that were logged as waiting
        self._resume_at: float | None = None  # when the listener is looked at again
        self._room, self._room_at = 1, float("-inf")
        # Many strangers must not fill the disk.
        self._connected = Summary("and %d more connected")
        self._failed = Summary("and %d more handshakes failed")
        self._not_accepted = Summary("and %d more times")

    def listen(self, host: Host) -> None:
        """Accept the connections of a listener."""
        self._host, self._silent = host, host.silent
        self._poll.register(host.listener, select.POLLIN)

    def watch(self, descriptor: int, events: int = 0) -> None:
        """Have turn() return when something happens there, which is not looked at here."""
        self._poll.register(descriptor, events)

    def unwatch(self, descriptor: int) -> None:
        """Look there no longer; nothing happens if nobody did."""
        with contextlib.suppress(KeyError):
            self._poll.unregister(descriptor)

    def hold(self) -> None:
        """Answer no peer for now; one that was answered already is dropped."""
        for peer in list(self._half_open.values()):
            if peer.handshake is not None:
                self._close(peer)
            elif len(peer.nonce) == NONCE_SIZE:  # released a moment ago
                self._poll.modify(peer.sock, select.POLLRDHUP)
        self._holding = True
        self._told.clear()
        self._sum_up(time.monotonic(), end=True)

    def release(self) -> None:
        """Serve those that were held, in the order in which they came, and all that come."""
        self._holding = False
        for peer in [each for each in self._half_open.values() if not each.unrecognized]:
            self._announce(peer, "handshaking")
            if not self._silent:
                peer.deadline = time.monotonic() + TIMEOUT
            if len(peer.nonce) == NONCE_SIZE:
                self._poll.modify(peer.sock, select.POLLOUT)  # turn() begins its handshake

    def add(
        self,
        sock: socket.socket,
        name: str,
        transport: str,
        steps: Steps,
        seconds: float | None = None,
    ) -> HalfOpen:
        """Start a handshake over a connected socket. transport: what that is.

        seconds: that it may take, if not TIMEOUT.
        """
        now = time.monotonic()
        self._prepare(sock)
        talk = Conversation(sock, steps)
        peer = HalfOpen(sock, name, transport, name, now, now + (seconds or TIMEOUT), talk)
        self._admit(peer, select.POLLOUT)
        self._announce(peer, "handshaking")
        return peer

    def is_pending(self, peer: HalfOpen) -> bool:
        """Return whether a handshake is still under way."""
        return self._half_open.get(peer.sock.fileno()) is peer

    def give_up(self, peer: HalfOpen, why: str) -> None:
        """End a handshake that is under way, for a reason of the caller's."""
        self._drop(peer, why)

    def turn(self, seconds: float = SLICE) -> Peer | None:
        """Wait for something to happen, so long at most, and look after it.

        Returns a peer that has proved the key, or None.
        """
        self._stop.beat()
        now = time.monotonic()
        for peer in [peer for peer in self._half_open.values() if peer.deadline <= now]:
            self._drop(peer, f"no handshake within {now - peer.since:.0f} s")
        self._sum_up(now)
        if self._resume_at is not None and now >= self._resume_at:
            self._resume()
        first = min((peer.deadline for peer in self._half_open.values()), default=now + seconds)
        wait = max(0.0, min(first - now, seconds, SLICE))
        listener = None if self._host is None else self._host.listener.fileno()
        accept = False
        for descriptor, what in self._poll.poll(wait * 1000):
            if descriptor == listener:
                accept = True
            elif descriptor in self._half_open:
                keys = self._advance(self._half_open[descriptor], what)
                if keys is not None:
                    return keys
            elif what & GONE:
                self.unwatch(descriptor)  # reported once: its owner looks at it too
        if accept and not self._stop.is_set():
            self._accept()
        return None

    def close(self) -> None:
        """Close all that are left; the listener stays the caller's."""
        for peer in list(self._half_open.values()):
            self._close(peer)
        self._sum_up(time.monotonic(), end=True)

    def _sum_up(self, now: float, *, end: bool = False) -> None:
        for summary in (self._connected, self._failed, self._not_accepted):
            summary.tick(now, end=end)

    # ---- connections that come and go ----

    def _accept(self) -> None:
        """Accept some connections, and no more than there is room for."""
        assert self._host is not None
        for number in range(ACCEPTS):
            if len(self._half_open) >= self._most():
                if number > 0:
                    return  # peers that can be read by now come first
                self._make_way(list(self._half_open.values()))
            try:
                arrival = self._host.listener.accept()
            except (BlockingIOError, ConnectionError, InterruptedError):
                return  # it went away again
            except OSError as error:
                self._cannot_accept(error)
                return
            try:
                self._prepare(arrival.sock)
                self._welcome(*arrival)
            except OSError as error:  # no memory in the kernel, say
                arrival.sock.close()
                self._cannot_accept(error)
                return

    def _welcome(self, sock: socket.socket, name: str, source: str) -> None:
        assert self._host is not None
        same = [peer for peer in self._half_open.values() if peer.source == source]
        if len(same) >= min(MOST_PER_SOURCE, self._most() // SHARE + 1):
            self._make_way(same)
        now = time.monotonic()
        if self._silent:
            deadline = now + random.uniform(*UNRECOGNIZED_TIMEOUT)
        else:
            deadline = now + (HELD_TIMEOUT if self._holding else TIMEOUT)
        transport = self._host.listener.kind(sock)
        peer = HalfOpen(sock, name, transport, source, now, deadline)
        self._admit(peer, select.POLLIN)
        if not self._holding:
            self._announce(peer, "handshaking")

    def _announce(self, peer: HalfOpen, what: str) -> None:
        text = "peer %s connected over %s; %s"
        self._connected.log(time.monotonic(), text, peer.name, peer.transport, what)

    def _cannot_accept(self, error: OSError) -> None:
        """Log why, and make room; where there is none to make, pause the listener for a while."""
        self._not_accepted.log(
            time.monotonic(), "cannot accept a connection: %s", error.strerror or error
        )
        if self._half_open:
            self._make_way(list(self._half_open.values()))
            return
        assert self._host is not None
        self._poll.unregister(self._host.listener)
        self._resume_at = time.monotonic() + PAUSE

    def _resume(self) -> None:
        assert self._host is not None
        self._resume_at = None
        self._poll.register(self._host.listener, select.POLLIN)

    def _most(self) -> int:
        """Return how many may be pending now."""
        now = time.monotonic()
        if now - self._room_at >= 1:
            self._room, self._room_at = _room(len(self._half_open)), now
        # A stranger that gets no answer in any case must not see that a session runs.
        return min(MOST_HELD if self._holding and not self._silent else MOST, self._room)

    def _make_way(self, many: list[HalfOpen]) -> None:
        """Drop one of many: of those that lose the least, the oldest or a random one."""
        now = time.monotonic()
        least = min(peer.worth(now) for peer in many)
        victims = [peer for peer in many if peer.worth(now) == least]
        victim = victims[0] if least <= 1 else random.choice(victims)
        self._drop(victim, "too many unfinished handshakes")

    # ---- what a peer sends ----

    def _advance(self, peer: HalfOpen, what: int) -> Peer | None:
        """Take what a peer sent; return it when that ended its handshake well."""
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
                self._failed.log(time.monotonic(), "handshake with %s failed: %s", peer.name, error)
                self._leave_unanswered(peer)
            else:
                self._drop(peer, getattr(error, "strerror", None) or str(error))
        except BaseException:  # no memory: it cannot go on from here
            self._close(peer)
            raise
        else:
            if keys is not None:
                self._forget(peer)
                return Peer(peer.sock, peer.name, peer.transport, keys)
        return None

    def _take_nonce(self, peer: HalfOpen, what: int) -> Keys | None:
        """Take a client's nonce; begin its handshake or, during a session, hold it."""
        assert self._host is not None
        if (missing := NONCE_SIZE - len(peer.nonce)) > 0:
            data = peer.sock.recv(missing)
            if not data and self._silent:
                raise UnrecognizedError("it closed the connection before it showed the key")
            if not data:
                raise ProtocolError(CLOSED)
            peer.nonce += data
            if len(peer.nonce) < NONCE_SIZE:
                return None
            peer.knows_key = self._host.knows_key(bytes(peer.nonce))
            if self._holding:
                self._hold(peer)
        elif what & (GONE | select.POLLRDHUP):
            self._close(peer)  # it was held
            return None
        return None if self._holding else self._begin(peer)

    def _hold(self, peer: HalfOpen) -> None:
        """Answer a client later, and notice when it leaves before that."""
        if self._silent and not peer.knows_key:
            raise UnrecognizedError("it speaks wire v1 alone, or has another key")
        self._limit(peer, HELD_TIMEOUT)
        self._poll.modify(peer.sock, select.POLLRDHUP)
        if peer.source not in self._told and len(self._told) < MOST_HELD:
            self._told.add(peer.source)  # it dials again every few seconds
            self._announce(peer, "waiting: another client is connected")

    def _begin(self, peer: HalfOpen) -> Keys | None:
        """Begin the handshake of a client whose nonce is here, perhaps since a while ago."""
        assert self._host is not None
        peer.handshake = Conversation(peer.sock, self._host.begin(), peer.nonce)
        keys = peer.handshake.advance()
        self._limit(peer, TIMEOUT)
        return keys

    def _limit(self, peer: HalfOpen, seconds: float) -> None:
        """Where strangers have a random time, give a peer that showed the key its usual one."""
        if self._silent:
            peer.deadline = time.monotonic() + seconds

    def _leave_unanswered(self, peer: HalfOpen) -> None:
        """Answer a stranger with nothing, whatever it does, until its time is up."""
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
        except OSError:  # reset: no peer is left to notice anything
            self._close(peer)
            return
        if what & GONE:  # reset after its end: recv() only tells of that, and poll() never stops
            self._close(peer)
        else:
            self._poll.modify(peer.sock, 0)  # its end is no reason for ours

    # ---- bookkeeping ----

    @staticmethod
    def _prepare(sock: socket.socket) -> None:
        sock.setblocking(False)
        tcp.tune(sock)

    def _admit(self, peer: HalfOpen, events: int) -> None:
        self._half_open[peer.sock.fileno()] = peer
        self._poll.register(peer.sock, events)

    def _drop(self, peer: HalfOpen, why: str) -> None:
        if not peer.unrecognized and not self._holding:  # of those that are held nothing is said
            self._failed.log(time.monotonic(), "handshake with %s failed: %s", peer.name, why)
        self._close(peer)

    def _close(self, peer: HalfOpen) -> None:
        self._forget(peer)
        peer.sock.close()

    def _forget(self, peer: HalfOpen) -> None:
        del self._half_open[peer.sock.fileno()]
        self._poll.unregister(peer.sock)
        if peer.handshake is not None:
            peer.handshake.close()


def _room(pending: int) -> int:
    """Return how many pending handshakes the limit on descriptors leaves room for."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return MOST
    try:
        used = len(os.listdir("/proc/self/fd")) - pending
    except OSError:  # no /proc, or no descriptor to look with
        used = 24
    return max(1, limit - used - RESERVE)
