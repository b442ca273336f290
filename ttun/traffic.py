"""Traffic through a tunnel, made and measured: for the demo, the benchmark and the tests.

``python -m ttun.traffic serve ADDRESS PORT`` answers; ``send``, ``receive`` and ``ping`` measure
and print one line of JSON. A transfer is one TCP connection::

    client: direction, u8: 0 to the server, 1 from it | size, u64 big-endian
    sender: size bytes, then their SHA-256        receiver, after all of it: b"1" whole, b"0" not
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import struct
import sys
import threading
import time

REQUEST = struct.Struct(">BQ")
UPLOAD, DOWNLOAD = 0, 1
BLOCK = 1 << 20
ICMP_ECHO, ICMPV6_ECHO, ICMP_REPLY, ICMPV6_REPLY = 8, 128, 0, 129
IP_MTU_DISCOVER, IPV6_MTU_DISCOVER, PMTUDISC_DO = 10, 23, 2  # linux/in.h, linux/in6.h
PATIENCE = 30.0  # seconds without a byte before a transfer has failed


def serve(address: str, port: int) -> None:
    """Answer transfers, each on a thread of its own, for ever."""
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
            direction, size = REQUEST.unpack(_receive_exactly(sock, REQUEST.size))
            if direction == UPLOAD:
                _receive_and_judge(sock, size)
            else:
                _send_and_ask(sock, size)
        except OSError as error:
            print(f"transfer failed: {error}", file=sys.stderr)


def transfer(address: str, port: int, direction: int, size: int) -> dict[str, float | bool]:
    """Send or receive size bytes. Returns seconds, and whether every byte arrived as sent."""
    with socket.create_connection((address, port), timeout=PATIENCE) as sock:
        started = time.monotonic()
        sock.sendall(REQUEST.pack(direction, size))
        whole = _send_and_ask(sock, size) if direction == UPLOAD else _receive_and_judge(sock, size)
        return {"seconds": time.monotonic() - started, "whole": whole}


def _send_and_ask(sock: socket.socket, size: int) -> bool:
    """Send random blocks, each with its number so that no two are alike; return the verdict."""
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
    return _receive_exactly(sock, 1) == b"1"


def _receive_and_judge(sock: socket.socket, size: int) -> bool:
    """Receive size bytes and their digest; tell the sender whether they agree."""
    buffer = memoryview(bytearray(BLOCK))
    digest = hashlib.sha256()
    left = size
    while left:
        got = sock.recv_into(buffer[: min(BLOCK, left)])
        if not got:
            raise ConnectionError(f"closed with {left} of {size} bytes to come")
        digest.update(buffer[:got])
        left -= got
    whole = _receive_exactly(sock, digest.digest_size) == digest.digest()
    sock.sendall(b"1" if whole else b"0")
    return whole


def _receive_exactly(sock: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = sock.recv(size - len(data))
        if not part:
            raise ConnectionError("closed too early")
        data += part
    return bytes(data)


def ping(address: str, times: int, interval: float, size: int = 56) -> list[float | None]:
    """Ping; return each round trip in seconds, None for one unanswered within a second.

    size: bytes behind the ICMP header, never fragmented. interval: seconds between two. Needs
    CAP_NET_RAW. Raises OSError where a packet of that size cannot go out.
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
            if not v6:  # the kernel does it for ICMPv6 (RFC 3542, section 3.1)
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
    """Run serve ADDRESS PORT, send|receive ADDRESS PORT BYTES, or ping ADDRESS TIMES [BYTES]."""
    action, address, number = arguments[0], arguments[1], int(arguments[2])
    if action == "serve":
        serve(address, number)
    elif action == "ping":
        size = int(arguments[3]) if arguments[3:] else 56
        print(json.dumps(ping(address, number, interval=0.01, size=size)))
    else:
        direction = UPLOAD if action == "send" else DOWNLOAD
        print(json.dumps(transfer(address, number, direction, int(arguments[3]))))


if __name__ == "__main__":
    main(sys.argv[1:])
