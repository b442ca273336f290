"""The path MTU to a peer, found with datagrams that may not be fragmented.

They go to a UDP port where nobody listens, whose host answers each with an ICMP message: what was
answered, got there. Source: ip(7), ipv6(7), udp(7), RFC 1191, RFC 8201; icmp(7) for how many
answers Linux gives.
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
HOPS = 8  # links on the way, each with a smaller MTU than the one before
WAIT = 1.1  # seconds for an answer: Linux gives one per second, after the first few
STEP = 8  # bytes: how exactly to find the largest packet that gets through


def measure(probe: Probe) -> tuple[int, int]:
    """Return the largest packet that gets there, and the MTU that the kernel knows, in bytes.

    They differ where larger packets are lost and no router says so. The first is 0 where nothing is
    answered. Raises OSError where the answer says something else.
    """
    passes = probe.least
    if not probe.passes(passes):
        return 0, probe.mtu()
    for _ in range(HOPS):
        mtu = probe.mtu()
        if probe.passes(mtu):
            return mtu, mtu
        if probe.mtu() == mtu:  # lost, and nobody said why
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
    """Datagrams of a chosen size to a port where nobody listens."""

    def __init__(self, family: int, address: tuple[object, ...]) -> None:
        """Open it. Raises OSError where there is no way to the address."""
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
        """Return what this kernel knows of the path by now, in bytes."""
        return self._sock.getsockopt(self._level, self._mtu)

    def passes(self, size: int) -> bool:
        """Return whether a packet of size bytes, headers and all, gets to the peer.

        Two tries: the peer, or its firewall, need not answer each. Raises OSError for an answer
        that says something else.
        """
        for _ in range(2):
            self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)  # forget what came late
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
        """Wait for the errno that an ICMP message brings; None if none comes."""
        waiting = select.poll()
        waiting.register(self._sock, select.POLLERR)
        if not waiting.poll(WAIT * 1000):
            return None
        return self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
