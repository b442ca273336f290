"""What ``ttun tox`` reads from others, driven by hypothesis: packets, SOCKS5, targets and rules.

As many examples as in test_python.py.
"""

from __future__ import annotations

import contextlib
import ipaddress
import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from test_python import many

from ttun.errors import ProtocolError, UsageError
from ttun.tox import packet, protocol, rules, socks5

KINDS = [
    packet.PING, packet.PONG, packet.HELLO, packet.TCP, packet.TCP_FIN, packet.REQUESTTUNNEL,
    packet.ACKTUNNEL, packet.DENYTUNNEL, packet.WINDOW, packet.EOF,
]  # fmt: skip
u16 = st.integers(0, 0xFFFF)
ids = st.integers(1, 6)  # few, so that packets meet what others have opened
bodies = st.one_of(
    st.binary(max_size=40),
    st.builds(lambda number, rest: packet.U32.pack(number) + rest, ids, st.binary(max_size=20)),
    st.just(bytes(packet.MAX_DATA)),
    st.just(packet.U32.pack(0xFFFFFFFF)),
)
packets = st.one_of(
    st.binary(max_size=60),
    st.builds(packet.pack, st.sampled_from(KINDS), ids | u16, bodies),
    st.builds(packet.pack, u16, u16, bodies),
)
deeds = st.tuples(st.sampled_from(["accept", "deny", "request", "cancel", "use", "end", "close"]),
                  ids, st.integers(0, 200_000))  # fmt: skip


def do(mux: protocol.Multiplexer, deed: str, number: int, size: int) -> None:
    """What the program itself may do at any time."""
    tunnels = list(mux.tunnels.values())
    if deed == "accept":
        mux.accept(number, "owner")
    elif deed == "deny":
        mux.deny(number, packet.REFUSED)
    elif deed == "request":
        mux.request("host", 22, "owner")
    elif deed == "cancel":
        mux.cancel(number)
    elif tunnels:
        tunnel = tunnels[number % len(tunnels)]
        if deed == "use":
            mux.consumed(tunnel, min(size, tunnel.buffered), number / 1000)
        elif deed == "end":
            mux.end(tunnel)
        else:
            mux.close(tunnel)


@many
@given(st.booleans(), st.lists(packets | deeds, max_size=60))
def test_a_peer_stays_within_its_bounds_whatever_comes(server, events) -> None:  # noqa: ANN001
    growth = protocol.Growth()
    mux = protocol.Multiplexer(server=server, first_id=0, growth=growth)
    mux.round_trip = 1.0
    for event in events:
        if isinstance(event, bytes):
            with contextlib.suppress(ProtocolError):
                mux.receive(event)
        else:
            do(mux, *event)
        assert all(0 <= tunnel.buffered <= tunnel.window for tunnel in mux.tunnels.values())
        assert all(0 <= tunnel.send_window <= 0xFFFFFFFF for tunnel in mux.tunnels.values())
        assert server or not mux.asked
        grown = sum(tunnel.window - protocol.FIRST_WINDOW for tunnel in mux.tunnels.values())
        assert grown == protocol.MAX_GROWTH - growth.left
    for said in mux.control:
        kind, _, data = packet.unpack(said)
        assert kind in KINDS
        assert len(data) <= packet.MAX_DATA
    mux.reset()
    assert growth.left == protocol.MAX_GROWTH


def talk(data: bytes) -> tuple[str, int] | None:
    """Feed the SOCKS5 conversation; where to, or None if it has not come to that."""
    steps = socks5.server()
    _, wanted = next(steps)
    while len(data) >= wanted:
        taken, data = data[:wanted], data[wanted:]
        try:
            answer, wanted = steps.send(taken)
        except StopIteration as done:
            target: tuple[str, int] = done.value
            return target
        except socks5.Refusal as refusal:
            refused = (0, socks5.SOCKS4_REJECTED)  # to a client that speaks SOCKS4
            assert refusal.reply[0] == socks5.VERSION or refusal.reply[:2] == bytes(refused)
            assert refusal.reply[1] != socks5.SUCCEEDED
            return None
        except ProtocolError:
            return None
        assert answer in (b"", b"\x05\x00")
        assert wanted <= 255
    return None


@many
@given(st.binary(max_size=300) | st.binary(max_size=300).map(lambda rest: b"\5\1\0\5\1\0" + rest))
def test_socks5_gives_a_target_or_nothing(data) -> None:  # noqa: ANN001
    target = talk(data)
    if target is not None:
        host, port = target
        assert host.isprintable() and host.isascii() and 0 < len(host) <= 255
        assert 1 <= port <= 65535


@many
@given(st.ip_addresses(), st.integers(1, 65535))
def test_socks5_takes_every_address(address, port) -> None:  # noqa: ANN001
    kind = socks5.IPV4 if address.version == 4 else socks5.IPV6
    request = bytes([5, 1, 0, 5, 1, 0, kind]) + address.packed + port.to_bytes(2, "big")
    target = talk(request)
    assert target is not None
    assert (ipaddress.ip_address(target[0]), target[1]) == (address, port)


targets = st.one_of(
    st.text(max_size=40),
    st.from_regex(r"\[?[0-9a-z:.*]{0,12}\]?[:@]?[0-9]{0,6}", fullmatch=True),
)


@many
@given(targets, st.integers(0, 1))
def test_a_target_is_read_or_refused_in_one_line(text, least) -> None:  # noqa: ANN001
    try:
        rule = rules.parse_target(text, least)
    except UsageError as error:
        assert len(str(error).splitlines()) == 1
        return
    assert rule.host
    assert least <= rule.port <= 65535
    assert rules.parse_target(f"[{rule.host}]:{rule.port}", least) == rule


@many
@given(st.binary(max_size=200))
def test_a_file_of_rules_allows_only_what_it_says(content) -> None:  # noqa: ANN001
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "rules"
        path.write_bytes(content)
        found = rules.load(path)
    assert len(found) <= len(content.decode(errors="replace").splitlines())
    assert rules.allowed(found, "another.example", 22) == any(
        rule.host in ("*", "another.example") and rule.port in (0, 22) for rule in found
    )
