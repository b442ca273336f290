"""Unfinished handshakes, side by side and within bounds, until one peer has proved the key.

Twenty silent connections must not keep the true client out, so each handshake waits for its own
peer only. A connection costs a descriptor and less than a kilobyte until it is done.

 1. The listener is readable: accept, and start a handshake. A full house drops one that has sent
    nothing, else a random one, never the newcomer.
 2. A peer's bytes came: hand exactly what it wants to the handshake, send what that answers.
 3. It is over: the first that proved the key is returned, a failed one is logged and closed. Of
    many that fail only some get a line, and the others a number.
 4. Ten seconds after a connection was made it is closed, however busily it sends.
"""

from __future__ import annotations

import contextlib
import logging
import random
import selectors
import socket
import time
from dataclasses import dataclass, field
from typing import Callable

from ttun import link
from ttun.errors import ProtocolError
from ttun.handshake import TIMEOUT, Keys, Steps
from ttun.stop import StopFlag
from ttun.summary import Summary

log = logging.getLogger("ttun")

MOST = 256  # unfinished handshakes
MOST_PER_ADDRESS = 64


@dataclass
class Peer:
    """Somebody who has proved the key."""

    sock: socket.socket
    name: str
    keys: Keys


@dataclass(eq=False)
class _Unfinished:
    sock: socket.socket
    name: str
    address: str
    steps: Steps
    deadline: float
    wanted: int = 0
    received: bytearray = field(default_factory=bytearray)
    silent: bool = True


class Handshakes:
    """The room where peers wait. Close it to close all that are left in it."""

    def __init__(self, stop: StopFlag) -> None:
        """Make an empty room that is left when stop is set."""
        self._stop = stop
        self._selector = selectors.DefaultSelector()
        self._selector.register(stop, selectors.EVENT_READ)
        self._unfinished: list[_Unfinished] = []
        self._listener: socket.socket | None = None
        self._begin: Callable[[], Steps] | None = None
        # A crowd of strangers must not fill the disk.
        self._connected = Summary("and %d more connected")
        self._failed = Summary("and %d more handshakes failed")

    def listen(self, listener: socket.socket, begin: Callable[[], Steps]) -> None:
        """Take whom the listener brings; begin makes a handshake for each."""
        self._listener, self._begin = listener, begin
        self._selector.register(listener, selectors.EVENT_READ)

    def add(self, sock: socket.socket, name: str, address: str, steps: Steps) -> None:
        """Start a handshake over a connected socket."""
        sock.setblocking(False)
        link.tune(sock)
        self._connected.log(
            time.monotonic(),
            "peer %s connected over %s; handshaking",
            name,
            link.transport(sock),
        )
        self._make_way(address)
        peer = _Unfinished(sock, name, address, steps, time.monotonic() + TIMEOUT)
        self._unfinished.append(peer)
        self._selector.register(sock, selectors.EVENT_READ, peer)
        try:
            self._send(peer, *next(steps))
        except (ProtocolError, OSError) as error:
            self._drop(peer, str(error))

    def wait(self) -> Peer | None:
        """Return the first peer that proves the key.

        None when stop was set, or when nobody is left and no listener brings more.
        """
        while not self._stop.is_set() and (self._unfinished or self._listener):
            now = time.monotonic()
            for late in [peer for peer in self._unfinished if peer.deadline <= now]:
                self._drop(late, f"no handshake within {TIMEOUT:.0f} s")
            summaries = (self._connected, self._failed)
            for summary in summaries:
                summary.tick(now)
            first = min([x.deadline for x in self._unfinished] + [x.due for x in summaries])
            timeout = None if first == float("inf") else max(0.0, first - now)
            for key, _ in self._selector.select(timeout):
                peer = key.data
                if key.fileobj is self._listener:
                    self._accept()
                elif peer in self._unfinished:  # it may have had to make way just now
                    keys = self._advance(peer)
                    if keys is not None:
                        return Peer(peer.sock, peer.name, keys)
        return None

    def close(self) -> None:
        """Close everybody who is left; the listener stays the caller's."""
        for peer in list(self._unfinished):
            self._forget(peer)
            peer.sock.close()
        self._selector.close()
        for summary in (self._connected, self._failed):
            summary.tick(time.monotonic(), end=True)

    def _accept(self) -> None:
        assert self._listener is not None and self._begin is not None
        try:
            sock, sockaddr = self._listener.accept()
        except (BlockingIOError, ConnectionError, InterruptedError):
            return  # it went away again
        except OSError as error:
            log.warning("cannot accept a connection: %s", error.strerror)
            self._stop.wait(0.1)  # out of descriptors or memory: not a reason to spin
            return
        self.add(sock, link.show(sockaddr), sockaddr[0], self._begin())

    def _make_way(self, address: str) -> None:
        """Keep both bounds before one more comes from this address."""
        same = [peer for peer in self._unfinished if peer.address == address]
        if len(same) >= MOST_PER_ADDRESS:
            crowd = same
        elif len(self._unfinished) >= MOST:
            crowd = self._unfinished
        else:
            return
        silent = next((peer for peer in crowd if peer.silent), None)
        self._drop(silent or random.choice(crowd), "too many unfinished handshakes")

    def _advance(self, peer: _Unfinished) -> Keys | None:
        """Take what a peer sent; return the keys when that ended its handshake well."""
        try:
            data = peer.sock.recv(peer.wanted - len(peer.received))
            if not data:
                raise ProtocolError("it closed the connection before the handshake was over")
            peer.silent = False
            peer.received += data
            while len(peer.received) == peer.wanted:
                taken, peer.received = bytes(peer.received), bytearray()
                self._send(peer, *peer.steps.send(taken))
        except StopIteration as done:
            self._forget(peer)
            keys: Keys = done.value
            return keys
        except BlockingIOError:
            pass
        except (ProtocolError, OSError) as error:
            self._drop(peer, getattr(error, "strerror", None) or str(error))
        return None

    @staticmethod
    def _send(peer: _Unfinished, data: bytes, wanted: int) -> None:
        """Send an answer: far less than an empty socket buffer takes at once."""
        peer.wanted = wanted
        if data and peer.sock.send(data) != len(data):
            raise OSError("it does not read what it is sent")

    def _drop(self, peer: _Unfinished, reason: str) -> None:
        self._failed.log(time.monotonic(), "handshake with %s failed: %s", peer.name, reason)
        self._forget(peer)
        peer.sock.close()

    def _forget(self, peer: _Unfinished) -> None:
        self._unfinished.remove(peer)
        peer.steps.close()
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(peer.sock)
