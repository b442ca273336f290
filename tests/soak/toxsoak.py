"""Random connections through Tox, and checks for leaks.

    python tests/soak/toxsoak.py SECONDS SEED        make soak SECONDS=1200 SEED=1

1. Both ends run on two hosts. Eight programs connect repeatedly: through a forward, to a closed
   port, through SOCKS5. The seed determines how each connection ends (a complete echo, a truncated
   one, a reset, a slow reader, an abandoned negotiation) and what the target does (echo, stall,
   reset).
2. Every byte that comes back must be correct.
3. Print descriptors, threads and memory of both ends once a minute.
4. At the end both have as many descriptors and threads as before, no tunnel and no connection, and
   no more memory than after the first tenth of the time.
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import toxlab
import tunnel
from toxlab import CLIENT, SERVER, Lab, Program

from ttun.lab import netns

TARGET, NOBODY = 7001, 7002  # ports on the server's host
TO_TARGET, TO_NOBODY, SOCKS = 2001, 2002, 1080
WORKERS = 8
PAUSE = 0.3  # seconds between two connections of a worker, the longest
MOST = 5.0  # a connection carries 1 to 10**MOST bytes
GROWTH = 4096  # KiB of memory that an end may gain
RESET = struct.pack("ii", 1, 0)  # SO_LINGER
GREETING = b"\5\1\0"
CONNECT = b"\5\1\0\1\x7f\0\0\1" + TARGET.to_bytes(2, "big")


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    sock.close()


class Target:
    """Answers on the server's host: mostly it echoes."""

    def __init__(self, lab: Lab, seed: int) -> None:
        self.listener = lab.listen(SERVER, TARGET)
        self.chance = random.Random(seed)
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self.listener.accept()
                how = self.chance.random()
                threading.Thread(target=self.serve, args=(sock, how), daemon=True).start()

    def serve(self, sock: socket.socket, how: float) -> None:
        sock.settimeout(60)
        with sock, contextlib.suppress(OSError):
            if how < 0.1:
                time.sleep(10 * how)
                reset(sock)
            elif how < 0.15:
                time.sleep(20 * how)
            else:
                while data := sock.recv(65536):
                    sock.sendall(data)


class Worker:
    """A program that connects again and again."""

    def __init__(self, lab: Lab, counts: Counter[str], seed: int) -> None:
        self.lab, self.counts, self.chance = lab, counts, random.Random(seed)
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.over = threading.Event()

    def run(self) -> None:
        self.lab.enter(CLIENT)
        while not self.over.wait(self.chance.uniform(0, PAUSE)):
            port = self.chance.choice([TO_TARGET] * 8 + [TO_NOBODY, SOCKS])
            try:
                with socket.create_connection(("127.0.0.1", port), 30) as sock:
                    sock.settimeout(60)
                    self.counts[self.use(sock, port)] += 1
            except TimeoutError:
                self.counts["timed out"] += 1
            except OSError:
                self.counts["cut"] += 1

    def use(self, sock: socket.socket, port: int) -> str:
        """Have one connection; return how it went."""
        chance = self.chance
        data = chance.randbytes(int(10 ** chance.uniform(0, MOST)))
        how = chance.random()
        if port == SOCKS:
            sock.sendall(GREETING)
            if how < 0.2:
                return "given up"
            sock.sendall(CONNECT)
            if self.receive(sock, 12)[:4] != b"\5\0\5\0":
                return "wrong"
        if how < 0.3:
            sock.sendall(data)
            if how < 0.15:
                reset(sock)
            return "cut"
        sender = threading.Thread(target=self.send, args=(sock, data))
        sender.start()
        received = bytearray()
        try:
            if how < 0.4:
                time.sleep(chance.uniform(0, 2))
            while more := sock.recv(65536):
                received += more
        finally:
            sender.join()
            if not data.startswith(received):
                self.counts["wrong"] += 1
        if port == TO_NOBODY:
            return "refused"
        return "whole" if received == data else "cut"

    def receive(self, sock: socket.socket, size: int) -> bytes:
        received = b""
        while len(received) < size and (more := sock.recv(size - len(received))):
            received += more
        return received

    def send(self, sock: socket.socket, data: bytes) -> None:
        with contextlib.suppress(OSError):
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)


def show(began: float, ends: list[Program], counts: Counter[str]) -> None:
    samples = [end.usage() for end in ends]
    shown = "; ".join(
        f"{fds} descriptors, {tasks} threads, {kib} KiB" for fds, tasks, kib in samples
    )
    seconds = time.monotonic() - began
    print(f"{seconds:5.0f} s: client, server: {shown}; {dict(counts)}", flush=True)


def soak(lab: Lab, seconds: float, seed: int) -> None:
    Target(lab, seed)
    server, server_id = lab.serve("-t", "0", "-d")
    forwards = (f"-L{TO_TARGET}:127.0.0.1:{TARGET}", f"-L{TO_NOBODY}:127.0.0.1:{NOBODY}")
    client = lab.tox(CLIENT, "-t", "0", "-d", "-i", server_id, *forwards, "-D", str(SOCKS))
    client.says("connected over")
    ends = [client, server]
    before = [end.usage() for end in ends]
    counts: Counter[str] = Counter()
    workers = [Worker(lab, counts, seed * 1000 + number) for number in range(WORKERS)]
    began = time.monotonic()
    for worker in workers:
        worker.thread.start()
    warm: list[int] = []
    while (passed := time.monotonic() - began) < seconds:
        if not warm and passed > seconds / 10:
            warm = [end.usage()[2] for end in ends]
        show(began, ends, counts)
        time.sleep(min(60, seconds / 10, max(seconds - passed, 0) + 0.01))
    for worker in workers:
        worker.over.set()
    for worker in workers:
        worker.thread.join(150)
        assert not worker.thread.is_alive()
    for end, (descriptors, threads, _) in zip(ends, before):
        tunnel.eventually(
            lambda end=end, most=descriptors: end.usage()[0] <= most, f"{descriptors} descriptors"
        )
        assert end.usage()[1] <= threads
    time.sleep(min(60, seconds / 10))
    show(began, ends, counts)
    assert not counts["wrong"], counts
    assert not counts["timed out"], counts
    assert counts["whole"] > sum(counts.values()) / 4, counts
    gained = [end.usage()[2] - usual for end, usual in zip(ends, warm)]
    print(f"since the first tenth client and server gained {gained[0]} and {gained[1]} KiB")
    assert max(gained) < GROWTH
    for end in ends:
        assert end.stop() == 0
        assert "closing 0 tunnels, 0 connections" in end.log()
        assert "Traceback" not in end.log()


if __name__ == "__main__":
    if not netns.may_make_hosts():
        sys.exit("the soak makes hosts on this machine: sudo make soak")
    if missing := toxlab.why_not():
        sys.exit(f"the soak needs a Tox network: {missing}")
    with tempfile.TemporaryDirectory() as directory, Lab(Path(directory)) as lab:
        soak(lab, float(sys.argv[1]), int(sys.argv[2]))
