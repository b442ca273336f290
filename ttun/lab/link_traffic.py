"""Traffic for ``ttun bench link``: streams, fetches and pings, for links with delay, a queue and
loss.

``python -m ttun.lab.link_traffic serve ADDRESS PORT [CONGESTION]`` is the server; ``up``, ``down``,
``fetch`` and ``ping`` measure and print one line of JSON. CONGESTION is the congestion control of
the sockets that this program opens.

Unlike those of traffic.py, streams end after a fixed time: the receiver counts what arrives within
that time after the first bytes, and discards what is still in buffers and queues. Pings are sent
at a fixed rate, whether or not the previous one was answered, so that a stall shows as many slow
pings and not as one. Each measurement is one TCP connection::

    client: action, u8: 0 to the server, 1 from it, 2 fetch | u64 big-endian: ms, ms, bytes
    up:     client: any bytes; server, after that time: bytes and nanoseconds, u64, then EOF
    down:   server: any bytes, until the client disconnects
    fetch:  server: that many bytes, then EOF
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import socket
import struct
import sys
import threading
import time

from ttun.lab.traffic import (
    ICMP_ECHO,
    ICMP_REPLY,
    REQUEST,
    RESULT,
    internet_checksum,
    rate_of_all,
    receive_exactly,
)

UP, DOWN, FETCH = range(3)
BLOCK = bytes(1 << 18)
PATIENCE = 30.0  # seconds without a byte until a stream or a fetch has failed
ANSWER_WITHIN = 3.0  # seconds; a ping that is answered later counts as lost
FETCH_PAUSE = 0.05  # seconds between two fetches
LINGER = struct.pack("=ii", 1, 0)  # close() discards unsent data and resets the connection


def serve(address: str, port: int, congestion: str = "") -> None:
    """Serve clients forever, each in its own thread."""
    with socket.create_server((address, port), backlog=1024) as listener:
        _set_congestion(listener, congestion)  # accepted sockets inherit it
        print("ready", flush=True)
        while True:
            sock, _ = listener.accept()
            threading.Thread(target=_answer, args=(sock,), daemon=True).start()


def _answer(sock: socket.socket) -> None:
    with sock, contextlib.suppress(OSError):  # the client reports what went wrong
        sock.settimeout(PATIENCE)
        action, value = REQUEST.unpack(receive_exactly(sock, REQUEST.size))
        if action == UP:
            sock.sendall(RESULT.pack(*_count(sock, value / 1000)))
            with contextlib.suppress(socket.timeout):
                while sock.recv(len(BLOCK)):  # until the client has read the result and disconnects
                    pass
        elif action == DOWN:
            _send_until_answered(sock)
        else:
            sent = 0
            while sent < value:
                sent += sock.send(BLOCK[: value - sent])


def _set_congestion(sock: socket.socket, name: str) -> None:
    if name:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode())


def _connect(server: tuple[str, int], congestion: str) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        _set_congestion(sock, congestion)
        sock.settimeout(PATIENCE)
        sock.connect(server)
    except OSError:
        sock.close()
        raise
    return sock


def streams(
    server: tuple[str, int], action: int, number: int, seconds: float, congestion: str = ""
) -> float:
    """Run several streams at once at full speed; return their bits per second in total.

    Raises ConnectionError if one of them failed.
    """
    results: list[tuple[int, int]] = []
    together = threading.Barrier(number)
    over = threading.Event()  # until then all carry on, so that none gets the share of another

    def one() -> None:
        try:
            with _connect(server, congestion) as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER)
                together.wait(2 * PATIENCE)
                sock.sendall(REQUEST.pack(action, int(seconds * 1000)))
                if action == DOWN:
                    results.append(_count(sock, seconds))
                elif _send_until_answered(sock):
                    results.append(RESULT.unpack(receive_exactly(sock, RESULT.size)))
                if len(results) == number:
                    over.set()
                while not over.is_set():
                    _carry_on(sock, action)
        except (OSError, threading.BrokenBarrierError):
            together.abort()
            over.set()

    return rate_of_all(one, number, results)


def _count(sock: socket.socket, seconds: float) -> tuple[int, int]:
    """Receive for a fixed time from the first bytes on; return how many followed, and nanoseconds.

    The first ones may have waited for this process, and came before that time. Raises OSError if
    the peer disconnects or sends nothing for PATIENCE.
    """
    buffer = bytearray(1 << 20)
    if not sock.recv_into(buffer):
        raise ConnectionError("the sender disconnected")
    size, started = 0, time.monotonic()
    while (left := started + seconds - time.monotonic()) > 0:
        sock.settimeout(left)
        try:
            got = sock.recv_into(buffer)
        except socket.timeout:
            break
        if not got:
            raise ConnectionError("the sender disconnected")
        size += got
    sock.settimeout(PATIENCE)
    return size, int(seconds * 1e9)


def _send_until_answered(sock: socket.socket) -> bool:
    """Send until the peer answers or disconnects; return False if it does neither in time."""
    sock.setblocking(False)
    try:
        while True:
            readable, writable, _ = select.select([sock], [sock], [], PATIENCE)
            if readable or not writable:
                return bool(readable)
            with contextlib.suppress(BlockingIOError):
                sock.send(BLOCK)
    finally:
        sock.settimeout(PATIENCE)


def _carry_on(sock: socket.socket, action: int) -> None:
    """Keep the link busy for a moment, without counting."""
    reading, writing = ([sock], []) if action == DOWN else ([], [sock])
    readable, writable, _ = select.select(reading, writing, [], 0.1)
    with contextlib.suppress(BlockingIOError):
        if readable:
            sock.recv(len(BLOCK))
        elif writable:
            sock.send(BLOCK, socket.MSG_DONTWAIT)


def fetch(
    server: tuple[str, int], size: int, seconds: float, congestion: str = ""
) -> list[float | None]:
    """Fetch size bytes repeatedly, each time over a new connection, as a browser might.

    Returns the seconds that each took, from connecting to the last byte; None where one failed.
    """
    results: list[float | None] = []
    buffer = bytearray(1 << 18)
    end = time.monotonic() + seconds
    while not results or time.monotonic() < end:
        started, got = time.monotonic(), 0
        with contextlib.suppress(OSError), _connect(server, congestion) as sock:
            sock.sendall(REQUEST.pack(FETCH, size))
            while part := sock.recv_into(buffer):
                got += part
        results.append(time.monotonic() - started if got == size else None)
        time.sleep(FETCH_PAUSE)
    return results


def ping(address: str, times: int, interval: float) -> list[float | None]:
    """Ping at a fixed rate; return each round trip in seconds, None where a ping was lost.

    Needs CAP_NET_RAW.
    """
    results: list[float | None] = [None] * times
    sent_at = [math.inf] * times
    identifier, mark = os.getpid() & 0xFFFF, os.urandom(48)
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as sock:
        sock.connect((address, 0))
        started, sent, answered = time.monotonic(), 0, 0
        end = started + (times - 1) * interval + ANSWER_WITHIN
        while answered < times and (now := time.monotonic()) < end:
            if sent < times and now >= started + sent * interval:
                sent_at[sent] = now
                with contextlib.suppress(OSError):  # no route at present: it counts as lost
                    sock.send(_echo_request(identifier, sent, mark))
                sent += 1
                continue
            due = started + sent * interval if sent < times else end
            if not select.select([sock], [], [], max(0.0, due - now))[0]:
                continue
            try:
                packet = sock.recv(65536)
            except OSError:  # an ICMP error about an earlier ping
                continue
            arrived = time.monotonic()
            packet = packet[(packet[0] & 15) * 4 :]  # skip the IP header
            if packet[:1] != bytes([ICMP_REPLY]) or packet[16:] != mark or len(packet) < 16:
                continue
            number = int.from_bytes(packet[8:16], "big")
            if packet[4:6] == identifier.to_bytes(2, "big") and number < times:
                took = arrived - sent_at[number]
                if results[number] is None and took <= ANSWER_WITHIN:
                    results[number] = took
                    answered += 1
    return results


def _echo_request(identifier: int, number: int, mark: bytes) -> bytes:
    body = number.to_bytes(8, "big") + mark
    header = struct.pack(">BBHHH", ICMP_ECHO, 0, 0, identifier, number & 0xFFFF)
    checksum = internet_checksum(header + body)
    return header[:2] + checksum.to_bytes(2, "big") + header[4:] + body


def main(arguments: list[str]) -> None:
    """Run one action.

    serve ADDRESS PORT [CONGESTION]; up|down ADDRESS PORT STREAMS SECONDS [CONGESTION];
    fetch ADDRESS PORT BYTES SECONDS [CONGESTION]; ping ADDRESS TIMES INTERVAL.
    """
    action, address, number, *rest = arguments
    result: object
    if action == "serve":
        serve(address, int(number), *rest)
        return
    if action == "ping":
        result = ping(address, int(number), float(rest[0]))
    elif action == "fetch":
        result = fetch((address, int(number)), int(rest[0]), float(rest[1]), *rest[2:])
    else:
        kind = UP if action == "up" else DOWN
        result = streams((address, int(number)), kind, int(rest[0]), float(rest[1]), *rest[2:])
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
