"""Pending handshakes, side by side and within bounds, and the one place where an endpoint waits.

Twenty silent connections must not keep the true client out, so each handshake waits for its own
peer only. A connection costs a descriptor and less than a kilobyte until it is done. turn() is
called again and again, without a session and inside one:

 1. A peer's bytes came: hand exactly what it wants to the handshake, send what that answers. Who
    can be read is served before the next is accepted.
 2. The listener is readable: make room if there is none, accept, and start a handshake. Whoever
    showed the key stays longest, then who sent something; the silent go first.
 3. It is over: a peer that proved the key is returned, a failed one is logged and closed. Of many
    that fail only some get a line, and the others a number.
 4. Ten seconds after a connection was made it is closed, however busily it sends.

While a session runs and nobody may take over, new peers are held: accepted, unanswered, and served
once the session has ended. Where only x1 is accepted, a stranger is answered by nothing at all, not
even by the end of the connection, until a random time has passed.
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
from collections.abc import Iterator

from ttun import tcp
from ttun.errors import ProtocolError, UnrecognizedError
from ttun.flag import SLICE, StopFlag
from ttun.handshake import NONCE_SIZE, TIMEOUT, Keys, Steps
from ttun.peer import Host, Peer, Pending, network
from ttun.summary import Summary

log = logging.getLogger("ttun")

MOST = 256  # pending handshakes, where the limit on descriptors leaves room for so many
MOST_PER_NETWORK = 64  # of them from one IPv4 address or one IPv6 /64
SHARE = 4  # of what there is room for, one network gets this part
MOST_HELD = 16  # while a session runs
HELD_TIMEOUT = 15.0  # seconds; a client gives up after 10
UNRECOGNIZED_TIMEOUT = (10.0, 60.0)  # seconds: a random time between them
RESERVE = 8  # descriptors left to a session, hooks, look-ups and whoever asks for the status
ACCEPTS = 16  # of one turn
PAUSE = 1.0  # seconds without accepting where that is impossible
GONE = select.POLLERR | select.POLLHUP | select.POLLNVAL


class Handshakes:
    """The pending handshakes of an endpoint. Close it to close all that are left."""

    def __init__(self, stop: StopFlag) -> None:
        """Begin with none. turn() returns at once when stop is set, and leaves its beats there."""
        self._stop = stop
        self._poll = select.poll()
        self._poll.register(stop, select.POLLIN)
        self._pending: dict[int, Pending] = {}  # by descriptor, the oldest first
        self._host: Host | None = None
        self._holding = False
        self._told: set[str] = set()  # who was said to wait
        self._resume_at: float | None = None  # when the listener is looked at again
        self._room, self._room_at = 1, float("-inf")
        # A crowd of strangers must not fill the disk.
        self._connected = Summary("and %d more connected")
        self._failed = Summary("and %d more handshakes failed")
        self._not_accepted = Summary("and %d more times")

    def listen(self, host: Host) -> None:
        """Take whom a listener brings."""
        self._host = host
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
        for peer in list(self._pending.values()):
            if peer.greeted:
                self._close(peer)
            elif peer.steps is not None:
                peer.steps.close()
                peer.steps = None
        self._holding = True
        self._told.clear()
        self._sum_up(time.monotonic(), end=True)

    def release(self) -> None:
        """Serve those that were held, in the order in which they came, and all that come."""
        self._holding = False
        for peer in [p for p in self._pending.values() if p.steps is None and not p.unrecognized]:
            self._begin(peer)

    def add(self, sock: socket.socket, name: str, steps: Steps) -> Pending:
        """Start a handshake over a connected socket."""
        now = time.monotonic()
        self._prepare(sock)
        peer = Pending(sock, name, name, now, now + TIMEOUT, steps)
        self._admit(peer)
        self._start(peer)
        return peer

    def is_pending(self, peer: Pending) -> bool:
        """Return whether a handshake is still under way."""
        return self._pending.get(peer.sock.fileno()) is peer

    def give_up(self, peer: Pending, why: str) -> None:
        """End a handshake that is under way, for a reason of the caller's."""
        self._drop(peer, why)

    def turn(self, seconds: float = SLICE) -> Peer | None:
        """Wait for something to happen, so long at most, and look after it.

        Returns a peer that has proved the key, or None.
        """
        self._stop.beat()
        now = time.monotonic()
        for peer in [peer for peer in self._pending.values() if peer.deadline <= now]:
            self._drop(peer, f"no handshake within {now - peer.since:.0f} s")
        self._sum_up(now)
        if self._resume_at is not None and now >= self._resume_at:
            self._resume()
        first = min((peer.deadline for peer in self._pending.values()), default=now + seconds)
        wait = max(0.0, min(first - now, seconds, SLICE))
        listener = None if self._host is None else self._host.listener.fileno()
        accept = False
        for descriptor, what in self._poll.poll(wait * 1000):
            if descriptor == listener:
                accept = True
            elif descriptor in self._pending:
                keys = self._advance(self._pending[descriptor], what)
                if keys is not None:
                    return keys
            elif what & GONE:
                self.unwatch(descriptor)  # said once: whoever watches it looks by itself
        if accept and not self._stop.is_set():
            self._accept()
        return None

    def close(self) -> None:
        """Close all that are left; the listener stays the caller's."""
        for peer in list(self._pending.values()):
            self._close(peer)
        self._sum_up(time.monotonic(), end=True)

    def _sum_up(self, now: float, *, end: bool = False) -> None:
        for summary in (self._connected, self._failed, self._not_accepted):
            summary.tick(now, end=end)

    # ---- who comes and who goes ----

    def _accept(self) -> None:
        """Accept some of those who wait, and no more than there is room for."""
        assert self._host is not None
        for number in range(ACCEPTS):
            if len(self._pending) >= self._most():
                if number > 0:
                    return  # those who can be read by now come first
                self._make_way(list(self._pending.values()))
            try:
                sock, sockaddr = self._host.listener.accept()
            except (BlockingIOError, ConnectionError, InterruptedError):
                return  # it went away again
            except OSError as error:
                self._cannot_accept(error)
                return
            try:
                self._prepare(sock)
                self._welcome(sock, tcp.show(sockaddr), network(sockaddr[0]))
            except OSError as error:  # no memory in the kernel, say
                sock.close()
                self._cannot_accept(error)
                return

    def _welcome(self, sock: socket.socket, name: str, network: str) -> None:
        assert self._host is not None
        same = [peer for peer in self._pending.values() if peer.network == network]
        if len(same) >= min(MOST_PER_NETWORK, self._most() // SHARE + 1):
            self._make_way(same)
        now = time.monotonic()
        if self._host.silent:
            deadline = now + random.uniform(*UNRECOGNIZED_TIMEOUT)
        else:
            deadline = now + (HELD_TIMEOUT if self._holding else TIMEOUT)
        peer = Pending(sock, name, network, now, deadline)
        self._admit(peer)
        if not self._holding:
            self._begin(peer)

    def _begin(self, peer: Pending) -> None:
        """Start the handshake of a peer that was accepted, perhaps a while ago."""
        assert self._host is not None
        peer.steps = self._host.begin()
        self._poll.modify(peer.sock, select.POLLIN)
        if not self._host.silent:
            peer.deadline = time.monotonic() + TIMEOUT
        self._start(peer)

    def _start(self, peer: Pending) -> None:
        assert peer.steps is not None
        self._announce(peer, "handshaking")
        with self._fate(peer):
            self._send(peer, *next(peer.steps))
            self._feed(peer)  # one that was held has sent its nonce

    def _announce(self, peer: Pending, what: str) -> None:
        over = tcp.transport(peer.sock)
        self._connected.log(
            time.monotonic(), "peer %s connected over %s; %s", peer.name, over, what
        )

    def _cannot_accept(self, error: OSError) -> None:
        """Say why, and make room; where nobody can go, leave the listener alone for a while."""
        self._not_accepted.log(
            time.monotonic(), "cannot accept a connection: %s", error.strerror or error
        )
        if self._pending:
            self._make_way(list(self._pending.values()))
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
            self._room, self._room_at = _room(len(self._pending)), now
        # Strangers who get no answer in any case are not to see that a session runs.
        few = self._holding and not (self._host is not None and self._host.silent)
        return min(MOST_HELD if few else MOST, self._room)

    def _make_way(self, crowd: list[Pending]) -> None:
        """Drop one of a crowd: of those who have least to lose, the oldest or a random one."""
        now = time.monotonic()
        least = min(peer.worth(now) for peer in crowd)
        victims = [peer for peer in crowd if peer.worth(now) == least]
        victim = victims[0] if least <= 1 else random.choice(victims)
        self._drop(victim, "too many unfinished handshakes")

    # ---- what a peer sends ----

    def _advance(self, peer: Pending, what: int) -> Peer | None:
        """Take what a peer sent; return it when that ended its handshake well."""
        if peer.unrecognized:
            self._discard(peer, what)
        elif peer.steps is None:
            self._look_at_held(peer, what)
        else:
            with self._fate(peer):
                self._take(peer, peer.sock.recv(peer.wanted - len(peer.received)))
                keys = self._feed(peer)
                if keys is not None:
                    self._forget(peer)
                    return Peer(peer.sock, peer.name, keys)
        return None

    def _feed(self, peer: Pending) -> Keys | None:
        """Hand what was received to the handshake; return the keys when that ended it well."""
        assert peer.steps is not None
        try:
            while len(peer.received) == peer.wanted:
                taken, peer.received = bytes(peer.received), bytearray()
                if self._host is not None and not peer.greeted:
                    peer.knows_key = self._host.knows_key(taken)
                self._send(peer, *peer.steps.send(taken))
        except StopIteration as done:
            keys: Keys = done.value
            return keys
        return None

    @contextlib.contextmanager
    def _fate(self, peer: Pending) -> Iterator[None]:
        """Do something with a peer that may turn out to be none."""
        try:
            yield
        except BlockingIOError:
            pass
        except UnrecognizedError as error:
            self._failed.log(time.monotonic(), "handshake with %s failed: %s", peer.name, error)
            self._leave_unanswered(peer)
        except (ProtocolError, OSError) as error:
            self._drop(peer, getattr(error, "strerror", None) or str(error))

    def _take(self, peer: Pending, data: bytes) -> None:
        if not data:
            if self._host is not None and self._host.silent and not peer.greeted:
                raise UnrecognizedError("it closed the connection before it showed the key")
            raise ProtocolError("it closed the connection before the handshake was over")
        peer.spoke = True
        peer.received += data

    def _look_at_held(self, peer: Pending, what: int) -> None:
        """Take the nonce of a peer that waits, and notice when it leaves."""
        assert self._host is not None
        with self._fate(peer):
            if len(peer.received) == NONCE_SIZE:
                if what & (GONE | select.POLLRDHUP):
                    self._close(peer)
                return
            self._take(peer, peer.sock.recv(NONCE_SIZE - len(peer.received)))
            if len(peer.received) < NONCE_SIZE:
                return
            peer.knows_key = self._host.knows_key(bytes(peer.received))
            if self._host.silent and not peer.knows_key:
                raise UnrecognizedError("it speaks wire v1 alone, or has another key")
            self._limit(peer, HELD_TIMEOUT)
            self._poll.modify(peer.sock, select.POLLRDHUP)
            if peer.network not in self._told and len(self._told) < MOST_HELD:
                self._told.add(peer.network)  # it dials again every few seconds
                self._announce(peer, "waiting: another client is connected")

    def _limit(self, peer: Pending, seconds: float) -> None:
        """Where a stranger has a random time, give a peer that showed the key its usual one."""
        if self._host is not None and self._host.silent:
            peer.deadline = time.monotonic() + seconds

    def _leave_unanswered(self, peer: Pending) -> None:
        """Say nothing to it, whatever it does, until its time is up."""
        peer.unrecognized = True
        if peer.steps is not None:
            peer.steps.close()
            peer.steps = None
        peer.received.clear()
        self._discard(peer)

    def _discard(self, peer: Pending, what: int = 0) -> None:
        try:
            if peer.sock.recv(65536):
                return
        except BlockingIOError:
            return
        except OSError:  # reset: there is nobody left to notice anything
            self._close(peer)
            return
        if what & GONE:  # reset after its end: recv() only tells of that, and poll() never stops
            self._close(peer)
        else:
            self._poll.modify(peer.sock, 0)  # its end is no reason for ours

    def _send(self, peer: Pending, data: bytes, wanted: int) -> None:
        """Send an answer: far less than an empty socket buffer takes at once."""
        peer.wanted = wanted
        if not data:
            return
        if not peer.greeted:
            peer.greeted = True
            self._limit(peer, TIMEOUT)
        if peer.sock.send(data) != len(data):
            raise OSError("it does not read what it is sent")

    # ---- bookkeeping ----

    @staticmethod
    def _prepare(sock: socket.socket) -> None:
        sock.setblocking(False)
        tcp.tune(sock)

    def _admit(self, peer: Pending) -> None:
        self._pending[peer.sock.fileno()] = peer
        self._poll.register(peer.sock, select.POLLIN)

    def _drop(self, peer: Pending, why: str) -> None:
        if peer.steps is not None:  # of those that were held nothing is said
            self._failed.log(time.monotonic(), "handshake with %s failed: %s", peer.name, why)
        self._close(peer)

    def _close(self, peer: Pending) -> None:
        self._forget(peer)
        peer.sock.close()

    def _forget(self, peer: Pending) -> None:
        del self._pending[peer.sock.fileno()]
        self._poll.unregister(peer.sock)
        if peer.steps is not None:
            peer.steps.close()


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
