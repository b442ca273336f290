"""What the kernel says of the subflows of a Multipath TCP connection, and who is taken for gone."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from tunnel import eventually

from ttun import mptcp, tcp

needs_mptcp = pytest.mark.skipif(
    not os.path.exists("/proc/sys/net/mptcp"), reason="no Multipath TCP in this kernel"
)
LOOPBACK = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}


def connected(family: int, protocol: int) -> tuple[socket.socket, socket.socket]:
    with socket.socket(family, socket.SOCK_STREAM, protocol) as listener:
        listener.bind((LOOPBACK[socket.AddressFamily(family)], 0))
        listener.listen()
        sock = socket.socket(family, socket.SOCK_STREAM, protocol)
        sock.connect(listener.getsockname())
        return sock, listener.accept()[0]


@pytest.fixture(params=[socket.AF_INET, socket.AF_INET6], ids=["IPv4", "IPv6"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[socket.socket, socket.socket]]:
    try:
        one, other = connected(request.param, tcp.IPPROTO_MPTCP)
    except OSError as error:
        pytest.skip(str(error))
    with one, other:
        yield one, other


@needs_mptcp
def test_the_local_address_of_each_subflow_is_known(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    for sock in pair:
        assert mptcp.local_addresses(sock) == [LOOPBACK[sock.family]]


@needs_mptcp
def test_the_silence_of_a_peer_grows_and_ends_with_its_next_byte(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    one, other = pair
    other.sendall(b"1")
    assert one.recv(1) == b"1"
    before = mptcp.silence(one)
    assert before is not None and before < 20_000
    eventually(lambda: (mptcp.silence(one) or 0) >= before + 600, "silence")
    other.sendall(b"2")
    assert one.recv(1) == b"2"
    eventually(lambda: (mptcp.silence(one) or 0) < 400, "it has been heard")


def test_tcp_has_no_subflows_and_is_the_kernels_to_watch() -> None:
    one, other = connected(socket.AF_INET, 0)
    with one, other:
        assert mptcp.local_addresses(one) == []
        assert mptcp.silence(one) is None
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, tcp.USER_TIMEOUT)
        assert mptcp.Watch(one).look(time.monotonic() + 1000) is None


@pytest.mark.parametrize("tells", [True, False])
def test_the_kernel_is_asked_every_five_seconds_and_the_peer_is_gone_after_tcps_timeout(
    tells: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[int | None] = [0 if tells else None]
    asked = []

    def silence(_: object) -> int | None:
        asked.append(now)
        return heard[0]

    now = 0.0
    monkeypatch.setattr(mptcp, "silence", silence)
    monkeypatch.setattr(mptcp, "_kernel_does_it", lambda _: False)
    monkeypatch.setattr(mptcp, "time", SimpleNamespace(monotonic=lambda: 100.0))
    watch = mptcp.Watch(None)  # type: ignore[arg-type]
    assert asked == [0.0], "whether it tells at all"
    for now in (101.0, 104.9, 105.1, 106.0, 110.0, 110.2):
        assert watch.look(now) is None
    assert asked == ([0.0, 105.1, 110.2] if tells else [0.0])
    heard[0] = tcp.USER_TIMEOUT - 1
    assert watch.look(now := 120.0) is None
    heard[0] = tcp.USER_TIMEOUT
    gone = watch.look(now := 130.0)
    assert gone == ("peer timed out: last received 35 s ago" if tells else None)
