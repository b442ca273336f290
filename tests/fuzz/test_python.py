"""What Python reads from others, driven by hypothesis: handshakes, addresses, key files.

In an ordinary run of the tests each gets a hundred examples; ``make fuzz`` sets FUZZ_SECONDS.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ttun import cipher as ciphers
from ttun import handshake, tcp
from ttun.cipher import CIPHERS
from ttun.commands import key
from ttun.errors import ProtocolError, TtunError, UsageError
from ttun.handshake import Keys, Terms

# A second is good for about this many examples of the slowest of them, on one slow core.
EXAMPLES_PER_SECOND = 200
many = settings(
    max_examples=max(100, int(os.environ.get("FUZZ_SECONDS", "0")) * EXAMPLES_PER_SECOND),
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
K = handshake.psk_key(b"secret")
TERMS = [
    *(Terms("v1", cipher) for cipher in CIPHERS.values() if cipher.in_v1),
    Terms("auto", offers=ciphers.fast()),
    Terms("x1", offers=ciphers.fast(), features=3),
]
terms = st.sampled_from(TERMS)
sides = st.sampled_from([handshake.client, handshake.server])
Change = Callable[[int, bytes], bytes]


def drive(steps: handshake.Steps, data: bytes) -> bytes:
    """Feed a handshake as the network would, and return what it sent."""
    sent, wanted = next(steps)
    while True:
        assert 0 <= wanted <= 64, "an unfinished handshake never asks for much"
        if len(data) < wanted:
            steps.close()
            return sent
        taken, data = data[:wanted], data[wanted:]
        more, wanted = steps.send(taken)
        sent += more


def meet(k: bytes, both: Terms, change: Change = lambda _, message: message) -> list[Keys | None]:
    """Let a client and a server shake hands; the keys of each, or None if it did not come to that.

    change: gets each message with its number, and returns what arrives.
    """
    steps = [handshake.client(k, both), handshake.server(k, both)]
    waiting, wanted = [b"", b""], [0, 0]
    found: list[Keys | None] = [None, None]
    over = [False, False]
    messages = 0

    def put(side: int, step: tuple[bytes, int]) -> None:
        nonlocal messages
        wanted[side] = step[1]
        if step[0]:
            waiting[1 - side] += change(messages, step[0])
            messages += 1

    for side in (0, 1):
        put(side, next(steps[side]))
    while any(not over[side] and len(waiting[side]) >= wanted[side] for side in (0, 1)):
        for side in (0, 1):
            if over[side] or len(waiting[side]) < wanted[side]:
                continue
            size = wanted[side]
            taken, waiting[side] = waiting[side][:size], waiting[side][size:]
            try:
                put(side, steps[side].send(taken))
            except StopIteration as done:
                found[side], over[side] = done.value, True
            except ProtocolError:
                over[side] = True
    return found


@many
@given(sides, terms, st.binary(max_size=200))
def test_bytes_of_a_stranger_never_finish_a_handshake(side, both, data) -> None:  # noqa: ANN001
    with contextlib.suppress(ProtocolError):
        sent = drive(side(K, both), data)
        assert len(sent) <= 16 or side is handshake.client


@many
@given(terms, st.data())
def test_one_changed_byte_ends_a_handshake(both, data) -> None:  # noqa: ANN001
    """Both sides are real; one message is changed on its way."""
    target = data.draw(st.integers(0, 3), "message")

    def change(number: int, message: bytes) -> bytes:
        if number != target:
            return message
        at = data.draw(st.integers(0, len(message) - 1), "byte")
        mask = data.draw(st.integers(1, 255), "bits")
        return message[:at] + bytes([message[at] ^ mask]) + message[at + 1 :]

    assert None in meet(K, both, change)


addresses = st.one_of(
    st.text(max_size=40),
    st.from_regex(r"\[?[0-9a-f:.]{0,12}\]?:?[0-9]{0,6}", fullmatch=True),
    st.builds("{}:{}".format, st.ip_addresses(v=4), st.integers(-1, 70000)),
    st.builds("[{}]:{}".format, st.ip_addresses(v=6), st.integers(-1, 70000)),
)


@many
@given(addresses, st.booleans())
def test_an_address_is_read_or_refused_in_one_line(text, listening) -> None:  # noqa: ANN001
    try:
        address = tcp.parse_address(text, listening=listening)
    except UsageError as error:
        assert len(str(error).splitlines()) <= 1
        return
    assert (0 if listening else 1) <= address.port <= 65535
    assert address.host or listening
    assert tcp.parse_address(str(address), listening=listening) == address


@many
@given(st.binary(max_size=300))
def test_a_key_file_is_taken_as_it_is_or_refused(content) -> None:  # noqa: ANN001
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "key"
        path.write_bytes(content)
        path.chmod(0o600)
        try:
            found = key.read_file(path)
        except TtunError as error:
            assert content in (b"", b"\n")
            assert len(str(error).splitlines()) == 1
            return
    assert content == found or content == found + b"\n"


@many
@given(terms, st.binary(min_size=1, max_size=100))
def test_every_key_gives_both_sides_the_same_session(both, psk) -> None:  # noqa: ANN001
    client, server = meet(handshake.psk_key(psk), both)
    assert client is not None
    assert server is not None
    for sender, receiver in ((client, server), (server, client)):
        frame = sender.sending.seal(b"packet")
        assert receiver.receiving.open(frame[2:]) == b"packet"
