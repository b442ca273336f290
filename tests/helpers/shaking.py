"""Run ttun's handshakes over a socket, and helpers for their tests."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable

from peer import BITS

from ttun import handshake, x1
from ttun.cipher import CIPHERS
from ttun.handshake import NONCE_SIZE, Terms

K = handshake.psk_key(b"secret")


def shake(steps: handshake.Steps, sock: socket.socket) -> handshake.Keys:
    """Run a handshake over a blocking socket, with exactly the bytes that it asks for."""
    try:
        send, wanted = next(steps)
        while True:
            if send:
                sock.sendall(send)
            data = b""
            while len(data) < wanted:
                part = sock.recv(wanted - len(data))
                if not part:
                    raise EOFError
                data += part
            send, wanted = steps.send(data)
    except StopIteration as done:
        return done.value


def drive(steps: handshake.Steps, sock: socket.socket) -> handshake.Keys:
    """Run a handshake and close the socket."""
    with sock:
        return shake(steps, sock)


def against(steps: handshake.Steps, peer: Callable[[socket.socket], None]) -> handshake.Keys:
    """Run a handshake against a peer at the other end of a socketpair."""
    ours, theirs = socket.socketpair()

    def run() -> None:
        try:
            peer(theirs)
        except (EOFError, OSError):
            pass
        finally:
            theirs.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        return drive(steps, ours)
    finally:
        thread.join()


ROLES = {"client": 0, "server": 1}
OURS = {"client": handshake.client, "server": handshake.server}
LOW_ORDER = [bytes(32), bytes([1]) + bytes(31), bytes([0xEC]) + b"\xff" * 30 + b"\x7f"]


def terms(*ciphers: str, wire: str = "auto", features: int = 3) -> Terms:
    return Terms(wire, offers=[CIPHERS[name] for name in ciphers or BITS], features=features)


def marked_nonce(direction: int, k: bytes = K) -> bytes:
    return x1.mark(k, direction, os.urandom(NONCE_SIZE))
