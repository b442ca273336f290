"""A vanished peer: the link goes down, so nothing answers."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time

import pytest
from machine import cpu
from peer import Peer
from tunnel import CLIENT, SERVER, SERVER_ADDRESS, TUNNEL4, Bench, eventually

from ttun import mptcp, tcp
from ttun.address import Address

pytestmark = pytest.mark.hosts

SO_BINDTODEVICE = 25
GONE = "peer timed out: last received"
KINDS = [(proto, busy) for proto in ("tcp", "mptcp") for busy in (False, True)]
V1 = ("--wire", "v1")  # x1 has its own liveness check
needs_mptcp = pytest.mark.skipif(
    not os.path.exists("/proc/sys/net/mptcp"), reason="no Multipath TCP in this kernel"
)


def connect(bench: Bench, port: int, mptcp: bool) -> socket.socket:
    def dial() -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, tcp.IPPROTO_MPTCP if mptcp else 0)
        sock.connect((SERVER_ADDRESS, port))
        return sock

    return bench.on(CLIENT, dial)


def swallow(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while sock.recv(65536):
            pass


def send_into(bench: Bench, device: str) -> None:
    """Make the server's host send packets into one of several identical devices."""

    def send() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, SO_BINDTODEVICE, device.encode())
            for _ in range(20):
                sock.sendto(bytes(1000), (TUNNEL4[CLIENT], 9))

    bench.on(SERVER, send)


@pytest.mark.slow
@needs_mptcp
def test_a_vanished_peer_leaves_the_listener_free_within_45_seconds(plain: Bench) -> None:
    """Over TCP and MPTCP, idle and with data in flight: four servers in parallel."""
    servers, socks = [], []
    for number, (proto, _) in enumerate(KINDS):
        server = plain.server("-l", f":{20300 + number}")
        sock = connect(plain, 20300 + number, proto == "mptcp")
        Peer(sock, b"secret").handshake_as_client()
        server.says(f"connected over {proto};")
        server.says("authenticated")
        sock.settimeout(None)
        threading.Thread(target=swallow, args=(sock,), daemon=True).start()
        servers.append(server)
        socks.append(sock)
    try:
        time.sleep(1)  # what a fresh device says by itself is acknowledged
        with plain.link_down(CLIENT):
            cut = time.monotonic()
            for number, (_, busy) in enumerate(KINDS):
                if busy:
                    send_into(plain, f"ttun{number}")
            times = {}
            while len(times) < len(KINDS) and time.monotonic() - cut < 45:
                for kind, server in zip(KINDS, servers):
                    if kind not in times and "disconnected" in server.log():
                        times[kind] = time.monotonic() - cut
                time.sleep(0.1)
        print(times)  # pytest -rP shows it
        assert sorted(times) == sorted(KINDS), times
        assert min(times.values()) > 15, f"no outage of a few seconds ends a session: {times}"
        for (proto, _), server in zip(KINDS, servers):
            ours = "peer timed out: last received" in server.log()
            assert ours == (proto == "mptcp"), server.log()
    finally:
        for sock in socks:
            sock.close()
    for number in range(len(KINDS)):
        client = plain.client(to=f"{SERVER_ADDRESS}:{20300 + number}")
        client.says("authenticated")
        client.stop()


@pytest.mark.parametrize("kernel_does_it", [False, True])
def test_a_peer_that_no_path_has_heard_of_for_35_seconds_is_gone(
    kernel_does_it: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checked every 5 s; TCP, and a kernel without MPTCP_TCPINFO, end nothing."""
    told: list[int | None] = [0]
    monkeypatch.setattr(mptcp, "silence", lambda _: told[0])
    monkeypatch.setattr(mptcp, "_kernel_does_it", lambda _: kernel_does_it)
    with socket.socket() as sock:
        watch, now = mptcp.Watch(sock), time.monotonic()

        def look(after: float, silent: int | None) -> str | None:
            told[0] = silent
            return watch.look(now + after)

        assert look(4, 35_000) is None, "not asked yet"
        for after, silent in ((10, 34_999), (20, None), (30, 0)):
            assert look(after, silent) is None
        assert look(34, 35_000) is None, "it was asked 4 s ago"
        gone = None if kernel_does_it else f"{GONE} 35 s ago"
        assert look(40, 35_000) == gone
        told[0] = None
        watch = mptcp.Watch(sock)
        assert look(50, 35_000) is None, "a kernel that does not tell at first"


@pytest.mark.slow
@needs_mptcp
def test_an_idle_mptcp_session_goes_on_and_takes_no_time(plain: Bench) -> None:
    """Keepalive answers for a silent peer, and the check is cheap."""
    ends = plain.tunnel("-mptcp", *V1)
    plain.answers()
    before = [cpu(end.process.pid) for end in ends]
    time.sleep(40)
    used = [cpu(end.process.pid) - start for end, start in zip(ends, before)]
    assert plain.ping(CLIENT, TUNNEL4[SERVER], 3) == 3
    for end in ends:
        assert "disconnected" not in end.log()
    print(f"{max(used):.2f} s")
    assert max(used) <= 0.3, "0.03 s in 30 s are usual at most"


@needs_mptcp
def test_the_kernel_tells_how_long_a_path_has_been_silent(plain: Bench) -> None:
    with plain.on(SERVER, lambda: tcp.listen(Address("", 9999), None)) as listener:
        with connect(plain, 9999, True) as sock:
            listener.setblocking(True)
            with listener.accept()[0] as accepted:
                sock.send(b"1")
                assert accepted.recv(1) == b"1"
                for end in (sock, accepted):
                    tcp.tune(end)
                    assert mptcp.silence(end) < 1000
                time.sleep(0.5)
                assert mptcp.silence(accepted) >= 400
                sock.send(b"1")
                assert accepted.recv(1) == b"1"
                eventually(lambda: mptcp.silence(accepted) < 400, "it was heard again")
        with connect(plain, 9999, False) as sock:
            assert mptcp.silence(sock) is None
