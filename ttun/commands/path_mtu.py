"""The path MTU to a peer, measured with datagrams that must not be fragmented.

They go to a closed UDP port. The host answers each one that arrives with an ICMP message. Sources:
ip(7), ipv6(7), udp(7), RFC 1191, RFC 8201; icmp(7) for how many answers Linux sends.
"""

from __future__ import annotations

import errno
import os
import select
import socket

HEADERS = {socket.AF_INET: 20 + 8, socket.AF_INET6: 40 + 8}  # bytes: IP and UDP
OPTIONS = {  # level, IP_MTU_DISCOVER, IP_PMTUDISC_DO, IP_MTU; linux/in.h, linux/in6.h
    socket.AF_INET: (socket.IPPROTO_IP, 10, 2, 14),
    socket.AF_INET6: (socket.IPPROTO_IPV6, 23, 2, 24),
}
LEAST = {socket.AF_INET: 576, socket.AF_INET6: 1280}  # RFC 1122, RFC 8200
HOPS = 8  # links on the path, each with a smaller MTU than the one before
WAIT = 1.1  # seconds for an answer: after the first few, Linux sends one per second
STEP = 8  # bytes: precision of the search


def measure(probe: Probe) -> tuple[int, int]:
    """Return the largest packet that arrives, and the path MTU that the kernel knows, in bytes.

    They differ if larger packets are dropped without an ICMP message. The first is 0 if nothing is
    answered. Raises OSError for another kind of answer.
    """
    passes = probe.least
    if not probe.passes(passes):
        return 0, probe.mtu()
    for _ in range(HOPS):
        mtu = probe.mtu()
        if probe.passes(mtu):
            return mtu, mtu
        if probe.mtu() == mtu:  # dropped without an ICMP message
            break
    fails = probe.mtu()
    while fails - passes > STEP:
        middle = (passes + fails) // 2
        if probe.passes(middle):
            passes = middle
        else:
            fails = middle
    return passes, probe.mtu()


class Probe:
    """Datagrams of a chosen size to a closed port."""

    def __init__(self, family: int, address: tuple[object, ...]) -> None:
        """Open it. Raises OSError if there is no route to the address."""
        version = socket.AddressFamily(family)
        self._level, discover, never_fragment, self._mtu = OPTIONS[version]
        self._headers, self.least = HEADERS[version], LEAST[version]
        self._sock = socket.socket(family, socket.SOCK_DGRAM)
        self._sock.setsockopt(self._level, discover, never_fragment)
        self._sock.connect(address)

    def __enter__(self) -> Probe:
        """Return it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self._sock.close()

    def mtu(self) -> int:
        """Return the path MTU that the kernel knows so far, in bytes."""
        return self._sock.getsockopt(self._level, self._mtu)

    def passes(self, size: int) -> bool:
        """Return whether a packet of size bytes, headers included, arrives at the peer.

        Two tries: the peer or its firewall may not answer every one. Raises OSError for another
        kind of answer.
        """
        for _ in range(2):
            self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)  # discard a late answer
            try:
                self._sock.send(bytes(size - self._headers))
            except OSError as error:
                answer = error.errno
            else:
                answer = self._answer()
            if answer == errno.ECONNREFUSED:
                return True
            if answer == errno.EMSGSIZE:
                return False
            if answer:
                raise OSError(answer, os.strerror(answer))
        return False

    def _answer(self) -> int | None:
        """Wait for the errno of an ICMP message; return None if none arrives."""
        waiting = select.poll()
        waiting.register(self._sock, select.POLLERR)
        if not waiting.poll(WAIT * 1000):
            return None
        return self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
