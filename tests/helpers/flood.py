"""A flood of connections from the client's host, for test_flood.py.

    python tests/helpers/flood.py hold ADDRESS PORT OPEN RATE SOURCE...   until killed
    python tests/helpers/flood.py malformed ADDRESS PORT COUNT SEED       says how many a second

``hold`` opens OPEN connections that say nothing, then RATE new ones each second, of which some say
nothing, some a few bytes and some a whole nonce; from all SOURCE addresses in turn.
"""

from __future__ import annotations

import collections
import contextlib
import os
import random
import resource
import socket
import struct
import sys
import time
from pathlib import Path


def connect(address: str, port: int, source: str) -> socket.socket:
    """A connection under way; it is not waited for."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.bind((source, 0))
    sock.setblocking(False)
    sock.connect_ex((address, port))
    return sock


def hold(address: str, port: int, number: int, rate: int, sources: list[str]) -> None:
    held: collections.deque[socket.socket] = collections.deque()
    for i in range(number):
        held.append(connect(address, port, sources[i % len(sources)]))
        if i % 50 == 49:
            time.sleep(0.05)
    print("ready", flush=True)
    start, made = time.monotonic(), 0
    says = [b"", b"abc", os.urandom(16)]
    fresh: collections.deque[tuple[socket.socket, bytes]] = collections.deque()
    while True:
        while made < (time.monotonic() - start) * rate:
            sock = connect(address, port, sources[made % len(sources)])
            held.append(sock)
            fresh.append((sock, says[made // len(sources) % 3]))
            made += 1
        while len(fresh) > 5:  # connected by now
            sock, data = fresh.popleft()
            with contextlib.suppress(OSError):
                sock.send(data)
        while len(held) > number:
            held.popleft().close()
        time.sleep(0.002)


def nonsense(rng: random.Random) -> bytes:
    """Random input that no client with the key would send."""
    nonce = rng.randbytes(16)
    length = rng.choice([0, 1, 15, 16, 23, 24, 25, 26, 255, 65535, rng.randrange(65536)])
    frame = struct.pack(">H", length) + rng.randbytes(rng.choice([0, 1, length % 600]))
    return rng.choice([
        nonce + frame,
        nonce + struct.pack(">H", 24) + rng.randbytes(24),
        rng.randbytes(rng.randrange(600)),
        bytes(rng.randrange(40)),
        b"GET / HTTP/1.1\r\n\r\n",
    ])  # fmt: skip


def malformed(address: str, port: int, count: int, seed: int) -> None:
    rng = random.Random(seed)
    # Else the ports of this host's end are all used up by connections in TIME_WAIT.
    Path("/proc/sys/net/ipv4/tcp_max_tw_buckets").write_text("100")
    started = time.monotonic()
    for _ in range(count):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
            sock.settimeout(10)
            sock.connect((address, port))
            try:
                sock.sendall(nonsense(rng))
                if rng.random() < 0.5:
                    sock.shutdown(socket.SHUT_WR)
                    while sock.recv(1000):
                        pass
            except OSError as error:  # the server may have closed it by now, but no more than that
                if isinstance(error, TimeoutError):
                    raise
    print(f"{count / (time.monotonic() - started):.0f}", flush=True)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
    arguments = sys.argv[2:]
    if sys.argv[1] == "hold":
        hold(arguments[0], *map(int, arguments[1:4]), arguments[4:])
    else:
        malformed(arguments[0], *map(int, arguments[1:]))
