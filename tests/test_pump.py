"""The four threads over socketpairs: one replaces the TUN device, one the connection.

A datagram socketpair keeps packet boundaries like a TUN device, so this needs no root. The other
end of the connection is the independent peer.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest
from connections import paced
from known_answers import SESSIONS, frames, plaintext
from peer import Peer
from socket_device import RunningSession, SocketDevice
from ttun._codec import lib

from ttun import session
from ttun.cipher import CIPHERS, CipherState
from ttun.handshake import Keys, session_key
from ttun.session import Session
from ttun.settings import NORMAL, SMALL, Buffers

NONCES = b"c" * 16, b"s" * 16
# Cores, and buffers: how slots are handed over depends on them.
FEW, MANY = ([0, 1], NORMAL), ([0, 1, 2, 3], NORMAL)
FEW_SMALL, MANY_SMALL = ([0, 1], SMALL), ([0, 1, 2, 3], SMALL)


class Rig(RunningSession):
    """A server's session, its device, and the client at the other end."""

    def __init__(
        self,
        cipher: str = "chacha20-poly1305",
        sk: bytes | None = None,
        buffers: Buffers = NORMAL,
        rate: int | None = None,
    ) -> None:
        """rate: bytes per second of a TCP connection; None for a socketpair."""
        self.device = SocketDevice()
        ours, theirs = socket.socketpair() if rate is None else paced(rate)
        self.peer = Peer(theirs, b"secret", cipher)
        self.peer.key(*NONCES, sends=0)
        sk = sk or session_key(self.peer.k, *NONCES)
        keys = Keys(CipherState(CIPHERS[cipher], 1, sk), CipherState(CIPHERS[cipher], 0, sk))
        self.session = Session(ours, self.device, keys, buffers=buffers)  # type: ignore[arg-type]

    def receive(self) -> bytes:
        """The next packet written to the device."""
        return self.device.outside.recv(70000)


@pytest.fixture(
    params=[FEW, MANY, FEW_SMALL, MANY_SMALL],
    ids=["few-cores", "many-cores", "few-cores-small", "many-cores-small"],
)
def rig(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    cores, buffers = request.param
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores)
    rig = Rig(buffers=buffers)
    yield rig
    rig.end()


def test_packets_go_both_ways_in_order(rig: Rig) -> None:
    packets = [os.urandom(size) for size in (1, 20, 576, 1280, 9000, 65519)] * 20
    received = []

    def read() -> None:
        for _ in packets:
            received.append(rig.peer.receive())

    reader = threading.Thread(target=read)
    reader.start()
    for packet in packets:
        rig.device.outside.send(packet)
    reader.join()
    assert received == packets
    for packet in packets:
        rig.peer.send(packet)
        assert rig.receive() == packet
    assert rig.end() == "stopped"
    counters = rig.session.counters()
    total = sum(map(len, packets))
    assert (counters.uplink_packets, counters.uplink_bytes) == (len(packets), total)
    assert (counters.downlink_packets, counters.downlink_bytes) == (len(packets), total)


@pytest.mark.parametrize("answers", SESSIONS, ids=lambda s: f"{s['cipher']}-{s['psk'][:8]}")
@pytest.mark.parametrize("piece", [1, 2, 3, 7, 16, 17, 18, 1000, 1296, 65537, 300_000])
def test_known_answers_arrive_in_pieces_of_every_size(answers: dict, piece: int) -> None:
    cipher, sk = CIPHERS[answers["cipher"]], bytes.fromhex(answers["SK"])
    packets = [plaintext(frame) for frame in frames(answers, "client to server")]
    stream = b"".join(map(CipherState(cipher, 0, sk).seal, packets))
    rig = Rig(answers["cipher"], sk=sk)

    def write() -> None:
        for start in range(0, len(stream), piece):
            rig.peer.sock.sendall(stream[start : start + piece])
        rig.peer.sock.close()

    writer = threading.Thread(target=write)
    writer.start()
    for packet in filter(None, packets):
        assert rig.receive() == packet
    writer.join()
    assert rig.ended() == "the peer closed the connection"


def test_a_close_that_the_sender_notices_first_is_the_same_reason() -> None:
    """A race between two threads decides which of them is told."""
    assert session._reason(lib.TTUN_END_SOCKET, errno.EPIPE) == "the peer closed the connection"
    assert session._reason(lib.TTUN_END_SOCKET, errno.ETIMEDOUT) == "Connection timed out"


def test_the_uplink_goes_on_while_the_downlink_is_full(rig: Rig) -> None:
    """The uplink works however fast the peer sends."""
    frames = threading.Event()

    def flood() -> None:
        with contextlib.suppress(OSError):
            while not frames.is_set():
                batch = [rig.peer.sending.seal(bytes(1200)) for _ in range(300)]
                rig.peer.sock.sendall(b"".join(batch))

    flooding = threading.Thread(target=flood)
    flooding.start()
    rig.peer.sock.settimeout(10)
    for number in range(100):
        packet = b"%d" % number
        rig.device.outside.send(packet)
        assert rig.peer.receive() == packet
    frames.set()
    flooding.join()


def test_an_empty_frame_is_ignored(rig: Rig) -> None:
    rig.peer.send(b"")
    rig.peer.send(b"packet")
    assert rig.receive() == b"packet"
    rig.end()
    assert rig.session.counters().empty == 1


def test_a_packet_that_fits_no_frame_is_dropped_and_counted(rig: Rig) -> None:
    for packet in (bytes(65520), b"next", bytes(65535), b"last"):
        rig.device.outside.send(packet)
    assert [rig.peer.receive(), rig.peer.receive()] == [b"next", b"last"]
    rig.end()
    assert rig.session.counters().unsendable == 2


@pytest.mark.parametrize("length", [0, 1, 15])
def test_a_length_below_the_tag_ends_it_after_what_came_before(rig: Rig, length: int) -> None:
    rig.peer.sock.sendall(rig.peer.sending.seal(b"last") + struct.pack(">H", length) + bytes(100))
    assert rig.ended() == f"the peer sent a frame of length {length}, shorter than the tag"
    assert rig.receive() == b"last"


@pytest.mark.parametrize("where", [2, 10, -1])
def test_a_changed_frame_ends_it_and_is_not_delivered(rig: Rig, where: int) -> None:
    frame = bytearray(rig.peer.sending.seal(b"a packet of the peer"))
    frame[where] ^= 0x80
    rig.peer.sock.sendall(rig.peer.sending.seal(b"") + frame)  # the numbers are off as well
    assert "failed authentication" in rig.ended()
    assert rig.session.counters().downlink_packets == 0


def test_a_repeated_frame_ends_it(rig: Rig) -> None:
    frame = rig.peer.sending.seal(b"once")
    rig.peer.sock.sendall(frame + frame)
    assert "failed authentication" in rig.ended()
    assert rig.receive() == b"once"


@pytest.mark.parametrize("size", [1, 2, 3, 40])
def test_an_end_in_the_middle_of_a_frame_is_told(rig: Rig, size: int) -> None:
    rig.peer.sock.sendall(rig.peer.sending.seal(bytes(100))[:size])
    rig.peer.sock.close()
    assert rig.ended() == f"connection closed {size} bytes into a frame"


def test_everything_before_the_end_is_delivered(rig: Rig) -> None:
    packets = [os.urandom(1000) for _ in range(100)]
    rig.peer.sock.sendall(b"".join(map(rig.peer.sending.seal, packets)))
    rig.peer.sock.close()
    assert [rig.receive() for _ in packets] == packets
    assert rig.ended() == "the peer closed the connection"


def test_it_stops_while_both_directions_are_blocked(rig: Rig) -> None:
    packet = os.urandom(60000)
    rig.device.outside.setblocking(False)
    blocked = 0
    while blocked < 50:  # until the peer, which reads nothing, holds everything up
        try:
            rig.device.outside.send(packet)
            blocked = 0
        except BlockingIOError:
            blocked += 1
            threading.Event().wait(0.005)
    assert rig.end() == "stopped"


def test_a_full_device_loses_packets_not_the_session(rig: Rig) -> None:
    for _ in range(100_000):  # the device is not read
        rig.peer.send(bytes(1000))
        if rig.session.counters().refused > 0:
            break
    else:
        pytest.fail("the device took everything")
    reader = threading.Thread(target=lambda: [None for _ in iter(rig.receive, b"still there")])
    reader.start()
    while reader.is_alive():  # it may be lost too until the reader has made room
        rig.peer.send(b"still there")
        reader.join(0.01)
    assert rig.end() == "stopped"


def test_a_device_is_drained_so_far_and_no_further() -> None:
    device = SocketDevice()
    for number in range(5):
        device.outside.send(b"%d" % number)
    assert lib.ttun_drain(device.fileno(), 3) == 3
    assert device.inside.recv(100) == b"3"
    assert lib.ttun_drain(device.fileno(), 3) == 1
    assert lib.ttun_drain(device.fileno(), 3) == 0
    device.outside.send(b"")  # as at the end of it
    assert lib.ttun_drain(device.fileno(), 3) == 0


def test_a_thousand_sessions_leave_nothing_behind() -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    Rig().end()
    before = descriptors(), threading.active_count()
    for _ in range(1000):
        rig = Rig()
        rig.end()
        rig.peer.sock.close()
        rig.device.inside.close()
        rig.device.outside.close()
    assert (descriptors(), threading.active_count()) <= before


@pytest.mark.parametrize("error", [MemoryError, RuntimeError])
@pytest.mark.parametrize("started", [0, 1, 3])
def test_a_session_that_cannot_have_all_its_threads_has_none(
    monkeypatch: pytest.MonkeyPatch, started: int, error: type[Exception]
) -> None:
    """Running threads once continued with a closed socket and device."""
    start, pumps = threading.Thread.start, []

    def scarce(thread: threading.Thread) -> None:
        if thread.name == "ttun-pump":
            if len(pumps) == started:
                raise error
            pumps.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", scarce)
    with pytest.raises(error):
        Rig()
    assert not any(thread.is_alive() for thread in pumps)


def udp(port: int, number: int, size: int) -> bytes:
    """A packet with its flow and number."""
    ip = bytes([0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0, 10, 1, 1, 1, 10, 1, 1, 2])
    body = port.to_bytes(2, "big") + bytes(6) + number.to_bytes(4, "big")
    return ip + body + bytes(size - len(ip) - len(body))


@pytest.mark.parametrize("buffers", [NORMAL, SMALL], ids=["normal", "small"])
@pytest.mark.parametrize("cores", [2, 4])
def test_on_a_slow_connection_a_ping_overtakes_a_transfer(
    cores: int, buffers: Buffers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Usually after 10 of 300 packets; after all of them in order of arrival."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))
    rig = Rig(buffers=buffers, rate=400_000)
    rig.peer.sock.settimeout(20)
    bulk = [udp(1, number, 1200) for number in range(300)]  # the last one is never dropped
    ping = udp(2, 0, 84)
    try:
        for packet in [*bulk, ping]:
            rig.device.outside.send(packet)
        received: list[bytes] = []
        while ping not in received or bulk[-1] not in received:
            received.append(rig.peer.receive())
    finally:
        rig.end()
    assert received.index(ping) < 150
    received.remove(ping)
    assert received == [packet for packet in bulk if packet in received], "each flow in its order"


def test_what_a_slow_connection_cannot_take_is_dropped_and_counted() -> None:
    rig = Rig(buffers=SMALL, rate=200_000)
    rig.peer.sock.settimeout(20)
    sent = [udp(1, number, 1200) for number in range(1500)]  # the queue has room for 400
    try:
        for packet in sent:
            rig.device.outside.send(packet)
        received = []
        while not received or received[-1] != sent[-1]:
            received.append(rig.peer.receive())
    finally:
        rig.end()
    counters = rig.session.counters()
    assert len(received) + counters.congested == len(sent) and counters.congested > 500
    assert received == [packet for packet in sent if packet in set(received)]


@pytest.mark.parametrize("buffers", [NORMAL, SMALL], ids=["normal", "small"])
def test_a_sender_is_told_of_a_connection_that_stays_behind(buffers: Buffers) -> None:
    """Whether slots wait in the ring or, with a single slot, were just sent."""
    rig = Rig(buffers=buffers)
    over = threading.Event()

    def send() -> None:
        packet = udp(1, 0, 1200)
        with contextlib.suppress(OSError):
            while not over.is_set():
                rig.device.outside.send(packet)

    def drops(least: int) -> float:
        """Read so many packets slowly; return the time since the start."""
        while rig.session.counters().congested < least and time.monotonic() < start + 20:
            rig.peer.sock.recv(65536)
            time.sleep(0.01)
        assert rig.session.counters().congested >= least
        return time.monotonic() - start

    sender = threading.Thread(target=send)
    start = time.monotonic()
    sender.start()
    try:
        assert drops(1) > 0.1, "a burst of less than an interval is none"
        drops(5)
    finally:
        over.set()
        rig.end()
        rig.device.outside.shutdown(socket.SHUT_RDWR)
        sender.join()


def test_a_connection_that_keeps_up_drops_nothing_however_its_packets_come(rig: Rig) -> None:
    """A pause between two packets of the device is not a delay of the connection.

    Every 3 ms, one slot waits for 1 ms. A busy machine may make it more for a while.
    """
    slot = [bytes(60000)] * 4
    dropped: list[int] = []
    while 0 not in dropped and len(dropped) < 3:
        before = rig.session.counters().congested
        for _ in range(300):
            for packet in slot:
                rig.device.outside.send(packet)
            time.sleep(0.001)
            rest = sum(len(packet) + 18 for packet in slot)
            with contextlib.suppress(socket.timeout):  # one was dropped
                rig.peer.sock.settimeout(0.1)
                while rest > 0:
                    rest -= len(rig.peer.sock.recv(rest))
            time.sleep(0.0014)
        dropped.append(rig.session.counters().congested - before)
    assert 0 in dropped


def test_who_makes_the_socket_non_blocking_ends_and_loses_nothing(rig: Rig) -> None:
    """O_NONBLOCK belongs to the open file, which a parent process or another thread may share."""
    with rig.session._sock.dup() as shared:
        shared.setblocking(False)
    for packet in (b"\x45 the receiver waits", b"\x45 it looks again", b"\x45 and again"):
        rig.peer.send(packet)
        assert rig.receive() == packet
    # More than the socket takes while nobody reads; CoDel drops none that is so small.
    packets = [struct.pack(">BH200x", 0x45, number) for number in range(5000)]
    sending = threading.Thread(target=lambda: [rig.device.outside.send(x) for x in packets])
    sending.start()
    time.sleep(0.5)
    assert [rig.peer.receive() for _ in packets] == packets
    sending.join()
    assert rig.end() == "stopped"
