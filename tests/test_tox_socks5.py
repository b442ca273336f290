"""The SOCKS5 conversation, bytes in and bytes out."""

from __future__ import annotations

import pytest

from ttun.errors import ProtocolError
from ttun.tox import packet, socks5

HELLO = b"\5\1\0"


def talk(data: bytes) -> tuple[tuple[str, int], bytes]:
    """Feed a whole conversation; the target and what was answered."""
    steps = socks5.server()
    answers, wanted = next(steps)
    while True:
        taken, data = data[:wanted], data[wanted:]
        assert len(taken) == wanted, "it wants more than a client has to say"
        try:
            answer, wanted = steps.send(taken)
            answers += answer
        except StopIteration as done:
            assert not data, "what follows belongs to the target"
            return done.value, answers


@pytest.mark.parametrize(
    ("address", "host"),
    [
        (b"\1\x7f\0\0\1", "127.0.0.1"),
        (b"\3\x09localhost", "localhost"),
        (b"\3\xff" + b"n" * 255, "n" * 255),
        (b"\4" + bytes(15) + b"\1", "::1"),
        (b"\4\x20\1\x0d\xb8" + bytes(11) + b"\5", "2001:db8::5"),
    ],
)
def test_every_kind_of_address(address: bytes, host: str) -> None:
    target, answers = talk(HELLO + b"\5\1\0" + address + b"\x1f\x90")
    assert target == (host, 8080)
    assert answers == b"\5\0"


def test_any_of_its_methods_may_be_none() -> None:
    assert talk(b"\5\3\2\1\0" + b"\5\1\0\1\1\2\3\4\0\1")[0] == ("1.2.3.4", 1)


@pytest.mark.parametrize(
    ("data", "answer"),
    [
        (b"\5\1\2", b"\5\xff"),
        (b"\5\0", b"\5\xff"),
        (HELLO + b"\5\2\0\1", b"\5\7\0\1" + bytes(6)),
        (HELLO + b"\5\3\0\1", b"\5\7\0\1" + bytes(6)),
        (HELLO + b"\5\1\0\2", b"\5\x08\0\1" + bytes(6)),
        (HELLO + b"\5\1\0\3\0", b"\5\4\0\1" + bytes(6)),
        (HELLO + b"\5\1\0\3\3a\0b", b"\5\4\0\1" + bytes(6)),
        (HELLO + b"\5\1\0\1\1\2\3\4\0\0", b"\5\1\0\1" + bytes(6)),
    ],
)
def test_a_refusal_is_an_answer(data: bytes, answer: bytes) -> None:
    with pytest.raises(socks5.Refusal) as refusal:
        talk(data)
    assert refusal.value.reply == answer


@pytest.mark.parametrize(
    "request_", [b"\4\1\0\x50\1\2\3\4me\0", b"\4\2\0\x50\0\0\0\1\0a.example\0"]
)
def test_a_socks4_client_is_refused_in_socks4(request_: bytes) -> None:
    """Its answer begins with 0 and has eight bytes; 91: rejected."""
    with pytest.raises(socks5.Refusal) as refusal:
        talk(request_)
    assert refusal.value.reply == b"\0\x5b" + bytes(6)


@pytest.mark.parametrize("data", [b"GE", HELLO + b"\4\1\0\1"])
def test_another_protocol_gets_no_answer(data: bytes) -> None:
    with pytest.raises(ProtocolError) as error:
        talk(data)
    assert not isinstance(error.value, socks5.Refusal)


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        (None, 0),
        (packet.REFUSED, 5),
        (packet.UNREACHABLE, 4),
        (packet.NAME, 4),
        (packet.RULE, 2),
        (packet.FULL, 1),
        (99, 1),
    ],
)
def test_what_became_of_the_tunnel(reason: int | None, code: int) -> None:
    assert socks5.reply(reason) == bytes([5, code, 0, 1]) + bytes(6)
