"""The benchmark runs, counts what it says it counts, and refuses what it cannot do."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from tunnel import CLIENT, PROGRAM, SERVER, TUNNEL4, Bench

from ttun import subjects
from ttun.bench import COLUMNS
from ttun.cipher import CIPHERS, fast
from ttun.errors import TtunError, UsageError

PORT = "5001"


def test_codec_has_a_line_for_each_cipher() -> None:
    done = subprocess.run(
        [*PROGRAM, "bench", "codec"], capture_output=True, text=True, check=True, timeout=60
    )
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(CIPHERS)
    assert all(float(figure) > 0 for figure in lines[1].split()[1:] if figure[0].isdigit())


@pytest.mark.hosts
def test_tunnel_measures_everything_of_every_subject(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    me = " ".join(PROGRAM)
    other = f"{me} server -k x :: {me} client -k x -s {{peer}}"
    done = subprocess.run(
        [*PROGRAM, "bench", "tunnel", "--rounds", "1", "--seconds", "0.2", "--json", str(report),
         "--against", other],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "round 1 of 1: no tunnel" in done.stderr
    medians = json.loads(report.read_text())["medians"]
    assert len(medians) == 2 + len(fast()) + len([c for c in fast() if c.tag_size == 16])
    for name, figures in medians.items():
        assert set(figures) == set(COLUMNS)
        assert all(figures[column] > 0 for column in ("up", "down_8", "datagrams", "ping"))
        assert (figures["memory"] > 0) == (name != "no tunnel")
        assert name in done.stdout


@pytest.mark.hosts
def test_traffic_counts_what_arrives(bench: Bench) -> None:
    bench.tunnel()
    bench.serve_traffic(SERVER, TUNNEL4[SERVER])
    address = TUNNEL4[SERVER]
    for action in ("flood", "drain"):
        for streams in ("1", "4"):
            rate = bench.traffic(CLIENT, action, address, PORT, streams, "0.3")
            assert 1e6 < rate < 1e12
    counted = bench.traffic(CLIENT, "datagrams", address, PORT, "64", "1000", "0.5")
    assert 100 < counted["sent"] <= 600
    assert 0 < counted["arrived"] <= counted["sent"]
    flooded = bench.traffic(CLIENT, "datagrams", address, PORT, "1200", "0", "0.3")
    assert flooded["sent"] > counted["sent"]


def test_bad_subjects_are_a_line() -> None:
    with pytest.raises(UsageError, match="openvpn, wireguard-go or"):
        subjects.against("tinc")
    with pytest.raises(UsageError, match="a command is missing"):
        subjects.against(":: client")
    with pytest.raises(TtunError, match="no-such-program is not installed"):
        subjects.against("no-such-program a :: no-such-program b")
