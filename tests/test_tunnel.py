"""End to end: two ttun ends, real TUN devices, two hosts."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import re
import signal
import socket
import subprocess
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tunnel import CLIENT, OTHER, SERVER, TUNNEL4, TUNNEL6, Bench, End, eventually, every_way

from ttun.lab import netns

pytestmark = pytest.mark.hosts

MIB = 1 << 20
TICK = 1 / os.sysconf("SC_CLK_TCK")  # what CPU time is counted in
PORT = "5001"
PUMP_THREADS = {"ttun-up-seal", "ttun-up-send", "ttun-down-recv", "ttun-down-open"}


def much(bench: Bench, most: int = 1024) -> int:
    """Bytes: so many MiB with the default options, a quarter where a tunnel is slower."""
    return most * MIB // (1 if bench.wire == "x1" and not bench.options else 4)


def in_one_session(*ends: End) -> bool:
    """Whether no session ended: a transfer would survive that, a little later."""
    return not any("disconnected" in end.log() for end in ends)


@every_way
@pytest.mark.parametrize("cipher", ["chacha20-poly1305", "aes-256-gcm"])
def test_both_families_are_carried_both_ways(bench: Bench, cipher: str) -> None:
    server, client = bench.tunnel("-m", cipher)
    for host in (SERVER, CLIENT):
        for addresses in (TUNNEL4, TUNNEL6):
            assert bench.ping(host, addresses[OTHER[host]], 20) == 20
    assert f"protocol {bench.wire}, {cipher}" in server.log()
    assert f"protocol {bench.wire}, {cipher}" in client.log()
    assert client.stop() == server.stop() == 0
    for end in (server, client):
        assert "disconnected" in end.log()
        assert re.search(r"uplink \d+ packets, .*; downlink \d+ packets", end.log())
        assert "secret" not in end.log()


@every_way
def test_much_each_way_at_once_arrives_whole(bench: Bench) -> None:
    ends = bench.tunnel()
    bench.serve_traffic(SERVER, TUNNEL4[SERVER])
    with ThreadPoolExecutor() as pool:
        transfers = [
            pool.submit(bench.traffic, CLIENT, action, TUNNEL4[SERVER], PORT, str(much(bench)))
            for action in ("send", "receive")
        ]
        assert all(transfer.result()["whole"] for transfer in transfers)
    assert in_one_session(*ends)


@every_way
def test_mixed_traffic_arrives_whole(bench: Bench) -> None:
    """Many flows of many sizes both ways, both families, and datagrams between them.

    TTUN_TEST_MIB: how much in all; more than the usual for a long run by hand.
    """
    total = much(bench, int(os.environ.get("TTUN_TEST_MIB", "256")))
    ends = bench.tunnel()
    for addresses in (TUNNEL4, TUNNEL6):
        bench.serve_traffic(SERVER, addresses[SERVER])
    bulk = total // 8
    small = [1, 2, 3, 100, 1219, 1220, 1221, 1240, 65535, 65536, 1 << 20]
    flows = [
        (action, addresses[SERVER], size)
        for addresses in (TUNNEL4, TUNNEL6)
        for action in ("send", "receive")
        for size in (*small, bulk, bulk)
    ]
    done = threading.Event()
    with ThreadPoolExecutor(12) as pool:
        datagrams = [
            pool.submit(bench.on, CLIENT, lambda a=a: exchange_datagrams(bench, a, done))
            for a in (TUNNEL4, TUNNEL6)
        ]
        transfers = [
            pool.submit(bench.traffic, CLIENT, action, address, PORT, str(size), timeout=900)
            for action, address, size in flows
        ]
        whole = [transfer.result()["whole"] for transfer in transfers]
        done.set()
        assert all(whole)
        for exchange in datagrams:
            assert exchange.result() > 100, "datagrams came through all the while"
    assert in_one_session(*ends)


def exchange_datagrams(bench: Bench, addresses: dict[str, str], done: threading.Event) -> int:
    """Send datagrams of all sizes until done; return how many arrived, all intact."""
    family = socket.AF_INET6 if ":" in addresses[SERVER] else socket.AF_INET
    receiver = bench.on(SERVER, lambda: socket.socket(family, socket.SOCK_DGRAM))
    arrived = 0
    with receiver, socket.socket(family, socket.SOCK_DGRAM) as sender:
        receiver.bind((addresses[SERVER], 7000))
        receiver.setblocking(False)
        number = 0
        while not done.is_set():
            for _ in range(20):  # bursts of one size can be coalesced
                size = random.Random(number // 7).randrange(1, 3000)
                body = random.Random(number).randbytes(size)
                checked = zlib.crc32(body).to_bytes(4, "big") + body
                sender.sendto(checked, (addresses[SERVER], 7000))
                number += 1
            time.sleep(0.005)
            with contextlib.suppress(BlockingIOError):
                while True:
                    data = receiver.recv(65536)
                    assert zlib.crc32(data[4:]).to_bytes(4, "big") == data[:4]
                    arrived += 1
    return arrived


def test_a_thousand_connections_at_once(bench: Bench) -> None:
    bench.tunnel()
    bench.serve_traffic(SERVER, TUNNEL4[SERVER])

    def connect() -> list[socket.socket]:
        return [socket.create_connection((TUNNEL4[SERVER], int(PORT)), 30) for _ in range(1000)]

    connections = bench.on(CLIENT, connect)
    payload = os.urandom(2000)
    for sock in connections:  # all of them are open before the first one says anything
        sock.sendall(bytes([0]) + len(payload).to_bytes(8, "big") + payload)
    for sock in connections:
        sock.sendall(hashlib.sha256(payload).digest())
    for sock in connections:
        assert sock.recv(1) == b"1"
        sock.close()


@pytest.mark.parametrize("killed", [SERVER, CLIENT])
def test_the_tunnel_returns_after_kill_9(bench: Bench, killed: str) -> None:
    ends = dict(zip((SERVER, CLIENT), bench.tunnel()))
    survivor = ends[OTHER[killed]]
    bench.answers()
    ends[killed].kill()
    survivor.says("disconnected")
    eventually(lambda: bench.devices(killed) == [], "the dead end's device is gone", 5)
    if killed == SERVER:
        bench.server()
    else:
        bench.client()
    survivor.says("authenticated", times=2)
    bench.answers()
    assert bench.devices(OTHER[killed]) == ["ttun0"], "the device outlives the session"


def test_a_second_client_waits_until_the_first_leaves(bench: Bench) -> None:
    _, first = bench.tunnel()
    bench.answers()
    second = bench.client()
    second.says("connected over")
    time.sleep(1)
    assert "authenticated" not in second.log()
    assert bench.ping(CLIENT, TUNNEL4[SERVER], 5) == 5, "the first one notices nothing"
    first.stop()
    second.says("authenticated")
    bench.answers(SERVER)


@every_way
@pytest.mark.parametrize("mtu", [576, 1280, 1500, 9000, 65519])
def test_every_mtu_carries_full_packets(bench: Bench, mtu: int) -> None:
    server, client = bench.tunnel("-mtu", str(mtu))
    link = bench.run(CLIENT, "ip", "link", "show", "ttun0")
    assert f"mtu {mtu}" in link
    assert bench.ping(CLIENT, TUNNEL4[SERVER], 3, mtu - 28) == 3
    with pytest.raises(OSError, match="Message too long"):
        bench.ping(CLIENT, TUNNEL4[SERVER], 1, mtu - 28 + 1)
    bench.serve_traffic(SERVER, TUNNEL4[SERVER])
    size = 2 * MIB if mtu < 9000 else 64 * MIB  # large frames: until the slots of a ring are full
    for action in ("send", "receive"):
        assert bench.traffic(CLIENT, action, TUNNEL4[SERVER], PORT, str(size))["whole"]
    assert in_one_session(server, client)
    if mtu < 1280:
        assert "no IPv6 in the tunnel: the MTU is below 1280" in server.log()
    else:
        assert bench.ping(CLIENT, TUNNEL6[SERVER], 3, mtu - 48) == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("host", [SERVER, CLIENT])
@pytest.mark.parametrize("connected", [True, False], ids=["connected", "alone"])
def test_a_signal_ends_it_within_a_second(
    bench: Bench, number: int, host: str, connected: bool
) -> None:
    if connected:
        end = dict(zip((SERVER, CLIENT), bench.tunnel()))[host]
    elif host == SERVER:
        end = bench.server()
    else:
        end = bench.client()
        end.says("cannot connect")
    started = time.monotonic()
    end.process.send_signal(number)
    assert end.ended() == 0
    assert time.monotonic() - started < 3, "0.1 s are usual"
    assert bench.devices(host) == []
    assert "Traceback" not in end.log()


def test_a_client_that_cannot_reach_its_server_ends_within_a_second(bench: Bench) -> None:
    client = bench.client(to="192.0.2.99")  # no host has this address
    client.says("tun ttun0 up")
    time.sleep(0.5)
    started = time.monotonic()
    assert client.stop() == 0
    assert time.monotonic() - started < 3, "0.1 s are usual"


def thread_times(end: End) -> dict[str, float]:
    """CPU seconds of a program's threads, summed by name."""
    times: dict[str, float] = {}
    for task in Path(f"/proc/{end.process.pid}/task").iterdir():
        name = (task / "comm").read_text().strip()
        fields = (task / "stat").read_text().rsplit(")", 1)[1].split()
        used = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        times[name] = times.get(name, 0) + used
    return times


def test_four_pump_threads_carry_everything_and_python_nothing(bench: Bench) -> None:
    ends = bench.tunnel()
    before = [thread_times(end) for end in ends]
    bench.serve_traffic(SERVER, TUNNEL4[SERVER])
    for action in ("send", "receive"):
        assert bench.traffic(CLIENT, action, TUNNEL4[SERVER], PORT, str(much(bench)))["whole"]
    for end, earlier in zip(ends, before):
        times = thread_times(end)
        assert set(times) >= PUMP_THREADS
        used = {name: seconds - earlier.get(name, 0) for name, seconds in times.items()}
        pump = sum(used.pop(name) for name in PUMP_THREADS)
        assert pump > 0.2
        assert sum(used.values()) < 0.05 * pump + 2 * TICK, used


def test_a_signal_to_another_thread_is_no_trouble(bench: Bench) -> None:
    server, _ = bench.tunnel()
    for task in os.listdir(f"/proc/{server.process.pid}/task"):
        os.kill(int(task), signal.SIGWINCH)  # ignored, but it interrupts system calls
    os.kill(server.process.pid, signal.SIGSTOP)
    os.kill(server.process.pid, signal.SIGCONT)
    assert bench.ping(CLIENT, TUNNEL4[SERVER], 5) == 5


@pytest.mark.parametrize("host", [SERVER, CLIENT])
def test_a_removed_device_ends_it_with_a_line(bench: Bench, host: str) -> None:
    end = dict(zip((SERVER, CLIENT), bench.tunnel()))[host]
    bench.run(host, "ip", "link", "delete", "ttun0")
    assert end.ended() == 1
    assert "was ttun0 removed?" in end.log().splitlines()[-1]
    assert "Traceback" not in end.log()


def test_a_device_that_is_down_for_a_while_is_no_end(bench: Bench) -> None:
    server, _ = bench.tunnel()
    bench.answers()
    bench.run(SERVER, "ip", "link", "set", "ttun0", "down")
    assert bench.ping(CLIENT, TUNNEL4[SERVER], 1) == 0
    bench.run(SERVER, "ip", "link", "set", "ttun0", "up")
    bench.answers()
    assert server.log().count("authenticated") == 1


def test_ipv6_and_names_as_the_server_address(bench: Bench) -> None:
    bench.server()
    for to in ("[2001:db8::1]:20203", "[2001:db8::1]"):
        client = bench.client(to=to)
        client.says("authenticated")
        client.stop()


@pytest.mark.parametrize(
    ("server", "client", "expected"),
    [((), ("-mptcp",), "mptcp"), (("-mptcp=false",), ("-mptcp",), "tcp"), (("-mptcp",), (), "tcp")],
)
def test_the_log_says_what_a_connection_really_is(
    bench: Bench, server: tuple[str, ...], client: tuple[str, ...], expected: str
) -> None:
    if not os.path.exists("/proc/sys/net/mptcp"):
        pytest.skip("no Multipath TCP in this kernel")
    ends = bench.server(*server), bench.client(*client)
    bench.answers()
    for end in ends:
        assert f"connected over {expected};" in end.log()


SYSTEM = Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()
BOTH = "( sport = :20203 or dport = :20203 )"


@pytest.mark.parametrize(
    ("by_route", "expected"),
    [((), "reno" if SYSTEM.startswith("bbr") else SYSTEM), (("congctl", SYSTEM), SYSTEM)],
)
def test_a_near_peer_is_not_paced_unless_a_route_says_so(
    plain: Bench, by_route: tuple[str, ...], expected: str
) -> None:
    def change_route(*more: str) -> None:
        for host in (SERVER, CLIENT):
            where = ["192.0.2.0/24", "dev", plain.pair.links[host], "src", netns.IPV4[host]]
            plain.run(host, "ip", "route", "change", *where, *more)

    change_route(*by_route)
    try:
        for end in plain.tunnel():
            shown = plain.run(end.host, "ss", "-tinH", "state", "established", BOTH)
            assert shown.splitlines()[1].split()[0] == expected, shown
    finally:
        change_route()


def test_a_kernel_without_mptcp_gets_a_line_and_plain_tcp(bench: Bench) -> None:
    if not os.path.exists("/proc/sys/net/mptcp"):
        pytest.skip("no Multipath TCP in this kernel")
    for host in (SERVER, CLIENT):
        bench.run(host, "sh", "-c", "echo 0 > /proc/sys/net/mptcp/enabled")
    try:
        for end in bench.tunnel("-mptcp"):
            assert "no Multipath TCP in this kernel" in end.log()
            assert "connected over tcp;" in end.log()
    finally:
        for host in (SERVER, CLIENT):
            bench.run(host, "sh", "-c", "echo 1 > /proc/sys/net/mptcp/enabled")


def test_the_demo_ends_with_a_table_and_leaves_nothing(tmp_path: Path) -> None:
    """Nor does it take anything from where it is started: a proxy, or a module."""
    from tunnel import PROGRAM

    (tmp_path / "json.py").write_text("raise SystemExit('another json')")
    demo = subprocess.Popen(
        [*PROGRAM, "demo", "--size", "16"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        env={**os.environ, "TTUN_PROXY": "http://192.0.2.9:3128"},
    )  # fmt: skip
    out, err = demo.communicate(timeout=100)
    assert demo.returncode == 0, err
    assert "The tunnel works." in out
    assert out.count("  ok  ") == 9
    assert out.count("SHA-256 matches") == 2
    rates = [float(rate) for rate in re.findall(r"one TCP stream, .* ([\d.]+) Gbit/s", out)]
    assert len(rates) == 2
    assert min(rates) > 0.1
    assert "\033" not in out + err, "plain lines in a pipe"
    assert "... throughput, server to client\n" in err
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    assert f"ttun-{demo.pid}-" not in left.stdout
