"""Multipath TCP over two links: either may fail."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator

import pytest
from tunnel import CLIENT, SERVER, TUNNEL4, Bench, eventually

from ttun.lab import netns

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(
        not os.path.exists("/proc/sys/net/mptcp"), reason="no Multipath TCP in this kernel"
    ),
]
SECOND = {SERVER: "198.51.100.1", CLIENT: "198.51.100.2"}  # RFC 5737
SIZE = 512 << 20
LINKS = {SERVER: "wserver", CLIENT: "wclient"}


@pytest.fixture
def two_links(plain: Bench) -> Iterator[Bench]:
    """A second veth pair; the server announces its address, and the client uses it."""
    names = plain.pair.names
    netns.ip("link", "add", LINKS[SERVER], "netns", names[SERVER], "type", "veth",
             "peer", "name", LINKS[CLIENT], "netns", names[CLIENT])  # fmt: skip
    for host, name in names.items():
        netns.ip("-n", name, "address", "add", f"{SECOND[host]}/24", "dev", LINKS[host])
        netns.ip("-n", name, "link", "set", LINKS[host], "up")
        netns.ip("-n", name, "mptcp", "limits", "set", "subflow", "2", "add_addr_accepted", "2")
    netns.ip("-n", names[SERVER], "mptcp", "endpoint", "add", SECOND[SERVER], "signal")
    yield plain
    for name in names.values():
        netns.ip("-n", name, "mptcp", "endpoint", "flush")
    netns.ip("-n", names[SERVER], "link", "delete", LINKS[SERVER])


def received(bench: Bench, host: str, link: str) -> int:
    """Bytes received over a link."""
    shown = json.loads(
        netns.ip("-n", bench.pair.names[host], "-json", "-s", "link", "show", "dev", link)
    )
    return int(shown[0]["stats64"]["rx"]["bytes"])


@pytest.mark.parametrize("cut", ["first", "second"])
def test_a_session_goes_on_when_one_of_two_links_is_cut(two_links: Bench, cut: str) -> None:
    bench = two_links
    server, client = bench.tunnel("-mptcp")
    assert "connected over mptcp;" in server.log()
    eventually(lambda: received(bench, SERVER, LINKS[SERVER]) > 0, "the second path is there")
    bench.serve_traffic(SERVER, TUNNEL4[SERVER])
    link = bench.pair.links[CLIENT] if cut == "first" else LINKS[CLIENT]
    other = LINKS[SERVER] if cut == "first" else bench.pair.links[SERVER]
    result: list[dict[str, bool]] = []

    def transfer() -> None:
        result.append(bench.traffic(CLIENT, "send", TUNNEL4[SERVER], "5001", str(SIZE)))

    thread = threading.Thread(target=transfer)
    thread.start()
    links = [bench.pair.links[SERVER], LINKS[SERVER]]
    eventually(
        lambda: sum(received(bench, SERVER, each) for each in links) > SIZE // 16, "the middle"
    )
    assert thread.is_alive(), "the cut comes in the middle"
    before = received(bench, SERVER, other)
    with bench.link_down(CLIENT, link):
        thread.join(60)
        assert result
        assert result[0]["whole"]
        assert received(bench, SERVER, other) - before > 100 << 20, "the other link took over"
    for end in (server, client):
        assert "disconnected" not in end.log()
        assert end.log().count("authenticated") == 1
    bench.answers()
