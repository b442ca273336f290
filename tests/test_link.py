"""Address syntax, socket options, and the back-off of the client."""

from __future__ import annotations

import contextlib
import errno
import socket
import threading

import pytest
from connections import KINDS, connected, need_mptcp
from pending_rig import no_descriptors

from ttun import tcp
from ttun.address import Address
from ttun.client import Backoff
from ttun.errors import TtunError, UsageError
from ttun.flag import Flag
from ttun.network.resolver import Target


@pytest.mark.parametrize(
    ("text", "listening", "expected"),
    [
        (":20203", True, Address("", 20203)),
        (":0", True, Address("", 0)),
        ("0.0.0.0:20203", True, Address("0.0.0.0", 20203)),
        ("[::]:20203", True, Address("::", 20203)),
        ("192.0.2.1:1", False, Address("192.0.2.1", 1)),
        ("192.0.2.1", False, Address("192.0.2.1", 20203)),
        ("example.org:65535", False, Address("example.org", 65535)),
        ("[2001:db8::1]:443", False, Address("2001:db8::1", 443)),
        ("[2001:db8::1]", False, Address("2001:db8::1", 20203)),
    ],
)
def test_addresses(text: str, listening: bool, expected: Address) -> None:
    assert tcp.parse_address(text, listening=listening) == expected


@pytest.mark.parametrize(
    ("text", "listening", "why"),
    [
        ("", False, "host is missing"),
        (":20203", False, "host is missing"),
        ("a:0", False, "port must be a number"),
        ("a:65536", True, "port must be a number"),
        ("a:", True, "port must be a number"),
        ("a:b", True, "port must be a number"),
        ("h" * 256 + ":1", True, "more than 255 characters"),
        ("a:-1", True, "port must be a number"),
        pytest.param("a:" + "9" * 5000, True, "port must be a number", id="5,000 digits"),
        ("a:\u0661", True, "port must be a number"),
        ("2001:db8::1", False, "brackets"),
        ("2001:db8::1:20203", True, "brackets"),
        ("::\r", True, "brackets"),
        ("2001]:1", True, "brackets"),
        ("[2001:db8::1", True, "write IPv6"),
        ("[]:1", True, "write IPv6"),
        ("[::1]1", True, "port must be a number"),
    ],
)
def test_bad_addresses(text: str, listening: bool, why: str) -> None:
    with pytest.raises(UsageError, match=why) as raised:
        tcp.parse_address(text, listening=listening)
    assert len(str(raised.value).splitlines()) == 1


def test_an_address_is_shown_as_it_is_written() -> None:
    assert str(Address("2001:db8::1", 1)) == "[2001:db8::1]:1"
    assert tcp.show(("::ffff:192.0.2.1", 1)) == "192.0.2.1:1"


@pytest.fixture
def stop() -> Flag:
    return Flag()


@pytest.mark.parametrize("mptcp", [True, False, None])
@pytest.mark.parametrize("dialled", ["127.0.0.1", "::1", "localhost"])
def test_a_port_alone_listens_on_both_families(
    mptcp: bool | None, dialled: str, stop: Flag
) -> None:
    try:
        socket.getaddrinfo(dialled, 1)
    except socket.gaierror:
        pytest.skip(f"this machine does not know {dialled}")
    with tcp.listen(Address("", 0), mptcp) as listener:
        port = listener.getsockname()[1]
        with tcp.dial(Address(dialled, port), None, stop) as sock:
            assert tcp.kind(sock) == "tcp"


def test_a_kernel_without_ipv6_gets_a_listener_for_ipv4(
    monkeypatch: pytest.MonkeyPatch, stop: Flag
) -> None:
    real = socket.socket

    def without_ipv6(family: int = -1, *rest: int, **more: int) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
        return real(family, *rest, **more)

    monkeypatch.setattr(socket, "socket", without_ipv6)
    listener = tcp.listen(Address("", 0), None)
    monkeypatch.undo()
    with listener:
        assert listener.family == socket.AF_INET
        tcp.dial(Address("127.0.0.1", listener.getsockname()[1]), None, stop).close()


@KINDS
def test_what_a_connection_really_is(
    listener_mptcp: bool | None, dial_mptcp: bool | None, expected: str, stop: Flag
) -> None:
    need_mptcp()
    with connected(stop, listener_mptcp, dial_mptcp) as ends:
        assert [tcp.kind(end) for end in ends] == [expected] * 2


def test_a_peer_that_is_gone_is_noticed_after_35_seconds() -> None:
    """By TCP: with data in flight, and without."""
    with socket.socket() as sock:
        tcp.tune(sock)

        def option(number: int) -> int:
            return sock.getsockopt(socket.IPPROTO_TCP, number)

        idle, interval, probes = map(
            option, (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        )
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert idle + interval * probes == 35
        assert option(socket.TCP_USER_TIMEOUT) == 35_000
        assert idle <= 15, "a NAT forgets"
        assert option(socket.TCP_NODELAY) == 1


def test_every_address_of_a_name_is_tried(monkeypatch: pytest.MonkeyPatch, stop: Flag) -> None:
    with tcp.listen(Address("127.0.0.1", 0), False) as listener:
        port = listener.getsockname()[1]
        answers = [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port))
            for host in ("127.0.0.2", "127.0.0.3", "127.0.0.1")
        ]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answers)
        with tcp.dial(Address("many.example", port), None, stop) as sock:
            assert sock.getpeername() == ("127.0.0.1", port)
        answers.pop()
        with pytest.raises(OSError, match=r"127.0.0.2:\d+: Connection refused; 127.0.0.3"):
            tcp.dial(Address("many.example", port), None, stop)


def test_a_dial_that_nobody_answers_has_an_end(monkeypatch: pytest.MonkeyPatch, stop: Flag) -> None:
    """A full backlog: the kernel drops SYNs."""
    monkeypatch.setattr(tcp, "DIAL_TIMEOUT", 0.5)
    with socket.socket() as full, contextlib.ExitStack() as connected:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        address = Address(*full.getsockname())
        with pytest.raises(OSError, match="Connection timed out"):
            for _ in range(5):
                connected.enter_context(tcp.dial(address, None, stop))


def test_a_name_that_does_not_exist_is_an_error(stop: Flag) -> None:
    with pytest.raises(OSError, match=r"nothing\.invalid: "):
        tcp.dial(Address("nothing.invalid", 1), None, stop)


def test_a_silent_name_server_is_named_where_musl_says_try_again(
    monkeypatch: pytest.MonkeyPatch, stop: Flag
) -> None:
    def silent(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_AGAIN, "Try again")

    monkeypatch.setattr(socket, "getaddrinfo", silent)
    with pytest.raises(OSError, match=r"vpn\.test: temporary failure in name resolution"):
        tcp.dial(Address("vpn.test", 1), None, stop)


def test_a_look_up_that_hangs_is_left_when_stopped(
    monkeypatch: pytest.MonkeyPatch, stop: Flag
) -> None:
    answered = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answered.wait(30) and [])
    stop.set()
    with pytest.raises(InterruptedError):
        tcp.dial(Address("slow.example", 1), None, stop)
    answered.set()


def test_a_port_that_is_taken_is_an_error() -> None:
    with tcp.listen(Address("127.0.0.1", 0), None) as listener:
        address = Address("127.0.0.1", listener.getsockname()[1])
        with pytest.raises(TtunError, match="port in use"):
            tcp.listen(address, None)


def test_an_address_of_another_machine_is_an_error() -> None:
    with pytest.raises(TtunError, match="not an address of this machine"):
        tcp.listen(Address("192.0.2.77", 0), None)


def test_after_a_good_session_it_dials_at_once() -> None:
    assert Backoff().after_session(10.1, now=100) == 0


def test_failures_double_the_wait_up_to_thirty_seconds() -> None:
    backoff = Backoff()
    waits = [backoff.after_failure(now=1000) for _ in range(10)]
    for wait, full in zip(waits, [1, 2, 4, 8, 16, 30, 30, 30, 30, 30]):
        assert 0.75 * full <= wait <= full


def test_many_clients_do_not_come_back_all_at_once() -> None:
    for wait in (lambda b: b.after_failure(now=0), lambda b: b.after_silence(0)):
        waits = [wait(Backoff()) for _ in range(50)]
        assert max(waits) - min(waits) > 0.1, waits


def test_in_the_first_minute_after_a_session_it_waits_a_second_at_most() -> None:
    backoff = Backoff()
    backoff.after_session(11, now=100)
    assert all(backoff.after_failure(now=100 + i) <= 1 for i in range(60))
    assert backoff.after_failure(now=161) > 2


def test_two_clients_that_take_a_server_over_from_each_other_back_off() -> None:
    """Each client's session ends when the other one connects."""
    backoffs, waits = [Backoff(), Backoff()], []
    now = lasted = 0.0
    for number in range(60):
        wait = backoffs[number % 2].after_session(lasted, now)
        now, lasted = now + wait, wait  # the other one had a session until it dialled again
        waits.append(wait)
    assert now > 300, f"60 sessions in {now:.0f} s"
    assert sum(wait < 2 for wait in waits[10:]) <= len(waits) / 2


def test_a_server_that_does_not_answer_is_dialled_again_within_five_seconds() -> None:
    backoff = Backoff()
    waits = [backoff.after_silence(0) for _ in range(50)]
    for wait, full in zip(waits, [1, 2] + [4] * 48):
        assert 0.75 * full <= wait <= full
    assert all(0.75 <= backoff.after_silence(10) <= 1 for _ in range(50))
    assert backoff.after_failure(now=1000) <= 1, "it is no failure"


def test_only_a_long_session_ends_the_back_off() -> None:
    backoff = Backoff()
    for _ in range(6):
        backoff.after_failure(now=0)
    backoff.after_session(30, now=100)
    assert backoff.after_failure(now=161) > 20
    backoff.after_session(61, now=300)
    assert backoff.after_failure(now=361) <= 1


def test_a_lack_is_not_taken_for_a_kernel_without_mptcp(caplog: pytest.LogCaptureFixture) -> None:
    """With a descriptor a moment later, the connection would be plain TCP until it ends."""
    need_mptcp()
    target, stop = Target(socket.AF_INET, ("127.0.0.1", 1)), Flag()
    with no_descriptors(), pytest.raises(OSError, match="Too many open files"):
        tcp.connect(target, True, stop)
    assert caplog.messages == []
