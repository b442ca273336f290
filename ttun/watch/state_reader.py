"""Read the state of a device from the kernel after changes, with a rate limit.

 1. A change notification only triggers a new reading; its content is not used. Those of other
    devices and routes are ignored.
 2. A reading is a chain of requests, each sent after the answer to the last one: the device, all
    addresses, the routes through the device, the rules of the default route, the links of the
    connection's local addresses.

No call blocks or processes more than BUDGET datagrams. Readings are at least INTERVAL apart and
take at most a twentieth of the time, however large the tables are. In a flood of notifications, the
reader unsubscribes for DEAF seconds and reads once a second instead.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from collections import deque
from dataclasses import dataclass
from typing import Callable

from ttun.network import netlink
from ttun.network.netlink import Message, Netlink, Request
from ttun.watch.device_state import Seen, Wanted, address_of, is_up, route_key

BUDGET = 8  # datagrams per call
SETTLE = 0.2  # seconds from a change to the reading: changes come in groups
INTERVAL = 0.5  # seconds between readings, at least
SHARE = 20  # readings after changes take at most 1/20 of the time
BACKSTOP = 30.0  # seconds between readings without a change
BACKSTOP_SHARE = 100  # the same as SHARE, without changes
FLOOD, DEAF, DEAF_INTERVAL = 500, 10.0, 1.0  # changes per second; seconds; seconds
ANSWER_TIMEOUT = 2.0  # seconds; an answer comes at once or is lost


@dataclass
class _Step:
    request: Request
    take: Callable[[Message], None]  # gets each answer
    done: Callable[[int], None]  # gets the errno, or 0


class StateReader:
    """Read the state of a device. addresses: find the links of these local addresses too."""

    def __init__(self, index: int, wanted: Wanted) -> None:
        """Open the socket and subscribe. index: of the device. Raises OSError."""
        self.addresses: set[bytes] = set()
        self._index, self._wanted = index, wanted
        self._keys = wanted.keys
        self._seen = Seen()
        self._steps: deque[_Step] = deque()
        self._sequence = 0  # of the pending request; 0: none
        self._asked_at = self._spent = 0.0
        self._next_at = self._not_before = 0.0
        self._second = self._deaf_until = 0.0
        self._changes = 0  # in the current second
        self._carriers: set[int] = set()  # links that have one of the addresses
        self._link = Netlink()
        try:
            self._link.join()
        except BaseException:
            self._link.close()
            raise

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._link.fileno()

    def close(self) -> None:
        """Close the socket."""
        self._link.close()

    def sees(self, sock: socket.socket) -> bool:
        """Return whether a socket is in the network namespace that this reads."""
        return self._link.sees(sock)

    @property
    def due(self) -> float:
        """When to call look() at the latest (time.monotonic())."""
        if self._sequence:
            return self._asked_at + ANSWER_TIMEOUT
        return max(self._next_at, self._not_before)

    def read_within(self, now: float, seconds: float) -> None:
        """Start a reading within so many seconds, subject to the rate limit."""
        self._next_at = min(self._next_at, now + seconds)

    def look(self, now: float) -> Seen | None:
        """Process what arrived; return the state when a reading is complete. Raises OSError."""
        began = time.thread_time()
        try:
            seen = self._look(now)
        except (OSError, MemoryError):
            self._break_off(now + BACKSTOP)
            raise
        self._spent += time.thread_time() - began
        if seen is not None:
            self._not_before = now + max(INTERVAL, SHARE * self._spent)
        return seen

    def request(self, request: Request, done: Callable[[int], None]) -> None:
        """Send a request with the next reading; done() gets its errno, or 0."""
        self._steps.append(_Step(request, lambda _: None, done))

    def _look(self, now: float) -> Seen | None:
        seen = self._receive(now)
        if self._changes > FLOOD and not self._deaf_until:
            self._link.leave()
            self._deaf_until, self._next_at = now + DEAF, now
        elif self._deaf_until and now >= self._deaf_until:
            self._link.join()
            self._deaf_until, self._next_at = 0.0, now
        if now < self.due:
            return seen
        if self._sequence:
            self._break_off(now + INTERVAL)
            return seen
        self._begin(now)
        return self._receive(now)

    def _receive(self, now: float) -> Seen | None:
        """Process some datagrams; return the state when a reading is complete."""
        if now - self._second >= 1:
            self._changes, self._second = 0, now
        for _ in range(BUDGET):
            try:
                messages = self._link.receive()
            except BlockingIOError:
                return None
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self._changes += 1
                self.read_within(now, SETTLE)
                continue
            for message in messages:
                if message.port != self._link.port:
                    self._changes += 1
                    if self._matters(message):
                        self.read_within(now, SETTLE)
                elif message.sequence == self._sequence and self._take(message, now):
                    return self._seen
        return None

    # ---- changes ----

    def _matters(self, message: Message) -> bool:
        """Return whether a notification may concern the state."""
        if not message.fields:
            return False
        if message.kind in (netlink.NEW_ROUTE, netlink.DEL_ROUTE):
            return route_key(message) in self._keys
        if message.kind in (netlink.NEW_RULE, netlink.DEL_RULE):
            return bool(self._wanted.rules)
        index = netlink.index_of(message)
        return index == self._index or (
            # A new lifetime, as router advertisements set it, removes no address.
            index in self._carriers and message.kind != netlink.NEW_ADDRESS
        )

    # ---- a reading ----

    def _begin(self, now: float) -> None:
        backstop = max(BACKSTOP, BACKSTOP_SHARE * self._spent)
        self._next_at = now + (DEAF_INTERVAL if self._deaf_until else backstop)
        self._seen, self._spent = Seen(), 0.0
        everything = netlink.ADDRESS.pack(*[0] * 5)
        through = netlink.attribute(netlink.RTA_OIF, struct.pack("=I", self._index))
        self._steps += [
            _Step(_link_request(self._index), self._seen.take_device, _end_device),
            _Step(
                Request(netlink.GET_ADDRESS, netlink.NLM_DUMP, everything),
                self._take_address,
                self._end_addresses,
            ),
        ]
        for family in self._wanted.families:
            body = netlink.ROUTE.pack(family, *[0] * 8) + through
            routes = Request(netlink.GET_ROUTE, netlink.NLM_DUMP, body)
            self._steps.append(_Step(routes, self._take_route, _must_not_fail))
        for family in (socket.AF_INET, socket.AF_INET6) if self._wanted.rules else ():
            rules = Request(
                netlink.GET_RULE, netlink.NLM_DUMP, netlink.ROUTE.pack(family, *[0] * 8)
            )
            self._steps.append(_Step(rules, self._seen.rules.append, lambda _: None))
        self._ask_next(now)

    def _break_off(self, again: float) -> None:
        self._steps.clear()
        self._sequence = 0
        self._next_at = self._not_before = again

    def _ask_next(self, now: float) -> None:
        self._sequence, self._asked_at = self._link.ask(self._steps[0].request), now

    def _take(self, message: Message, now: float) -> bool:
        """Process a message of the pending answer; return whether the reading is complete."""
        step = self._steps[0]
        if message.flags & netlink.NLM_DUMP_INTERRUPTED:
            self.read_within(now, SETTLE)
        failed = 0
        if message.kind == netlink.NLMSG_ERROR:
            failed = message.fields[0] if message.fields else errno.EPROTO
        elif message.kind != netlink.NLMSG_DONE:
            self._asked_at = now
            if message.fields:
                step.take(message)
            if message.flags & netlink.NLM_MULTI:
                return False
        self._steps.popleft()
        self._sequence = 0
        step.done(failed)
        if self._steps:
            self._ask_next(now)
            return False
        self._carriers = set().union(*self._seen.owners.values())
        return True

    def _take_address(self, message: Message) -> None:
        index, address = netlink.index_of(message), address_of(message)
        if index == self._index:
            self._seen.take_address(message)
        elif address in self.addresses:  # no connection comes through its own tunnel
            self._seen.owners.setdefault(address, set()).add(index)

    def _end_addresses(self, failed: int) -> None:
        _must_not_fail(failed)
        for index in set().union(*self._seen.owners.values()):
            self._steps.append(_Step(_link_request(index), self._take_carrier, lambda _: None))

    def _take_carrier(self, message: Message) -> None:
        if is_up(message):
            self._seen.links_up.add(netlink.index_of(message))

    def _take_route(self, message: Message) -> None:
        route = route_key(message)
        if route in self._keys and self._index in netlink.next_hops(message):
            self._seen.routes.add(route)


def _link_request(index: int) -> Request:
    return Request(netlink.GET_LINK, 0, netlink.LINK.pack(0, 0, index, 0, 0))


def _end_device(failed: int) -> None:
    if failed != errno.ENODEV:  # not in this network namespace
        _must_not_fail(failed)


def _must_not_fail(failed: int) -> None:
    if failed:
        raise OSError(failed, os.strerror(failed))
