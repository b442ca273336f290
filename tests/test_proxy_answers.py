"""What a proxy may answer, bytes in and bytes out; its URL; and that no error has the password."""

from __future__ import annotations

import base64
import contextlib
import random
import socket
import traceback
from collections.abc import Callable

import pytest

from ttun import proxy
from ttun.address import Address
from ttun.errors import ProtocolError, UsageError
from ttun.flag import Flag
from ttun.proxy import MAX_HEADER, Proxy, Steps

SERVER = Address("vpn.example", 20203)
LOGIN = (b"me", b"pass:w\xf6rd")
TUNNEL = b"what follows belongs to the tunnel"

OK = b"HTTP/1.1 200 Connection established\r\n"
# Answers that end well: of which kind of proxy, to whom, what it sends in all.
GOOD = {
    "http": ("http", None, OK + b"\r\n"),
    "http with headers": ("http", LOGIN, OK + b"Via: x\r\nX: " + b"y" * 30 + b"\r\n\r\n"),
    "http 1.0": ("http", None, b"HTTP/1.0 200\r\n\r\n"),
    "http with bare line ends": ("http", None, b"HTTP/1.1 201 fine\nA: b\n\n"),
    "http with mixed line ends": ("http", None, b"HTTP/1.1 299 fine\nA: b\n\r\n"),
    "http after interim ones": ("http", None, b"HTTP/1.1 100 Go\r\n\r\n" * 2 + OK + b"\r\n"),
    # RFC 9110, section 9.3.6: neither has a meaning in an answer to CONNECT that is 2xx.
    "http with a length": ("http", None, OK + b"Content-Length: 5\r\n\r\n"),
    "http in chunks": ("http", None, b"HTTP/1.1 204 No\r\nTransfer-Encoding: chunked\r\n\r\n"),
    "socks5": ("socks5", None, b"\5\0" + b"\5\0\0\1" + bytes(6)),
    "socks5 without a password after all": ("socks5", LOGIN, b"\5\0" + b"\5\0\0\1" + bytes(6)),
    "socks5 with a password": ("socks5", LOGIN, b"\5\2" + b"\1\0" + b"\5\0\0\1" + bytes(6)),
    "socks5 bound to ipv6": ("socks5", None, b"\5\0" + b"\5\0\0\4" + bytes(18)),
    "socks5 bound to a name": ("socks5", None, b"\5\0" + b"\5\0\0\3\4name\0\0"),
    "socks5 bound to a long name": ("socks5", None, b"\5\0" + b"\5\0\0\3\xff" + bytes(257)),
    "socks5 bound to no name": ("socks5", None, b"\5\0" + b"\5\0\0\3\0\0\0"),
}  # fmt: skip
KINDS: dict[str, Callable[..., Steps]] = {"http": proxy.http, "socks5": proxy.socks5}


def talk(kind: str, login: object, data: bytes, server: Address = SERVER) -> tuple[bytes, bytes]:
    """Feed an answer; what was sent to the proxy, and what of the answer was not read.

    Raises EOFError where more is wanted.
    """
    steps = KINDS[kind](server, login)
    sent, wanted = next(steps)
    while True:
        if len(data) < wanted:
            raise EOFError
        taken, data = data[:wanted], data[wanted:]
        try:
            answer, wanted = steps.send(taken)
        except StopIteration as done:
            assert done.value is True
            return sent, data
        assert 0 < wanted < 300
        sent += answer


@pytest.mark.parametrize("case", GOOD)
def test_what_follows_an_answer_belongs_to_the_tunnel(case: str) -> None:
    kind, login, answer = GOOD[case]
    assert talk(kind, login, answer + TUNNEL)[1] == TUNNEL
    assert talk(kind, login, answer + b"\r\n\r\n")[1] == b"\r\n\r\n"


@pytest.mark.parametrize("case", GOOD)
def test_no_part_of_an_answer_is_taken_for_the_whole(case: str) -> None:
    kind, login, answer = GOOD[case]
    for size in range(len(answer)):
        with pytest.raises(EOFError):
            talk(kind, login, answer[:size])


@pytest.mark.parametrize("case", GOOD)
def test_no_changed_byte_does_harm(case: str) -> None:
    """It ends well, or with a reason in one line, or more is wanted: never in another way."""
    kind, login, answer = GOOD[case]
    for index in range(len(answer)):
        for byte in range(256):
            changed = answer[:index] + bytes([byte]) + answer[index + 1 :]
            try:
                talk(kind, login, changed + TUNNEL)
            except EOFError:
                pass
            except ProtocolError as error:
                assert str(error).isprintable()
                assert len(str(error)) < 1000


@pytest.mark.parametrize("kind", KINDS)
def test_no_random_answer_does_harm(kind: str) -> None:
    chance = random.Random(1)
    parts = [
        b"HTTP/1.1 ",
        b"200",
        b"\r",
        b"\n",
        b"\r\n\r\n",
        b"\5\0",
        b"\5\2",
        b"\1\0",
        b"\5\0\0\3",
    ]
    for _ in range(5_000):
        some = [*parts, chance.randbytes(3), chance.randbytes(1)]
        data = b"".join(chance.choices(some, k=chance.randrange(12)))
        with contextlib.suppress(EOFError, ProtocolError):
            talk(kind, LOGIN, data)


def http_status(line: bytes) -> bytes:
    return line + b"\r\n\r\n"


@pytest.mark.parametrize(
    ("kind", "login", "answer", "says"),
    [
        ("http", None, http_status(b"HTTP/1.0 403 Filtered"), "refused: HTTP/1.0 403 Filtered"),
        ("http", None, http_status(b"HTTP/1.1 502"), "refused: HTTP/1.1 502"),
        ("http", None, http_status(b"HTTP/1.1 407 Auth"), "407 Auth (it requires USER:PASSWORD@)"),
        ("http", LOGIN, http_status(b"HTTP/1.1 407 Auth"), "407 Auth (wrong user or password?)"),
        ("http", None, http_status(b"HTTP/1.1 302 Found\r\nLocation: x"), "HTTP/1.1 302 Found"),
        ("http", None, http_status(b"HTTP/1.1 503 a\x1b[31mb\xff"), r"503 a\x1b[31mb"),
        ("http", None, http_status(b"HTTP/1.1 403 " + b"x" * 60_000), "403 " + 187 * "x"),
        ("http", None, b"SSH-2.0-OpenSSH_9.2\r\n", "not an HTTP proxy"),
        ("http", None, b"HTTQ", "not an HTTP proxy"),
        ("http", None, http_status(b"HTTP/1.1 OK"), "malformed status line"),
        ("http", None, http_status(b"HTTP/1.1 999 x"), "malformed status line"),
        ("http", None, http_status(b"HTTP/2 200 x"), "malformed status line"),
        ("http", None, OK + b"X: " + b"y" * MAX_HEADER, "exceeds 64 KiB"),
        ("http", None, b"HTTP/1.1 100 Go on\r\n\r\n" * 4000, "exceeds 64 KiB"),
        ("socks5", None, b"HT", "not a SOCKS5 proxy"),
        ("socks5", None, b"\5\xff", "no acceptable authentication method (it requires USER"),
        ("socks5", LOGIN, b"\5\xff", "no acceptable authentication method (it accepts no user"),
        ("socks5", None, b"\5\2", "not a SOCKS5 proxy: authentication method 2"),
        ("socks5", None, b"\5\1", "not a SOCKS5 proxy: authentication method 1"),
        ("socks5", LOGIN, b"\5\2\1\1", "authentication failed (wrong user or password?)"),
        ("socks5", None, b"\5\0\4\0\0\1", "malformed reply"),
        ("socks5", None, b"\5\0\5\0\0\2", "address type 2"),
    ],
)  # fmt: skip
def test_a_refusal_is_one_line_with_the_reason(
    kind: str, login: object, answer: bytes, says: str
) -> None:
    with pytest.raises(ProtocolError) as raised:
        talk(kind, login, answer)
    assert says in str(raised.value)
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (1, "general SOCKS server failure"),
        (2, "connection not allowed by ruleset"),
        (3, "network unreachable"),
        (4, "host unreachable"),
        (5, "connection refused"),
        (6, "TTL expired"),
        (7, "command not supported"),
        (8, "address type not supported"),
        (9, "reply code 9"),
        (255, "reply code 255"),
    ],
)
def test_a_reply_code_of_socks_is_said_in_words(code: int, says: str) -> None:
    with pytest.raises(ProtocolError, match=f"^refused: {says}$"):
        talk("socks5", None, b"\5\0" + bytes([5, code, 0, 1]))


@pytest.mark.parametrize(
    ("host", "shown", "packed"),
    [
        ("vpn.example", "vpn.example", b"\3\x0bvpn.example"),
        ("b\xfccher.example", "xn--bcher-kva.example", b"\3\x15xn--bcher-kva.example"),
        ("192.0.2.1", "192.0.2.1", b"\1\xc0\0\2\1"),
        ("2001:db8::1", "[2001:db8::1]", b"\4\x20\1\x0d\xb8" + bytes(11) + b"\1"),
    ],
)
def test_what_a_proxy_is_asked_for(host: str, shown: str, packed: bytes) -> None:
    """A name is the proxy's to look up; an address goes to it as one."""

    def asked(url: str, answer: bytes) -> bytes:
        steps = Proxy(url, Address(host, 443)).steps()
        sent, wanted = next(steps)
        while True:
            taken, answer = answer[:wanted], answer[wanted:]
            try:
                more, wanted = steps.send(taken)
            except StopIteration:
                return sent
            sent += more

    request = asked("http://h:1", GOOD["http"][2])
    assert request == f"CONNECT {shown}:443 HTTP/1.1\r\nHost: {shown}:443\r\n\r\n".encode()
    lines = asked("http://me:p%3Aw%F6@h:1", GOOD["http"][2]).split(b"\r\n")
    assert lines[2] == b"Proxy-Authorization: Basic " + base64.b64encode(b"me:p:w\xf6")
    request = asked("socks5://h:1", GOOD["socks5"][2])
    assert request == b"\5\1\0" + b"\5\1\0" + packed + b"\x01\xbb"
    request = asked("SOCKS5h://me:p%40@h:1", GOOD["socks5 with a password"][2])
    assert request == b"\5\2\0\2" + b"\1\2me\2p@" + b"\5\1\0" + packed + b"\x01\xbb"


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://gw:3128", ("gw", 3128)),
        ("http://gw:3128/", ("gw", 3128)),
        (" HTTP://[2001:db8::5]:80 ", ("2001:db8::5", 80)),
        ("socks5://a:b@c@192.0.2.1:1080", ("192.0.2.1", 1080)),
        ("socks5h://gw:1", ("gw", 1)),
    ],
)
def test_the_address_of_a_proxy(url: str, address: tuple[str, int]) -> None:
    assert Proxy(url, SERVER).address == address


SECRET = "very-Secret"


@pytest.mark.parametrize("user", ["", "u" * 256])
def test_a_user_that_socks5_cannot_carry_is_refused_with_the_reason(user: str) -> None:
    with pytest.raises(UsageError, match="takes a user of 1 to 255 bytes"):
        Proxy(f"socks5://{user}:{SECRET}@gw:1", Address("h", 1))


@pytest.mark.parametrize(
    "url",
    [
        "",
        SECRET,
        f"me:{SECRET}@gw:3128",
        f"https://me:{SECRET}@gw:3128",
        f"socks4://me:{SECRET}@gw:3128",
        f"http://me:{SECRET}",
        f"http://me:{SECRET}@gw",
        f"http://me:{SECRET}@gw:{SECRET}",
        f"http://me%3A:{SECRET}@gw:1",
        f"socks5://:{SECRET}@gw:1",
        f"socks5://me:{SECRET}{'x' * 256}@gw:1",
        f"socks5://{'u' * 256}:{SECRET}@gw:1",
        f"http:/me:{SECRET}@gw:1",
    ],
)
def test_what_is_no_proxy_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(UsageError) as raised:
        Proxy(url, SERVER)
    shown = "".join(traceback.format_exception(raised.type, raised.value, raised.tb))
    assert SECRET not in "".join(line for line in shown.splitlines() if "Proxy(url" not in line)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    "host",
    ["a b", "x\r\nEvil: 1", "fe80::1%eth0", ".", "a..b", "n" * 64, "a." * 127 + "abc", "\udcff"],
)
def test_a_name_that_no_proxy_can_look_up_is_refused(host: str) -> None:
    with pytest.raises(UsageError, match="is not a name that a proxy can resolve"):
        Proxy("http://gw:1", Address(host, 1))


@pytest.mark.parametrize("secret", [b"pass:w\xf6rd", base64.b64encode(b"me:pass:w\xf6rd")])
def test_a_proxy_that_repeats_the_password_is_not_quoted(secret: bytes) -> None:
    with pytest.raises(ProtocolError, match=r"^refused: HTTP 407 \(wrong user or password\?\)$"):
        talk("http", LOGIN, http_status(b"HTTP/1.1 407 I do not like " + secret))


def test_no_value_of_a_dialer_shows_the_password() -> None:
    dialer = proxy.Dialer("vpn.example", f"http://me:{SECRET}@gw:1", None, "auto")
    assert SECRET not in f"{dialer!r} {dialer.name} {vars(dialer)['_through']}"
    assert dialer.kind(socket.socket()) == "tcp through proxy gw:1"
    with pytest.raises(OSError, match=r"^through proxy gw:1: gw: ") as raised:
        proxy.Dialer("vpn.example", f"http://me:{SECRET}@gw.invalid:1", None, "auto")
        dialer.candidates(Flag())
    assert SECRET not in str(raised.value)
