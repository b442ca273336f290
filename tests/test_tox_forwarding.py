"""End to end: ports forwarded through a Tox network of our own, real toxcore, real node.

All programs are started together and shared: toxnet.py.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import random
import re
import signal
import socket
import stat
import statistics
import termios
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import toxnet
from toxlab import CLIENT, SERVER
from toxnet import (
    ALONE,
    BY_RULE,
    CLOSED,
    CUT,
    ECHO,
    MANUAL,
    NO_RULE,
    PROXY_PORTS,
    REBORN,
    SECRET,
    SOCKS,
    TO_CLOSED,
    TO_ECHO,
    TO_MANUAL,
    TO_NAME,
    Net,
    exchange,
    is_closed,
    receive,
    reset,
    socks,
)  # fmt: skip
from tunnel import PROGRAM, eventually

pytestmark = [pytest.mark.hosts, pytest.mark.tox, pytest.mark.slow, pytest.mark.together]


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Net]:
    with toxnet.start(tmp_path_factory.mktemp("tox")) as made:
        yield made


@pytest.fixture
def manual(net: Net) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection, both of whose ends are the test's: the client's and the target's."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(net.lab.listen(SERVER, MANUAL))
        near = stack.enter_context(net.lab.connect(TO_MANUAL))
        listener.settimeout(30)
        far = stack.enter_context(listener.accept()[0])
        near.settimeout(30)
        far.settimeout(30)
        yield near, far


@pytest.mark.parametrize("size", [1, 1365, 1366, 100_000, 3 << 20])
def test_bytes_of_every_amount_arrive_whole(net: Net, size: int) -> None:
    data = random.Random(size).randbytes(size)
    with net.lab.connect(TO_ECHO) as sock, ThreadPoolExecutor(1) as pool:
        sock.settimeout(60)
        sending = pool.submit(sock.sendall, data)
        echoed = receive(sock, size)
        sending.result()
    assert hashlib.sha256(echoed).digest() == hashlib.sha256(data).digest()


def test_two_hundred_connections_at_once_are_all_answered(net: Net) -> None:
    before = net.client.descriptors(), net.server.descriptors()
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(net.lab.connect(TO_ECHO)) for _ in range(200)]
        for number, sock in enumerate(socks):
            sock.settimeout(60)
            sock.sendall(b"number %03d" % number)
        for number, sock in enumerate(socks):
            assert receive(sock, 10) == b"number %03d" % number
    late = 4  # programs of the net with -W find the server meanwhile, and stay connected
    for program, count in zip((net.client, net.server), before):
        eventually(lambda p=program, c=count: p.descriptors() <= c + late, "descriptors are closed")


def test_an_idle_round_trip_takes_a_moment(net: Net) -> None:
    """0.5 ms is usual; by the clock instead of by toxcore's sockets it were 25."""
    with net.lab.connect(TO_ECHO) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        times = []
        for _ in range(50):
            time.sleep(0.02)
            started = time.monotonic()
            assert exchange(sock, b"x") == b"x"
            times.append(time.monotonic() - started)
    assert statistics.median(times) < 0.015


def test_a_refused_target_closes_the_local_connection_at_once(net: Net) -> None:
    started = time.monotonic()
    with net.lab.connect(TO_CLOSED) as sock:
        assert is_closed(sock)
    assert time.monotonic() - started < 10
    net.client.says(f"127.0.0.1:{CLOSED}: the target refused the connection")


def test_a_name_that_is_none_closes_it_too(net: Net) -> None:
    with net.lab.connect(TO_NAME) as sock:
        assert is_closed(sock, 40)
    net.client.says("no-such-name.invalid:80: the target's name cannot be resolved")


def test_half_closed_connections_finish(manual: tuple[socket.socket, socket.socket]) -> None:
    near, far = manual
    near.sendall(b"request")
    near.shutdown(socket.SHUT_WR)
    assert receive(far, 100) == b"request"
    time.sleep(0.3)  # the half that is closed must not take the other along
    far.sendall(b"answer")
    assert receive(near, 6) == b"answer"
    far.shutdown(socket.SHUT_WR)
    assert receive(near, 1) == b""


def test_the_target_may_end_its_half_first(manual: tuple[socket.socket, socket.socket]) -> None:
    near, far = manual
    far.sendall(b"greeting")
    far.shutdown(socket.SHUT_WR)
    assert receive(near, 100) == b"greeting"
    near.sendall(b"last words")
    near.shutdown(socket.SHUT_WR)
    assert receive(far, 100) == b"last words"


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_reset_shows_at_the_other_end(
    manual: tuple[socket.socket, socket.socket], way: str
) -> None:
    one, other = manual if way == "up" else manual[::-1]
    one.sendall(b"x")
    assert other.recv(1) == b"x"  # a target that resets before that is one that refuses
    reset(one)
    with pytest.raises(ConnectionResetError):
        other.recv(1)


def test_an_answer_arrives_though_the_target_did_not_read_all(
    manual: tuple[socket.socket, socket.socket],
) -> None:
    """As a web server refuses an upload: the kernel resets such a connection, behind the answer."""
    near, far = manual
    near.sendall(bytes(1000))
    assert far.recv(1, socket.MSG_PEEK) == b"\0"
    size = 150_000  # more than toxcore takes at once: the rest waits in the server's socket
    far.sendall(bytes(size))
    eventually(lambda: fcntl.ioctl(far, termios.TIOCOUTQ, bytes(4)) == bytes(4), "it is there")
    far.close()
    received = 0
    with contextlib.suppress(ConnectionResetError):
        while data := near.recv(1 << 16):
            received += len(data)
    assert received == size


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_slow_reader_holds_its_own_stream_and_no_other(
    net: Net, manual: tuple[socket.socket, socket.socket], way: str
) -> None:
    sender, reader = manual if way == "up" else manual[::-1]
    before = net.client.usage()[2] + net.server.usage()[2]
    size, chunk = 48 << 20, bytes(range(256)) * 256
    sent = 0
    sender.settimeout(2)
    with contextlib.suppress(TimeoutError):
        while sent < size:
            sent += sender.send(chunk[sent % len(chunk) :])
    assert sent < 32 << 20, "the sender has to wait"
    with net.lab.connect(TO_ECHO) as sock:
        assert exchange(sock, b"meanwhile") == b"meanwhile"
    assert net.client.usage()[2] + net.server.usage()[2] - before < 24 << 10  # KiB
    sender.shutdown(socket.SHUT_WR)
    received = 0
    while data := reader.recv(1 << 16):
        offset = received % 256
        assert data == (chunk + chunk[:256])[offset : offset + len(data)]
        received += len(data)
    assert received == sent


@pytest.mark.parametrize("address", [b"\1\x7f\0\0\1", b"\3\x09localhost", b"\3\x09127.0.0.1"])
def test_socks5_goes_where_it_is_asked_to(net: Net, address: bytes) -> None:
    sock, answer = socks(net, b"\5\1\0" + address + ECHO.to_bytes(2, "big"))
    with sock:
        assert answer == b"\5\0\0\1" + bytes(6)
        assert exchange(sock, b"through the proxy") == b"through the proxy"


def test_socks5_reaches_ipv6_targets(net: Net) -> None:
    listener = net.lab.on(
        SERVER, lambda: socket.create_server(("::1", 7006), family=socket.AF_INET6)
    )
    with listener:
        sock, answer = socks(net, b"\5\1\0\4" + bytes(15) + b"\1" + (7006).to_bytes(2, "big"))
        with sock, listener.accept()[0] as far:
            assert answer[1] == 0
            assert exchange(sock, b"") == b""
            far.sendall(b"six")
            assert receive(sock, 3) == b"six"


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (b"\5\1\0\1\x7f\0\0\1" + CLOSED.to_bytes(2, "big"), 5),
        (b"\5\1\0\3\x07invalid\0\x50", 4),
        (b"\5\2\0\1\x7f\0\0\1\0\x50", 7),
        (b"\5\1\0\x09\x7f\0\0\1\0\x50", 8),
    ],
)
def test_socks5_says_why_not(net: Net, request_: bytes, code: int) -> None:
    sock, answer = socks(net, request_)
    with sock:
        assert answer[:2] == bytes([5, code])
        assert is_closed(sock)


def test_socks5_takes_no_password_and_no_other_version(net: Net) -> None:
    with net.lab.connect(SOCKS) as sock:
        sock.settimeout(20)
        sock.sendall(b"\5\1\2")
        assert receive(sock, 10) == b"\5\xff"
    with net.lab.connect(SOCKS) as sock:
        sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert is_closed(sock)


def test_stdin_and_stdout_for_proxy_commands(net: Net) -> None:
    data = random.Random(1).randbytes(300_000)
    process = net.pipe.process
    out, _ = process.communicate(data, timeout=60)
    assert len(out) == len(data)
    wrong = [i for i, (ours, theirs) in enumerate(zip(out, data)) if ours != theirs]
    assert not wrong, f"{len(wrong)} wrong bytes, from {wrong[0]} to {wrong[-1]}"
    assert process.returncode == 0
    assert net.pipe.log() == "", "an ssh that uses it sees nothing but its bytes"


def test_a_reset_is_an_error_of_stdin_and_stdout(net: Net) -> None:
    net.to_cut.settimeout(60)
    far = net.to_cut.accept()[0]
    far.sendall(b"half of an ans")
    out = net.cut.process.stdout
    assert out is not None
    assert out.read(14) == b"half of an ans"
    reset(far)
    assert net.cut.process.wait(20) == 1
    assert out.read() == b""
    assert net.cut.log().count("\n") == 1
    net.cut.says(f"127.0.0.1:{CUT}: the connection was reset")


def test_a_full_disk_is_an_error_of_stdout(net: Net) -> None:
    net.full.process.communicate(b"what cannot be written", timeout=60)
    assert net.full.process.returncode == 1
    assert net.full.log().count("\n") == 1
    net.full.says("cannot write the output: No space left on device")


def test_an_input_that_cannot_be_read_is_no_end_of_it(net: Net) -> None:
    assert net.unreadable.process.wait(60) == 1
    assert net.unreadable.log().count("\n") == 1
    net.unreadable.says("cannot read the input: Bad file descriptor")


def test_ping_prints_the_time_and_exits(net: Net) -> None:
    assert net.pinger.process.wait(60) == 0
    assert re.search(r"^pong in \d+\.\d ms$", net.pinger.log(), re.MULTILINE)


@pytest.mark.parametrize("kind", PROXY_PORTS)
def test_through_a_proxy(net: Net, kind: str) -> None:
    number = list(PROXY_PORTS).index(kind)
    proxied = net.proxied[number]
    assert proxied.process.wait(60) == 0, proxied.log()
    assert "pong in" in proxied.log()
    assert "on the Tox network over a TCP relay" in proxied.log()
    assert "over UDP" not in proxied.log()
    if kind == "http":
        assert "CONNECT " in net.proxies[number].log()


def test_without_the_secret_nobody_gets_in(net: Net) -> None:
    net.server.says("ignored: wrong secret")
    assert net.uninvited.process.poll() in (None, 1), "it gives up after two minutes"
    assert "connected over" not in net.uninvited.log()
    assert "pong" not in net.uninvited.log()
    for program in (net.server, net.client, net.uninvited):
        assert SECRET not in program.log()
        assert "wrong\n" not in program.log()


def test_rules_decide_about_targets(net: Net) -> None:
    with net.lab.connect(BY_RULE) as sock:
        assert exchange(sock, b"allowed") == b"allowed"
    with net.lab.connect(NO_RULE) as sock:
        assert is_closed(sock)
    net.allowed.says("the server's rules do not allow this target")


def test_who_is_not_listed_is_not_let_in(net: Net) -> None:
    net.ruled.says("its Tox ID is not allowed by -i")
    assert "connected over" not in net.unlisted.log()


def test_the_identity_is_kept_for_its_owner_alone(net: Net) -> None:
    for name in ("server", "member", "ruled"):
        save = net.identities / name / "tox_save"
        assert stat.S_IMODE(save.stat().st_mode) == 0o600
    assert os.listdir(net.identities / "server") == ["tox_save"]


def test_a_client_finds_a_server_that_was_started_again(net: Net) -> None:
    net.reborn_client.says("disconnected", seconds=60)
    net.reborn_client.says("connected over", times=2, seconds=90)
    with net.lab.connect(REBORN) as sock:
        assert exchange(sock, b"second") == b"second"
    ids = [re.search("Using Tox ID: (.*)", program.log()) for program in net.reborn]
    assert ids[0] is not None
    assert ids[1] is not None
    assert ids[0][1] == ids[1][1]


def test_in_the_background(net: Net, tmp_path: Path) -> None:
    pid_file, id_file = tmp_path / "pid", tmp_path / "id"
    started = net.lab.run(
        SERVER, *PROGRAM, "tox", "-z", *ALONE, "-b", str(net.lab.nodes), "-F", str(pid_file),
        "-I", str(id_file), "-C", str(tmp_path), "-s", "x", timeout=20,
    )  # fmt: skip
    assert started == ""
    eventually(lambda: pid_file.exists() and pid_file.read_text().strip(), "its process id")
    pid = int(pid_file.read_text())
    try:
        eventually(lambda: id_file.exists() and len(id_file.read_text()) == 77, "its Tox ID")
        assert os.getsid(pid) != os.getsid(0)
        assert os.readlink(f"/proc/{pid}/fd/0") == os.devnull
    finally:
        os.kill(pid, signal.SIGTERM)
    eventually(lambda: not Path(f"/proc/{pid}").exists(), "it ends")


def test_another_user_has_the_rights_of_that_user(net: Net, tmp_path: Path) -> None:
    if os.geteuid() != 0 or Path("/proc/self/uid_map").read_text().split()[2] == "1":
        pytest.skip("this needs real root")
    server, _ = net.lab.serve(*ALONE, "-U", "nobody", "-s", "x", log=tmp_path / "log")
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    uids = re.search(r"Uid:\s+(\d+)\s+(\d+)\s+(\d+)", status)
    assert uids is not None
    assert 0 not in map(int, uids.groups())
    for kind in ("CapEff", "CapBnd"):
        assert re.search(rf"{kind}:\s+0+$", status, re.MULTILINE)
    server.stop()


def test_a_port_that_is_taken_is_one_line(net: Net) -> None:
    second = net.lab.tox(CLIENT, *ALONE, "-i", net.server_id, "-L", f"{TO_ECHO}:h:1")
    assert second.process.wait(20) == 1
    assert "port in use" in second.log().splitlines()[-1]
    assert "Traceback" not in second.log()


def test_it_stops_when_told_and_the_other_side_knows_soon(net: Net) -> None:
    """Last: it ends what the tests above use."""
    with net.lab.connect(TO_ECHO) as sock:
        assert exchange(sock, b"still there") == b"still there"
        assert net.server.stop() == 0
        assert is_closed(sock, 40)
    net.client.says("disconnected", seconds=40)
    assert net.client.stop() == 0
    for program in (net.client, net.server):
        assert "Traceback" not in program.log()
