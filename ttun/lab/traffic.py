"""Generate and measure traffic through a tunnel, for the demo, the benchmark and the tests.

``python -m ttun.lab.traffic serve ADDRESS PORT`` is the server; the other actions measure and print
one line of JSON. ``send`` and ``receive`` compare checksums, with one TCP connection each::

    client: action, u8: 0 to the server, 1 from it | size, u64 big-endian
    sender: size bytes, then their SHA-256      receiver, after that: b"1" if it matches, else b"0"

``flood`` and ``drain`` measure TCP throughput, as iperf3 does; ``datagrams`` counts the UDP
datagrams that arrive::

    client: action, u8: 2 to the server, 3 from it, 4 datagrams | milliseconds, u64 big-endian
    sender: any bytes, then EOF                 receiver, after that: bytes and nanoseconds, u64

    datagrams: the server answers with a UDP port, u64; the client sends datagrams there, then one
    byte on this connection; the server answers with the number that arrived and 0, u64
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable

REQUEST = struct.Struct(">BQ")
UPLOAD, DOWNLOAD, FLOOD, DRAIN, DATAGRAMS = range(5)
RESULT = struct.Struct(">QQ")
BLOCK = 1 << 20
ICMP_ECHO, ICMPV6_ECHO, ICMP_REPLY, ICMPV6_REPLY = 8, 128, 0, 129
IP_MTU_DISCOVER, IPV6_MTU_DISCOVER, PMTUDISC_DO = 10, 23, 2  # linux/in.h, linux/in6.h
PATIENCE = 30.0  # seconds without a byte until a transfer has failed
LONGEST = 3600.0  # seconds of datagrams, as many as --seconds may be


def serve(address: str, port: int) -> None:
    """Serve clients forever, each in its own thread."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, port), family=family, backlog=1024) as listener:
        print("ready", flush=True)
        while True:
            sock, _ = listener.accept()
            threading.Thread(target=_answer, args=(sock,), daemon=True).start()


def _answer(sock: socket.socket) -> None:
    with sock:
        sock.settimeout(PATIENCE)
        try:
            action, size = REQUEST.unpack(receive_exactly(sock, REQUEST.size))
            if action == UPLOAD:
                _receive_and_judge(sock, size)
            elif action == DOWNLOAD:
                _send_and_ask(sock, size)
            elif action == FLOOD:
                sock.sendall(RESULT.pack(*_receive_all(sock)))
            elif action == DRAIN:
                _send_for(sock, size / 1000)
            else:
                _count_datagrams(sock, size / 1000)
        except OSError as error:
            print(f"transfer failed: {error}", file=sys.stderr)


def transfer(address: str, port: int, direction: int, size: int) -> dict[str, float | bool]:
    """Send or receive size bytes. Returns the seconds, and whether the data arrived unchanged."""
    with socket.create_connection((address, port), timeout=PATIENCE) as sock:
        started = time.monotonic()
        sock.sendall(REQUEST.pack(direction, size))
        whole = _send_and_ask(sock, size) if direction == UPLOAD else _receive_and_judge(sock, size)
        return {"seconds": time.monotonic() - started, "whole": whole}


def _send_and_ask(sock: socket.socket, size: int) -> bool:
    """Send random blocks, numbered so that all differ; return whether the SHA-256 matched."""
    block = bytearray(os.urandom(min(size, BLOCK) + 8))
    digest = hashlib.sha256()
    sent = 0
    while sent < size:
        block[:8] = sent.to_bytes(8, "big")
        part = memoryview(block)[: min(BLOCK, size - sent)]
        sock.sendall(part)
        digest.update(part)
        sent += len(part)
    sock.sendall(digest.digest())
    return receive_exactly(sock, 1) == b"1"


def _receive_and_judge(sock: socket.socket, size: int) -> bool:
    """Receive size bytes and their digest; tell the sender whether they match."""
    buffer = memoryview(bytearray(BLOCK))
    digest = hashlib.sha256()
    left = size
    while left:
        got = sock.recv_into(buffer[: min(BLOCK, left)])
        if not got:
            raise ConnectionError(f"connection closed with {left} of {size} bytes missing")
        digest.update(buffer[:got])
        left -= got
    whole = receive_exactly(sock, digest.digest_size) == digest.digest()
    sock.sendall(b"1" if whole else b"0")
    return whole


def flood(address: str, port: int, action: int, streams: int, seconds: float) -> float:
    """Send (FLOOD) or receive (DRAIN) over several streams at once; return bits per second.

    The rate is what the receiver received, divided by the time that took.
    """
    results: list[tuple[int, int]] = []

    def one() -> None:
        with socket.create_connection((address, port), timeout=PATIENCE) as sock:
            sock.sendall(REQUEST.pack(action, int(seconds * 1000)))
            if action == DRAIN:
                results.append(_receive_all(sock))
            else:
                _send_for(sock, seconds)
                results.append(RESULT.unpack(receive_exactly(sock, RESULT.size)))

    return rate_of_all(one, streams, results)


def rate_of_all(one: Callable[[], None], streams: int, results: list[tuple[int, int]]) -> float:
    """Run one() in parallel for each stream; return the sum of their rates in bits per second.

    results: each stream appends its bytes and nanoseconds. Raises ConnectionError if one failed.
    """
    threads = [threading.Thread(target=one) for _ in range(streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(results) < streams:
        raise ConnectionError(f"{streams - len(results)} of {streams} streams failed")
    return sum(size * 8e9 / nanoseconds for size, nanoseconds in results)


def _send_for(sock: socket.socket, seconds: float) -> None:
    block = bytes(BLOCK // 4)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sock.sendall(block)
    sock.shutdown(socket.SHUT_WR)


def _receive_all(sock: socket.socket) -> tuple[int, int]:
    """Receive until EOF; return bytes, and nanoseconds from the first to the last."""
    buffer = bytearray(BLOCK)
    size = sock.recv_into(buffer)
    started = last = time.monotonic_ns()
    while got := sock.recv_into(buffer):
        size += got
        last = time.monotonic_ns()
    return size, max(1, last - started)


def datagrams(
    address: str, port: int, size: int, rate: int, seconds: float
) -> dict[str, float | int]:
    """Send datagrams of size bytes at a rate per second (0: as many as possible).

    Returns the numbers sent and arrived, and the seconds that sending took.
    """
    with contextlib.ExitStack() as stack:
        control = stack.enter_context(socket.create_connection((address, port), timeout=PATIENCE))
        sender = stack.enter_context(socket.socket(control.family, socket.SOCK_DGRAM))
        control.sendall(REQUEST.pack(DATAGRAMS, int(seconds * 1000)))
        (target,) = struct.unpack(">Q", receive_exactly(control, 8))
        sender.connect((address, target))
        body = bytes(size)
        sent, started = 0, time.monotonic()
        while (elapsed := time.monotonic() - started) < seconds:
            due = int(rate * elapsed) - sent if rate else 1000
            for _ in range(due):
                sender.send(body)
            sent += due
        control.sendall(b".")
        arrived, _ = RESULT.unpack(receive_exactly(control, RESULT.size))
        return {"sent": sent, "arrived": arrived, "seconds": elapsed}


def _count_datagrams(control: socket.socket, seconds: float) -> None:
    with socket.socket(control.family, socket.SOCK_DGRAM) as receiver:
        receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        receiver.bind((control.getsockname()[0], 0))
        receiver.settimeout(0.3)
        control.sendall(struct.pack(">Q", receiver.getsockname()[1]))
        done = threading.Event()
        control.settimeout(min(seconds, LONGEST) + PATIENCE)

        def await_end() -> None:
            with contextlib.suppress(OSError):
                control.recv(1)
            done.set()

        threading.Thread(target=await_end, daemon=True).start()
        arrived, buffer = 0, bytearray(65536)
        while True:
            try:
                while True:
                    receiver.recv_into(buffer)
                    arrived += 1
            except socket.timeout:
                if done.is_set():
                    break
        control.sendall(RESULT.pack(arrived, 0))


def receive_exactly(sock: socket.socket, size: int) -> bytes:
    """Receive so many bytes. Raises ConnectionError if there are fewer."""
    data = bytearray()
    while len(data) < size:
        part = sock.recv(size - len(data))
        if not part:
            raise ConnectionError("connection closed too early")
        data += part
    return bytes(data)


def ping(address: str, times: int, interval: float, size: int = 56) -> list[float | None]:
    """Ping; return each round trip in seconds, None where no answer came within a second.

    size: bytes after the ICMP header, never fragmented. interval: seconds between two pings. Needs
    CAP_NET_RAW. Raises OSError if the kernel rejects a packet of that size.
    """
    v6 = ":" in address
    family, protocol, request, reply = (
        (socket.AF_INET6, socket.IPPROTO_ICMPV6, ICMPV6_ECHO, ICMPV6_REPLY)
        if v6
        else (socket.AF_INET, socket.IPPROTO_ICMP, ICMP_ECHO, ICMP_REPLY)
    )
    results: list[float | None] = []
    identifier = os.getpid() & 0xFFFF
    with socket.socket(family, socket.SOCK_RAW, protocol) as sock:
        sock.connect((address, 0))
        if v6:
            sock.setsockopt(socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, PMTUDISC_DO)
        else:
            sock.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, PMTUDISC_DO)
        for sequence in range(times):
            body = os.urandom(size)
            header = struct.pack(">BBHHH", request, 0, 0, identifier, sequence)
            if not v6:  # for ICMPv6 the kernel fills in the checksum (RFC 3542, section 3.1)
                checksum = internet_checksum(header + body)
                header = struct.pack(">BBHHH", request, 0, checksum, identifier, sequence)
            started = time.monotonic()
            sock.send(header + body)
            results.append(_await_reply(sock, v6, reply, header[4:] + body, started))
            time.sleep(interval)
    return results


def _await_reply(
    sock: socket.socket, v6: bool, reply: int, echo: bytes, started: float
) -> float | None:
    while (left := started + 1 - time.monotonic()) > 0:
        sock.settimeout(left)
        try:
            packet = sock.recv(65536)
        except OSError:
            return None
        if not v6:  # a raw IPv4 socket shows the IP header
            packet = packet[(packet[0] & 15) * 4 :]
        if packet[0] == reply and packet[4:] == echo:
            return time.monotonic() - started
    return None


def internet_checksum(data: bytes) -> int:
    """Return the Internet checksum of data (RFC 1071)."""
    data += b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def main(arguments: list[str]) -> None:
    """Run one action.

    serve ADDRESS PORT; send|receive ADDRESS PORT BYTES; flood|drain ADDRESS PORT STREAMS SECONDS;
    datagrams ADDRESS PORT BYTES RATE SECONDS; ping ADDRESS TIMES [BYTES [INTERVAL]].
    """
    action, address, number, *rest = arguments
    if action == "serve":
        serve(address, int(number))
        return
    result: object
    if action == "ping":
        size, interval = [*rest, *("56", "0.01")[len(rest) :]]
        result = ping(address, int(number), float(interval), int(size))
    elif action == "datagrams":
        result = datagrams(address, int(number), int(rest[0]), int(rest[1]), float(rest[2]))
    elif action in ("flood", "drain"):
        kind = FLOOD if action == "flood" else DRAIN
        result = flood(address, int(number), kind, int(rest[0]), float(rest[1]))
    else:
        kind = UPLOAD if action == "send" else DOWNLOAD
        result = transfer(address, int(number), kind, int(rest[0]))
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
