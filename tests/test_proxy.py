"""A tunnel through a proxy: real ones, and some that misbehave."""

from __future__ import annotations

import os
import socket
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import chain
import pytest
from chain import ADDRESS, LOGIN, NAME, NEAR, NEAR6, PASSWORD, USER, Chain, needs, says, scripted
from machine import IS_NOBODY_HERE
from tunnel import CLIENT, SERVER, TUNNEL4, Bench, End, bench, eventually

from ttun import proxy
from ttun.lab import netns

pytestmark = pytest.mark.hosts

BAD = f"http://{LOGIN}@{NEAR}:3128"
BAD_SOCKS = f"socks5://{LOGIN}@{NEAR}:3128"
OK = b"HTTP/1.1 200 Fine\r\n"
others = pytest.mark.skipif(not IS_NOBODY_HERE, reason="no other user in this user namespace")
tinyproxy, microsocks = needs("tinyproxy", "tinyproxy"), needs("microsocks", "microsocks")


@pytest.fixture(scope="module")
def hosts() -> Iterator[Chain]:
    with Chain() as made:
        yield made


@pytest.fixture(params=["x1", "v1"])
def both(request: pytest.FixtureRequest, hosts: Chain, tmp_path: Path) -> Iterator[Bench]:
    """Two hosts between which there is a third one, and no route."""
    yield from bench(hosts, tmp_path, request.param, [], forks=False)  # type: ignore[arg-type]


@pytest.fixture
def far(hosts: Chain, tmp_path: Path) -> Iterator[Bench]:
    yield from bench(hosts, tmp_path, "x1", [], forks=False)  # type: ignore[arg-type]


def show(far: Bench) -> str:
    return far.run(CLIENT, *netns.python("ttun", "show"))


def is_nowhere(secret: str, end: End, *texts: str) -> bool:
    """Neither in a log or a status, nor where others see the arguments of a process."""
    lines = [path.read_bytes() for path in Path(f"/proc/{end.process.pid}").glob("**/cmdline")]
    assert lines
    return not any(secret in text for text in [end.log(), *texts, *map(repr, lines)])


REAL = {
    "tinyproxy": f"http://{NEAR}:8888",
    "tinyproxy with a password": f"http://{LOGIN}@{NEAR}:8888",
    "tinyproxy over IPv6": f"http://[{NEAR6}]:8888/",
    "microsocks": f"socks5://{NEAR}:1080",
    "microsocks with a password": f"socks5h://{LOGIN}@[{NEAR6}]:1080",
    "dante": f"socks5://{NEAR}:1080",
}


def start(far: Bench, tmp_path: Path, which: str) -> chain.Program:
    is_secret = "password" in which
    if "tinyproxy" in which:
        return chain.tinyproxy(far, tmp_path, *[f"BasicAuth {USER} {PASSWORD}"] * is_secret)
    if "microsocks" in which:
        return chain.microsocks(far, tmp_path, *["-u", USER, "-P", PASSWORD] * is_secret)
    return chain.dante(far, tmp_path)


@pytest.mark.parametrize(
    "which",
    [
        pytest.param("tinyproxy", marks=tinyproxy),
        pytest.param("tinyproxy with a password", marks=tinyproxy),
        pytest.param("tinyproxy over IPv6", marks=tinyproxy),
        pytest.param("microsocks", marks=microsocks),
        pytest.param("microsocks with a password", marks=microsocks),
        pytest.param("dante", marks=[needs("danted", "dante-server"), others]),
    ],
)
def test_a_real_proxy_that_alone_knows_the_name_carries_a_tunnel(
    both: Bench, tmp_path: Path, which: str
) -> None:
    start(both, tmp_path, which)
    server = both.server()
    client = both.client("--proxy", REAL[which], to=NAME)
    shown = f"through proxy {REAL[which].rpartition('@')[2].rpartition('//')[2].rstrip('/')}"
    client.says(f"peer {NAME}:20203 connected over tcp {shown}; handshaking")
    client.says(f"peer {NAME}:20203 authenticated: protocol {both.wire}")
    server.says("authenticated")
    both.answers()
    for host in (SERVER, CLIENT):
        both.serve_traffic(host, TUNNEL4[host])
    for action in ("send", "receive"):
        result = both.traffic(CLIENT, action, TUNNEL4[SERVER], "5001", str(8 << 20))
        assert result["whole"]
    status = client.status()
    assert (status["peer"], status["transport"]) == (f"{NAME}:20203", f"tcp {shown}")
    assert status["congestion_control"] == server.status()["congestion_control"], "both are near"
    assert f"peer: {NAME}:20203 over tcp {shown}" in show(both)
    # The options that tcp.tune() sets.
    port = REAL[which].rpartition(":")[2][:4]
    eventually(
        lambda: "timer:(keepalive" in both.run(CLIENT, "ss", "-Htnoe", "dport", "=", port),
        "keepalive is set: the timer that shows once nothing is under way",
    )
    for secret in (PASSWORD, LOGIN):
        assert is_nowhere(secret, client, repr(status), show(both))


@tinyproxy
def test_a_client_is_back_soon_after_its_proxy_died(far: Bench, tmp_path: Path) -> None:
    first = chain.tinyproxy(far, tmp_path)
    far.server("--takeover")
    client = far.client("--proxy", f"http://{NEAR}:8888", to=NAME)
    client.says("authenticated")
    first.kill()
    client.says("disconnected after")
    client.says(f"cannot connect to {NAME}:20203: through proxy {NEAR}:8888: {NEAR}:8888: Connec")
    chain.tinyproxy(far, tmp_path)
    client.says("authenticated", 2)
    far.answers()


MISBEHAVING = {
    "garbage": (BAD, says(b"\0\xff" * 500), "not an HTTP proxy"),
    "a mail server": (BAD, says(b"220 mail ESMTP\r\n"), "not an HTTP proxy"),
    "64 KiB of headers": (BAD, says(OK + b"X: y\r\n" * 11_000), "its answer exceeds 64 KiB"),
    "one header of 64 KiB": (BAD, says(OK + b"X: " + b"y" * 65536), "its answer exceeds 64 KiB"),
    "headers without end": (BAD, says(OK * 9, close=True), "connection closed during"),
    "403": (BAD, says(b"HTTP/1.1 403 No\x1b[2J\r\n\r\n"), r"refused: HTTP/1.1 403 No\x1b[2J"),
    "407": (BAD, says(b"HTTP/1.1 407 Who?\r\n\r\n"), "407 Who? (wrong user or password?)"),
    "its request": (BAD, lambda sock: sock.sendall(sock.recv(9999)), "not an HTTP proxy"),
    "the end at once": (BAD, lambda sock: sock.shutdown(socket.SHUT_WR), "connection closed"),
    "the end after the request": (BAD, says(b"", close=True), "connection closed during"),
    "socks garbage": (BAD_SOCKS, says(b"HTTP/1.1 400 Bad Request\r\n"), "not a SOCKS5 proxy"),
    "socks no": (BAD_SOCKS, says(b"\5\xff"), "no acceptable authentication method"),
    "socks wrong": (BAD_SOCKS, says(b"\5\2", b"\1\1"), "wrong user or password?"),
    "socks ruleset": (BAD_SOCKS, says(b"\5\0", b"\5\2\0\1"), "not allowed by ruleset"),
    "socks unreachable": (BAD_SOCKS, says(b"\5\0", b"\5\4\0\1"), "refused: host unreachable"),
    "socks end": (BAD_SOCKS, says(b"\5\0", b"\5\0", close=True), "connection closed during"),
}


@pytest.mark.parametrize("what", MISBEHAVING)
def test_a_proxy_that_misbehaves_is_a_line_and_the_client_goes_on(far: Bench, what: str) -> None:
    url, script, why = MISBEHAVING[what]
    with scripted(far, script) as taken:
        client = far.client("--proxy", url, to=NAME)
        line = f"cannot connect to {NAME}:20203: through proxy {NEAR}:3128: "
        log = client.says(line, 2)
        assert len(taken) >= 2, "it dials again"
        assert all(why in each for each in log.splitlines() if line in each), log
        assert log.count("reconnecting in") >= 1
        assert log.isprintable() or "\x1b" not in log
        assert is_nowhere(PASSWORD, client)
        assert client.stop() == 0


def test_a_proxy_that_resets_is_a_line_and_the_client_goes_on(far: Bench) -> None:
    def reset(sock: socket.socket) -> None:
        sock.recv(9)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()

    with scripted(far, reset):
        client = far.client("--proxy", BAD, to=NAME)
        client.says(f"through proxy {NEAR}:3128: Connection reset by peer", 2)


def test_a_proxy_has_ten_seconds_however_slowly_it_drips(far: Bench) -> None:
    def drip(sock: socket.socket) -> None:
        for byte in OK:
            sock.sendall(bytes([byte]))
            time.sleep(0.7)

    with scripted(far, drip) as taken:
        client = far.client("--proxy", BAD, to=NAME)
        eventually(lambda: taken, "it connects")
        began = time.monotonic()
        client.says(f"through proxy {NEAR}:3128: no answer within 10 s")
        assert 8 < time.monotonic() - began < 15
        assert client.stop() == 0


def test_a_client_that_waits_for_a_proxy_stops_at_once(far: Bench) -> None:
    with scripted(far, lambda sock: sock.recv(1) and time.sleep(20)) as taken:
        client = far.client("--proxy", BAD, to=NAME)
        eventually(lambda: taken, "it connects")
        client.status()
        began = time.monotonic()
        assert client.stop() == 0
        assert time.monotonic() - began < 4


def test_a_late_answer_and_what_comes_with_it_are_taken(far: Bench) -> None:
    """The tunnel's first bytes come in one piece with the end of the proxy's header."""

    def late(sock: socket.socket) -> None:
        sock.recv(9999)
        server = far.on(chain.PROXY, lambda: socket.create_connection((ADDRESS[SERVER], 20203)))
        with server:
            time.sleep(2)
            answer = OK + b"X: y\r\n" * 100 + b"\r\n"
            sock.sendall(answer[:-1])
            # Nothing of the handshake is sent before the header's end; the client speaks first.
            sock.sendall(answer[-1:])
            chain.relay(sock, server)

    far.server()
    with scripted(far, late):
        client = far.client("--proxy", BAD, to=NAME)
        client.says("authenticated")
        far.answers()
        client.stop()


@tinyproxy
def test_the_environment_names_a_proxy_and_hooks_do_not_see_its_password(
    far: Bench, tmp_path: Path
) -> None:
    start(far, tmp_path, "tinyproxy with a password")
    far.server("--takeover")
    with tempfile.TemporaryDirectory(dir="/run") as place:
        os.chmod(place, 0o777)
        said = Path(place) / "said"
        url = REAL["tinyproxy with a password"]
        hook = f'echo "proxy: $TTUN_PROXY, peer: $TTUN_PEER" >> {said}'
        arguments = ("client", "-k", "secret", "-s", NAME, "--up", hook)
        client = far.start(CLIENT, *arguments, environment={proxy.VARIABLE: url})
        client.says(f"through proxy {NEAR}:8888; handshaking")
        client.says("authenticated")
        eventually(said.exists, "the hook runs")
        eventually(said.read_text, "it says something")
        assert said.read_text() == f"proxy: , peer: {NAME}:20203\n"
        environment = Path(f"/proc/{client.process.pid}/environ").read_bytes()
        assert b"TTUN_PROXY=****" in environment
        assert is_nowhere(PASSWORD, client, repr(client.status()), repr(environment))


@pytest.mark.parametrize("given", ["--proxy", proxy.VARIABLE])
def test_a_proxy_that_is_none_is_bad_usage_and_not_shown(far: Bench, given: str) -> None:
    url = f"https://me:{PASSWORD}@gw:1"
    more, environment = ([given, url], {}) if given == "--proxy" else ([], {given: url})
    arguments = ("client", "-k", "secret", "-s", NAME, *more)
    client = far.start(CLIENT, *arguments, environment=environment)
    assert client.ended() == 2
    assert "a proxy is http://[USER:PASSWORD@]HOST:PORT or socks5://" in client.log()
    assert is_one_line(client.log())
    assert PASSWORD not in client.log()


def is_one_line(log: str) -> bool:
    return len([line for line in log.splitlines() if "the key has" not in line]) == 1


def test_a_proxy_is_for_tcp(far: Bench) -> None:
    arguments = ("client", "-k", "secret", "-s", f"tox:{'A' * 76}", "--proxy", "http://gw:1")
    client = far.start(CLIENT, *arguments)
    assert client.ended() == 2
    assert "--bind do not work with tox:" in client.log()


def test_it_is_the_way_to_the_proxy_that_a_route_must_not_carry(far: Bench) -> None:
    with scripted(far, says(b"HTTP/1.1 503 Later\r\n\r\n")) as taken:
        to_server = far.client("--proxy", BAD, "--route", "198.51.100.0/24", to=ADDRESS[SERVER])
        to_server.says("503 Later")
        to_server.stop()
        to_proxy = far.client("--proxy", BAD, "--route", f"{NEAR}/32", to=ADDRESS[SERVER])
        assert to_proxy.ended() == 2
        assert f"to {NEAR}" in to_proxy.log()
        assert len(taken) == 1


def test_a_proxy_whose_name_is_unknown_is_a_line(far: Bench) -> None:
    client = far.client("--proxy", "socks5://gw.invalid:1080", to=NAME)
    client.says(
        f"cannot connect to {NAME}:20203: through proxy gw.invalid:1080: gw.invalid: ", 2, 60
    )
