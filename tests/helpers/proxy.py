"""A proxy for the tests, on every address of its host: ``proxy.py socks5|http PORT``."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading

from ttun.tox import socks5


def copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError), source, target:
        while data := source.recv(65536):
            target.sendall(data)


def ask_socks5(sock: socket.socket) -> tuple[str, int]:
    """Have a client say in SOCKS5 where it wants to go."""
    steps = socks5.server()
    answer, wanted = next(steps)
    try:
        while True:
            sock.sendall(answer)
            answer, wanted = steps.send(sock.recv(wanted, socket.MSG_WAITALL) if wanted else b"")
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]


def ask_http(sock: socket.socket) -> tuple[str, int]:
    """The same in HTTP: ``CONNECT host:port HTTP/1.1``, header lines, an empty one (RFC 9110)."""
    request = b""
    while not request.endswith(b"\r\n\r\n"):
        more = sock.recv(1)  # not one byte of what is for the target
        if not more:
            raise ConnectionError("it hung up")
        request += more
    method, target, _ = request.decode("ascii").split(" ", 2)
    if method != "CONNECT":
        raise ConnectionError(f"it wants to {method}")
    print("CONNECT", target, flush=True)
    host, _, port = target.rpartition(":")
    return host.strip("[]"), int(port)


KINDS = {
    "socks5": (ask_socks5, socks5.reply(None)),
    "http": (ask_http, b"HTTP/1.1 200 Connection established\r\n\r\n"),
}


def serve(sock: socket.socket, kind: str) -> None:
    ask, answer = KINDS[kind]
    with contextlib.suppress(OSError):
        far = socket.create_connection(ask(sock), 10)
        sock.sendall(answer)
        threading.Thread(target=copy, args=(far.dup(), sock.dup()), daemon=True).start()
        copy(sock, far)
    sock.close()


if __name__ == "__main__":
    listener = socket.create_server(("", int(sys.argv[2])))
    while True:
        accepted, _ = listener.accept()
        threading.Thread(target=serve, args=(accepted, sys.argv[1]), daemon=True).start()
