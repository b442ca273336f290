"""A SOCKS5 proxy for the tests: ``socks_proxy.py PORT``, on every address of its host."""

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


def serve(sock: socket.socket) -> None:
    steps = socks5.server()
    answer, wanted = next(steps)
    try:
        while True:
            sock.sendall(answer)
            answer, wanted = steps.send(sock.recv(wanted, socket.MSG_WAITALL) if wanted else b"")
    except StopIteration as done:
        far = socket.create_connection(done.value, 10)
    sock.sendall(socks5.reply(None))
    threading.Thread(target=copy, args=(far.dup(), sock.dup()), daemon=True).start()
    copy(sock, far)


if __name__ == "__main__":
    listener = socket.create_server(("", int(sys.argv[1])))
    while True:
        threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
