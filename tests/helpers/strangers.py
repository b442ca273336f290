"""Unauthenticated connections to a server, and a listener in place of the server."""

from __future__ import annotations

import os
import socket

from peer import Peer, echo_request
from tunnel import CLIENT, SERVER, SERVER_ADDRESS, TUNNEL4, Bench

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
    client.says("authenticated", seconds=seconds)
    bench.answers()
    client.stop()


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
