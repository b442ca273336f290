"""Selection of the congestion control, and the messages when it is not available."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
from pathlib import Path

import pytest
from connections import KINDS, connected, need_mptcp
from tunnel import CLIENT, PROGRAM, SERVER, Bench

from ttun import congestion
from ttun.errors import TtunError, UsageError
from ttun.flag import Flag
from ttun.lab import netns

PROC = Path("/proc/sys/net/ipv4")
BOTH = "( sport = :20203 or dport = :20203 )"


def control(sock: socket.socket) -> str:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).strip(b"\0").decode()


@pytest.fixture
def stop() -> Flag:
    return Flag()


@pytest.fixture
def system() -> str:
    """The default congestion control of this machine."""
    with socket.socket() as fresh:
        return control(fresh)


@pytest.fixture
def bbr() -> None:
    with socket.socket() as fresh:
        try:
            fresh.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"bbr")
        except OSError:
            pytest.skip("no bbr in this kernel")


@KINDS
@pytest.mark.parametrize("near", [True, False])
def test_a_far_peer_gets_bbr_and_a_near_one_is_not_paced(
    near: bool,
    listener_mptcp: bool | None,
    dial_mptcp: bool | None,
    expected: str,
    system: str,
    bbr: None,
    stop: Flag,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    need_mptcp()
    monkeypatch.setattr(congestion, "NEAR", 10.0 if near else 0.0)
    with connected(stop, listener_mptcp, dial_mptcp) as ends:
        # Pacing stays enabled once requested, so it must not be on from the start.
        assert [control(end) for end in ends] == [congestion.UNPACED] * 2
        for end in ends:
            assert congestion.choose(end) is None
        unpaced = congestion.UNPACED if system.startswith("bbr") else system
        assert [control(end) for end in ends] == [unpaced if near else "bbr"] * 2


@pytest.mark.parametrize("near", [True, False])
def test_one_that_was_named_is_taken_near_and_far(
    near: bool, stop: Flag, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(congestion, "NEAR", 10.0 if near else 0.0)
    with connected(stop) as ends:
        for end in ends:
            assert congestion.choose(end, "reno") is None
            assert control(end) == "reno"


def test_system_leaves_a_socket_alone(system: str) -> None:
    with socket.socket() as sock:
        congestion.start(sock, "system")
        assert control(sock) == system
        assert congestion.choose(sock, "system") is None
        assert control(sock) == system


def test_one_that_a_route_chose_is_left_alone(
    bbr: None, stop: Flag, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A congestion control set by a route is kept."""
    monkeypatch.setattr(congestion, "NEAR", 10.0)
    with connected(stop) as ends:
        for end in ends:
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"bbr")
            assert congestion.choose(end) is None
            assert control(end) == "bbr"


def test_what_has_no_congestion_control_is_no_trouble() -> None:
    for end in socket.socketpair():
        with end:
            congestion.start(end)
            assert congestion.choose(end) is None
            assert congestion.tcp_stats(end) is None


def test_the_way_says_what_the_kernel_measured(stop: Flag) -> None:
    with connected(stop) as ends:
        ends[0].sendall(b"x" * 100)
        way = congestion.tcp_stats(ends[0])
        assert way is not None and way.min_rtt is not None
        assert 0 < way.min_rtt < 10
        assert way.retransmitted is not None and 0 <= way.retransmitted <= 1
    assert congestion.tcp_stats(ends[0]) is None, "of a closed one nothing"


def test_without_a_descriptor_it_says_that_bbr_cannot_be_had(
    stop: Flag,
) -> None:
    with connected(stop) as ends:
        most = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.ExitStack() as taken:
            resource.setrlimit(resource.RLIMIT_NOFILE, (ends[0].fileno() + 20, most[1]))
            taken.callback(resource.setrlimit, resource.RLIMIT_NOFILE, most)
            with contextlib.suppress(OSError):
                while True:
                    taken.callback(os.close, os.dup(ends[0].fileno()))
            why = congestion.choose(ends[0])
    assert why == "bbr: Too many open files"


@pytest.mark.parametrize("name", ["", "a b", "sixteen_letters_", "ü", "x\n"])
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="unknown congestion control"):
        congestion.checked(name)


def test_one_that_this_kernel_lacks_is_refused_before_anything_is_made() -> None:
    with pytest.raises(TtunError, match=r"cannot use nosuch: .*modprobe tcp_nosuch"):
        congestion.prepare("nosuch")
    congestion.prepare("system")
    congestion.prepare("auto")


# ---- the tunnel's own connection ----------------------------------------------------------------


def routes(bench: Bench, *more: str) -> None:
    """Set route attributes between the hosts, for new connections."""
    for host in (SERVER, CLIENT):
        where = ["192.0.2.0/24", "dev", bench.pair.links[host], "src", netns.IPV4[host]]
        bench.run(host, "ip", "route", "change", *where, *more)


def controls(bench: Bench) -> set[str]:
    """The TCP statistics of both ends' connections."""
    found = set()
    for host in (SERVER, CLIENT):
        shown = bench.run(host, "ss", "-tinH", "state", "established", BOTH)
        found.add(shown.splitlines()[1].split()[0])
    return found


@pytest.mark.hosts
@pytest.mark.parametrize(
    ("options", "congctl", "expected"),
    [
        ((), None, None),
        (("--congestion-control", "bbr"), None, "bbr"),
        (("--congestion-control", "system"), None, "SYSTEM"),
        ((), "bbr", "bbr"),
        (("--congestion-control", "reno"), "bbr", "bbr"),
    ],
)
def test_the_connection_has_what_was_asked_for(
    plain: Bench,
    options: tuple[str, ...],
    congctl: str | None,
    expected: str | None,
    system: str,
    bbr: None,
) -> None:
    if congctl is not None:
        routes(plain, "congctl", congctl)
    try:
        ends = plain.tunnel(*options)
        plain.answers()
        usual = "reno" if system.startswith("bbr") else system  # the peer is near
        wanted = {None: usual, "SYSTEM": system}.get(expected, expected)
        assert controls(plain) == {wanted}
        for end in ends:
            assert end.status()["congestion_control"] == wanted
            assert 0 <= end.status()["retransmitted"] <= 1
            shown = plain.run(end.host, *PROGRAM, "show")
            assert f"congestion control: {wanted}" in shown
            assert json.loads(plain.run(end.host, *PROGRAM, "show", "--json"))
            assert f"congestion control {wanted}, round trip" in end.log()
        for end in ends:
            assert end.stop() == 0
            assert f"% retransmitted, {wanted}" in end.log()
    finally:
        if congctl is not None:
            routes(plain)


@pytest.mark.hosts
def test_one_that_this_kernel_lacks_ends_the_program_with_a_line(plain: Bench) -> None:
    end = plain.start(SERVER, "server", "-k", "secret", "--congestion-control", "nosuch")
    assert end.ended() == 1
    assert "cannot use nosuch" in end.log() and "Traceback" not in end.log()


@pytest.mark.hosts
@pytest.mark.skipif(os.geteuid() != 0, reason="changes what /proc says, in a mount namespace")
def test_where_it_is_not_allowed_there_is_one_line_and_a_tunnel(
    plain: Bench, system: str, bbr: None, tmp_path: Path
) -> None:
    """The kernel's list is one for the whole machine, so what is not on it is asked for by name.

    Whatever is available and not allowed can be had by root and by nobody else.
    """
    allowed = (PROC / "tcp_allowed_congestion_control").read_text().split()
    available = (PROC / "tcp_available_congestion_control").read_text().split()
    restricted = sorted({*available} - {*allowed})
    if not restricted:
        pytest.skip("all congestion controls of this kernel are allowed")
    ends = plain.tunnel("--congestion-control", restricted[0])
    plain.answers()
    for end in ends:
        assert end.log().count(f"cannot use congestion control {restricted[0]}: not in ") == 1
        assert end.status()["congestion_control"] == system
