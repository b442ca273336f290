"""What Python reads from others, driven by hypothesis: handshakes, addresses, key files.

In an ordinary run of the tests each gets a hundred examples; ``make fuzz`` sets FUZZ_SECONDS.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ttun import handshake, key, link
from ttun.cipher import CIPHERS
from ttun.errors import ProtocolError, TtunError, UsageError

# A second is good for about this many examples of the slowest of them, on one slow core.
EXAMPLES_PER_SECOND = 200
many = settings(
    max_examples=max(100, int(os.environ.get("FUZZ_SECONDS", "0")) * EXAMPLES_PER_SECOND),
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
K = handshake.psk_key(b"secret")
ciphers = st.sampled_from(list(CIPHERS.values()))
sides = st.sampled_from([handshake.client, handshake.server])


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


@many
@given(sides, ciphers, st.binary(max_size=200))
def test_bytes_of_a_stranger_never_finish_a_handshake(side, cipher, data) -> None:  # noqa: ANN001
    with contextlib.suppress(ProtocolError):
        sent = drive(side(K, cipher), data)
        assert len(sent) <= 16 or side is handshake.client
        return


@many
@given(ciphers, st.data())
def test_one_changed_byte_ends_a_handshake(cipher, data) -> None:  # noqa: ANN001
    """Both sides are real; one message is changed on its way."""
    client, server = handshake.client(K, cipher), handshake.server(K, cipher)
    to_server, _ = next(client)
    next(server)
    to_client, _ = server.send(to_server)
    target = data.draw(st.integers(0, 2), "message")

    def changed(message: bytes, number: int) -> bytes:
        if number != target:
            return message
        at = data.draw(st.integers(0, len(message) - 1), "byte")
        mask = data.draw(st.integers(1, 255), "bits")
        return message[:at] + bytes([message[at] ^ mask]) + message[at + 1 :]

    # A nonce that is not the one that was sent gives another key, seen by whoever opens first.
    magic, _ = client.send(changed(to_client, 0))
    magic = changed(magic, 1)
    with contextlib.suppress(ProtocolError):
        server.send(magic[:2])
        answer, _ = server.send(magic[2:])
        assert target == 2, "the server took what was changed"
        answer = changed(answer, 2)
        with pytest.raises(ProtocolError):
            client.send(answer[:2])
            client.send(answer[2:])


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
        address = link.parse_address(text, listening=listening)
    except UsageError as error:
        assert len(str(error).splitlines()) <= 1
        return
    assert (0 if listening else 1) <= address.port <= 65535
    assert address.host or listening
    assert link.parse_address(str(address), listening=listening) == address


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
@given(st.binary(min_size=1, max_size=100))
def test_every_key_gives_both_sides_the_same_session(psk) -> None:  # noqa: ANN001
    k = handshake.psk_key(psk)
    assert re.fullmatch(r"[0-9a-f]{64}", k.hex())
    cipher = CIPHERS["chacha20-poly1305"]
    client, server = handshake.client(k, cipher), handshake.server(k, cipher)
    to_server, _ = next(client)
    next(server)
    magic, _ = client.send(server.send(to_server)[0])
    server.send(magic[:2])
    answer, _ = server.send(magic[2:])
    client.send(answer[:2])
    with pytest.raises(StopIteration) as done:
        client.send(answer[2:])
    with pytest.raises(StopIteration) as served:
        server.send(b"")
    frame = done.value.value.sending.seal(b"packet")
    assert served.value.value.receiving.open(frame[2:]) == b"packet"
