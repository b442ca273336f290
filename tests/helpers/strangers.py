"""Unauthenticated connections to a server, and a listener in place of the server."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator

from peer import Peer, echo_request
from tunnel import CLIENT, SERVER, SERVER_ADDRESS, TUNNEL4, Bench, End

PORT = 20203
TO_SERVER = TUNNEL4[CLIENT], TUNNEL4[SERVER]


def connect(bench: Bench) -> socket.socket:
    """A connection from the client's host to the server."""
    return bench.on(CLIENT, lambda: socket.create_connection((SERVER_ADDRESS, PORT), 15))


def listen(bench: Bench) -> socket.socket:
    """A listener on the server's host, for ttun clients."""
    listener = bench.on(SERVER, lambda: socket.create_server((SERVER_ADDRESS, PORT)))
    listener.settimeout(15)
    return listener


def client_gets_in(bench: Bench, seconds: float = 5) -> None:
    """A valid client connects, is served, and disconnects."""
    client = bench.client()
    client.says("tun ttun0 up")  # from here on it is the server's time, not the program's
    client.says("authenticated", seconds=seconds)
    bench.answers()
    client.stop()


@contextlib.contextmanager
def vanished(bench: Bench, client: End) -> Iterator[None]:
    """The client's host says nothing more, and one with another address is in its place."""
    drop = "add table inet cut; add chain inet cut in { type filter hook input priority 0; }; "
    drop += "add rule inet cut in tcp dport 20203 ip saddr 192.0.2.2 drop"
    bench.run(SERVER, "nft", drop)
    bench.run(CLIENT, "ip", "address", "add", "192.0.2.77/24", "dev", "vclient")
    try:
        client.kill()
        bench.run(CLIENT, "ip", "route", "replace", SERVER_ADDRESS, "dev", "vclient",
                  "src", "192.0.2.77")  # fmt: skip
        yield
    finally:
        bench.run(SERVER, "nft", "delete table inet cut")
        bench.run(CLIENT, "ip", "address", "delete", "192.0.2.77/24", "dev", "vclient")
        bench.run(CLIENT, "ip", "route", "flush", SERVER_ADDRESS)


# Input from a peer without the key, and the log line about it.
STRANGERS = {
    "nothing, and leaves": (b"", "connection closed during the handshake"),
    "half a nonce": (os.urandom(8), "connection closed during the handshake"),
    "random bytes": (bytes([7]) * 16 + b"\x01\x00" + os.urandom(1000), "not a ttun peer"),
    "a request of HTTP": (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "not a ttun peer"),
    "a length of 0": (os.urandom(16) + b"\0\0", "first frame has length 0"),
    "a length of 15": (os.urandom(16) + b"\0\x0f" + bytes(15), "has length 15"),
    "a length of 65535": (os.urandom(16) + b"\xff\xff" + bytes(99), "has length 65535"),
    "a forged magic": (os.urandom(16) + b"\0\x18" + os.urandom(24), "authentication failed"),
    "half a magic": (os.urandom(16) + b"\0\x18" + os.urandom(12), "closed during the handshake"),
}


def arrive(bench: Bench) -> Peer:
    """A peer that authenticates and gets an answer."""
    peer = Peer(connect(bench), b"secret")
    peer.handshake_as_client()
    request = echo_request(*TO_SERVER, os.urandom(20))
    peer.send(request)
    peer.receive_reply(request)
    return peer
