"""A tunnel's dial through Tox: what ends its wait, and that it sleeps meanwhile.

The test plays the client's forwarder and its loop's owner; the sockets, the flag and the loop's
thread are real. toxcore is not on any network.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from shaking import K, terms
from toxnet import on_loop
from tunnel import eventually

from ttun import handshake
from ttun.errors import TtunError
from ttun.flag import Flag
from ttun.peer import Host
from ttun.pending import Pending
from ttun.tox import nodes, packet, transport
from ttun.tox.client import ForwardingClient
from ttun.tox.instance import Tox
from ttun.tox.loop import Loop
from ttun.tox.transport import Dialer

pytestmark = pytest.mark.tox


class Dial:
    """A dial on a thread of its own, and what came of it."""

    def __init__(self, dialer: Dialer) -> None:
        self.stop = Flag()
        self.beats = 0
        self.stop.on_beat = self._beat
        self.sock: socket.socket | None = None
        self.error: BaseException | None = None
        self.seconds = 0.0
        self._thread = threading.Thread(target=self._run, args=(dialer,), daemon=True)
        self._thread.start()

    def _beat(self) -> float:
        self.beats += 1
        return 60.0

    def _run(self, dialer: Dialer) -> None:
        began = time.monotonic()
        try:
            self.sock = dialer.dial(self.stop)
        except BaseException as error:
            self.error = error
        self.seconds = time.monotonic() - began

    def ended(self) -> None:
        """Wait for it."""
        self._thread.join(30)
        assert not self._thread.is_alive()


@pytest.fixture
def dialer() -> Iterator[Dialer]:
    other = Tox(udp_ports=None)
    made = Dialer(other.address().hex())
    made._loop = Loop(Tox(udp_ports=None))
    made._client = ForwardingClient(made._loop, other.address(), None)
    made._loop.start(made._client)
    yield made
    made.close()
    other.close()


def client_of(dialer: Dialer) -> ForwardingClient:
    assert dialer._client is not None
    return dialer._client


def waiting(dialer: Dialer) -> int:
    return len(client_of(dialer)._waiting)


def answer(dialer: Dialer, reason: int | None, then: bytes = b"") -> None:
    """Have the client answer what waits: with a refusal, or with a tunnel and its first bytes."""
    client = client_of(dialer)

    def on_its_thread() -> None:
        (connection,) = client._waiting
        if reason is not None:
            client._refuse(connection, reason)
        else:
            client._waiting.discard(connection)
            connection.answer(None)
            connection.sock.sendall(then)

    on_loop(client.loop, on_its_thread)


def test_a_dial_that_waits_sleeps(dialer: Dialer) -> None:
    dial = Dial(dialer)
    eventually(lambda: waiting(dialer) == 1, "it waits for the server")
    before = dial.beats
    time.sleep(3)
    assert dial.beats - before <= 6, "it woke up ten times a second"
    assert dial.beats > before, "it shows that it lives"
    dial.stop.set()
    dial.ended()
    assert isinstance(dial.error, InterruptedError)


def test_a_dial_ends_with_the_tunnel_and_its_bytes_are_the_peers_alone(dialer: Dialer) -> None:
    dial = Dial(dialer)
    eventually(lambda: waiting(dialer) == 1, "it waits for the server")
    answer(dialer, None, b"from the peer")
    dial.ended()
    assert dial.sock is not None
    with dial.sock as sock:
        sock.settimeout(20)
        assert sock.recv(100) == b"from the peer"


def test_a_dial_ends_with_a_refusal(dialer: Dialer) -> None:
    dial = Dial(dialer)
    eventually(lambda: waiting(dialer) == 1, "it waits for the server")
    answer(dialer, packet.RULE)
    dial.ended()
    assert str(dial.error) == packet.describe(packet.RULE)


@pytest.mark.parametrize("when", ["while it waits", "before"])
def test_a_dial_ends_with_the_loop(dialer: Dialer, when: str) -> None:
    if when == "before":
        dialer.close()
    dial = Dial(dialer)
    if when == "while it waits":
        eventually(lambda: waiting(dialer) == 1, "it waits for the server")
        dialer.close()
    dial.ended()
    assert isinstance(dial.error, (OSError, TtunError))
    assert not isinstance(dial.error, InterruptedError)


def test_a_dial_whose_loop_hangs_has_an_end(
    dialer: Dialer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "WAIT_MOST", 0.0)
    hang = threading.Event()

    def hangs() -> None:
        hang.wait(60)

    client_of(dialer).loop.call(hangs)
    try:
        dial = Dial(dialer)
        dial.ended()
        assert isinstance(dial.error, OSError)
        assert "does not respond" in str(dial.error)
    finally:
        hang.set()


def test_a_server_whose_tox_ends_ends_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It once waited for connections that could not come, and looked alive."""
    monkeypatch.setattr(transport, "open_tox", lambda *_, **__: Tox(udp_ports=None))
    monkeypatch.setattr(nodes, "load", lambda _: [])
    listener = transport.Listener(tmp_path)
    pending = Pending(Flag())
    pending.listen(Host(listener, lambda: handshake.server(K, terms()), lambda _: False, False))
    listener.start()
    pending.turn(0.2)

    def fail() -> None:
        raise ValueError("a bug")

    listener._loop.call(fail)
    with pytest.raises(TtunError, match=r"^Tox stopped: a bug$"):
        for _ in range(50):
            pending.turn(0.2)
    pending.close()
    listener.close()
