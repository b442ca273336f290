"""Two hosts on one private network, and no node to be introduced by: toxcore's local discovery."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from toxnet import SECRET
from tunnel import PROGRAM, eventually

from ttun.lab import netns

pytestmark = [pytest.mark.hosts, pytest.mark.tox, pytest.mark.slow]


def test_hosts_on_a_private_network_need_no_node(pair: netns.Hosts, tmp_path: Path) -> None:
    def start(host: str, *arguments: str) -> subprocess.Popen[str]:
        return pair.start(host, [*PROGRAM, "tox", "-s", SECRET, *arguments], stdout=subprocess.PIPE)

    for host, address in ((netns.SERVER, "10.7.7.1"), (netns.CLIENT, "10.7.7.2")):
        link = ["dev", pair.links[host]]
        netns.ip("-n", pair.names[host], "address", "add", f"{address}/24", "broadcast", "+", *link)
    server = start(netns.SERVER, "-C", str(tmp_path), "-I", str(tmp_path / "id"))
    try:
        identity = eventually(
            lambda: (tmp_path / "id").exists() and (tmp_path / "id").read_text().strip(), "its ID"
        )
        said, _ = start(netns.CLIENT, "-i", identity, "-p").communicate(timeout=110)
        assert said.startswith("pong in ")
    finally:
        server.terminate()
        server.wait(10)
        for host, address in ((netns.SERVER, "10.7.7.1"), (netns.CLIENT, "10.7.7.2")):
            link = ["dev", pair.links[host]]
            netns.ip("-n", pair.names[host], "address", "delete", f"{address}/24", *link)
