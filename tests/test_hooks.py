"""--up and --down: they run with the facts, in order, and hold nothing up."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tunnel import CLIENT, SERVER, TUNNEL4, Bench, eventually

pytestmark = [pytest.mark.hosts, pytest.mark.parametrize("bench", ["x1"], indirect=True)]


def test_they_run_with_the_facts_as_the_user_that_is_left(bench: Bench, tmp_path: Path) -> None:
    os.chmod(tmp_path, 0o777)
    for parent in tmp_path.parents:
        if os.stat(parent).st_uid == os.getuid() and parent != Path("/"):
            os.chmod(parent, os.stat(parent).st_mode | 0o011)
    said = tmp_path / "said"
    what = f'echo "$TTUN_ROLE $TTUN_DEVICE $TTUN_PEER $TTUN_WIRE $TTUN_LOCAL4" >> {said}'
    leaving = f'echo "down: $TTUN_REASON; key: $TTUN_PSK" >> {said}; exit 3'
    server = bench.server("--up", what, "--down", leaving)
    client = bench.client()
    client.says("authenticated")
    lines = eventually(lambda: said.exists() and said.read_text().splitlines(), "the hook ran")
    assert lines[0].startswith("server ttun0 192.0.2.2:")
    assert lines[0].endswith(" x1 10.1.1.1/30")
    client.stop()
    eventually(lambda: "down: the peer closed" in said.read_text(), "the other hook ran")
    assert said.read_text().endswith("key: \n")
    assert "exit code 3" in server.says("exit code")
    assert os.stat(said).st_uid != 0 or "cannot become" in server.log()


def test_a_slow_one_holds_up_neither_packets_nor_the_end(bench: Bench) -> None:
    server = bench.server("--up", "sleep 50")
    bench.client().says("authenticated")
    bench.answers()
    assert bench.ping(CLIENT, TUNNEL4[SERVER], 5) == 5
    server.process.terminate()
    assert server.ended(10) == 0
