"""Protocol x1 end to end with real TUN devices: a vanished peer, rekeying under load, and a hostile
peer that has the key."""

from __future__ import annotations

import random
import re
import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from packets import ACK, PSH, TIMESTAMPS, Packet
from peer import MAGIC, PING, PONG, X1Peer, echo_request, is_reply
from strangers import connect
from tunnel import CLIENT, SERVER, TUNNEL4, Bench

from ttun.lab import netns

pytestmark = [pytest.mark.hosts, pytest.mark.parametrize("bench", ["x1"], indirect=True)]

PORT = "5001"


def test_a_cable_that_is_cut_is_noticed_on_both_ends(bench: Bench) -> None:
    """No FIN arrives; one end has data in flight, the other does not."""
    server, client = bench.tunnel()
    bench.serve_traffic(SERVER, TUNNEL4[SERVER])
    flood = bench.pair.start(
        CLIENT,
        netns.python("ttun.lab.traffic", "flood", TUNNEL4[SERVER], PORT, "1", "60"),
        environment=netns.environment(),
    )
    try:
        time.sleep(0.5)
        with bench.link_down(SERVER):
            started = time.monotonic()
            for end in (server, client):
                end.says("peer timed out: last received 1", seconds=40)  # 15 s, or a bit more
            assert time.monotonic() - started >= 14
            assert "over 15 s" not in server.log()
        server.says("authenticated", times=2)
        bench.answers()
    finally:
        flood.kill()
        flood.wait()


def test_fresh_keys_under_load_lose_no_byte(bench: Bench) -> None:
    server = bench.server()
    bench.client("--rekey", "0.05").says("authenticated")
    bench.serve_traffic(SERVER, TUNNEL4[SERVER])
    with ThreadPoolExecutor() as pool:
        transfers = [
            pool.submit(bench.traffic, CLIENT, action, TUNNEL4[SERVER], PORT, str(1 << 29))
            for action in ("send", "receive")
        ]
        assert all(transfer.result()["whole"] for transfer in transfers)
    assert server.log().count("authenticated") == 1


@pytest.mark.parametrize("cipher", ["chacha20-poly1305", "aes-256-gcm", "aegis-256"])
def test_an_independent_client_is_answered(bench: Bench, cipher: str) -> None:
    server = bench.server()
    with connect(bench) as sock:
        peer = X1Peer(sock, ciphers=(cipher,))
        peer.shake(0)
        assert f"protocol x1, {cipher}, forward secrecy" in server.says("authenticated")
        for body in (b"", b"x" * 1252, b"y" * 30_000):
            request = echo_request(TUNNEL4[CLIENT], TUNNEL4[SERVER], body)
            peer.send(request)
            # The server's kernel may fragment its answer to the last one.
            if len(request) <= 1280:
                while not is_reply(peer.receive_packet(), request):
                    pass
        peer.send(PING + b"12345678")
        assert peer.receive_control(PONG) == b"12345678"


def test_what_a_hostile_peer_makes_up_does_no_harm(bench: Bench) -> None:
    """Offloaded packets of every kind from a peer with the key are delivered or dropped."""
    server = bench.server()
    dice = random.Random(1)
    with connect(bench) as sock:
        peer = X1Peer(sock)
        peer.shake(0)
        for _ in range(3000):
            packet = bytearray(
                Packet(
                    v6=dice.random() < 0.5,
                    udp=dice.random() < 0.5,
                    flags=dice.choice([ACK, ACK | PSH, dice.randrange(256)]),
                    options=b"" if dice.random() < 0.5 else TIMESTAMPS,
                    payload=bytes(dice.choice([0, 1, 9, 100, 3000, 60000])),
                    source=2,
                ).partial()
            )
            for _ in range(dice.choice([0, 0, 1, 2, 5])):
                packet[dice.randrange(min(len(packet), 60))] = dice.randrange(256)
            gso_size = dice.choice([0, 7, 8, 9, 50, 1000, dice.randrange(65536)])
            peer.send(b"\x01" + struct.pack(">H", gso_size) + packet)
            if dice.random() < 0.1:
                first = dice.choice([0, 1, 6, 0x33, 0xFF])
                peer.send(bytes([first]) + packet[: dice.randrange(99)])
        request = echo_request(TUNNEL4[CLIENT], TUNNEL4[SERVER], b"still there?")
        peer.send(request)
        while not is_reply(peer.receive_packet(), request):
            pass
    line = server.says("dropped: malformed offload packet")
    found = re.search(r"(\d+) dropped: malformed offload packet", line)
    assert found and int(found[1]) > 100


def test_a_peer_that_stops_in_the_middle_of_each_step_keeps_nobody_out(bench: Bench) -> None:
    server = bench.server()
    stopped: list[socket.socket] = []
    steps = [0, 1, 15, 16, 17, 18, 30, 41, 42, 43, 44, 60, 103]
    for size in steps:
        sock = connect(bench)
        stopped.append(sock)
        peer = X1Peer(sock)
        if size <= 16:
            sock.sendall(peer.marked(0)[:size])
            continue
        peer.nonces(0)
        hello = peer.sending.seal(MAGIC) + peer.sending.seal(peer.offer())
        assert len(hello) == 26 + 62
        sock.sendall(hello[: size - 16])
    client = bench.client()
    client.says("tun ttun0 up")
    client.says("authenticated", seconds=5)
    bench.answers()
    for sock in stopped:
        sock.settimeout(15)
        while sock.recv(100):
            pass
        sock.close()
    assert "too many" not in server.log(), "nobody was pushed out"
