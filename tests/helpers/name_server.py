"""A name server on the server's host, that answers as a test wants."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

from tunnel import SERVER, SERVER_ADDRESS, Bench

NAME_SERVER = "203.0.113.53"  # behind the server's host: the default route leads there


class NameServer:
    """Answers A questions with one address, NXDOMAIN to all when there is none, or not at all."""

    def __init__(self, bench: Bench, host: str = SERVER, address: str = NAME_SERVER) -> None:
        self.address: str | None = SERVER_ADDRESS
        self.silent = False
        self.asked = 0
        self.bound_to = address
        self.sock = bench.on(host, self.bound)
        self.over = False
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def bound(self) -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind((self.bound_to, 53))
        sock.settimeout(0.1)
        return sock

    def serve(self) -> None:
        while not self.over:
            with contextlib.suppress(TimeoutError):
                question, client = self.sock.recvfrom(512)
                self.asked += 1
                if not self.silent:
                    self.sock.sendto(self.answer(question), client)
        self.sock.close()

    def close(self) -> None:
        self.over = True
        self.thread.join()

    def answer(self, question: bytes) -> bytes:
        """RFC 1035, section 4: the question again, and a record where it asks for an A."""
        end = question.index(b"\0", 12) + 5
        (kind,) = struct.unpack(">H", question[end - 4 : end - 2])
        found = kind == 1 and self.address is not None
        flags = 0x8180 if self.address else 0x8183
        head = question[:2] + struct.pack(">5H", flags, 1, int(found), 0, 0)
        record = struct.pack(">3HIH", 0xC00C, 1, 1, 0, 4)
        record += socket.inet_aton(self.address or "0.0.0.0")
        return head + question[12:end] + (record if found else b"")


@contextlib.contextmanager
def resolv_conf(directory: Path, server: str, head: str = "") -> Iterator[None]:
    """Have programs that are started now, and the tests, ask this name server."""
    path = directory / "resolv.conf"
    path.write_text(f"{head}nameserver {server}\noptions timeout:1 attempts:1\n")
    target = os.path.realpath("/etc/resolv.conf")
    subprocess.run(["mount", "--bind", path, target], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", target], check=True)
