"""``ttun show``: a running tunnel answers, in every form, and only to its owner."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import subprocess
import time
from pathlib import Path

import pytest
from tunnel import CLIENT, PROGRAM, SERVER, TUNNEL4, Bench, eventually

from ttun import show, status
from ttun.errors import TtunError

PORT = "5001"


def shown(bench: Bench, *options: str) -> str:
    return bench.run(SERVER, *PROGRAM, "show", *options)


@pytest.mark.hosts
def test_a_tunnel_answers_in_every_form(bench: Bench) -> None:
    server, client = bench.tunnel()
    bench.serve_traffic(SERVER, TUNNEL4[SERVER])
    bench.traffic(CLIENT, "send", TUNNEL4[SERVER], PORT, str(1 << 20))
    if bench.wire == "x1":
        eventually(lambda: "round trip: " in shown(bench), "a round trip")

    def both() -> dict[str, dict] | None:
        """What both ends answer, once they have counted all that was sent.

        Asked one by one: other tunnels may run on this machine.
        """
        found = {
            role: status.ask(Path(f"/run/ttun/ttun0.{end.process.pid}.sock"))
            for role, end in (("client", client), ("server", server))
        }
        if not found["client"] or found["client"]["totals"]["uplink_bytes"] <= 1 << 20:
            return None
        if not found["server"] or found["server"]["totals"]["downlink_bytes"] <= 1 << 20:
            return None
        return found

    tunnels = eventually(both, "both ends have counted")
    tunnel = tunnels["client"]
    assert (tunnel["device"], tunnel["peer"]) == ("ttun0", "192.0.2.1:20203")
    assert (tunnel["wire"], tunnel["cipher"]) == (bench.wire, bench.cipher)
    assert tunnel["silent_for"] < 60 and tunnel["connected_for"] > 0
    roles = {tunnel["role"] for tunnel in json.loads(shown(bench, "--json"))}
    assert roles == {"client", "server"}
    text = shown(bench, "ttun0")
    assert "ttun0: client\n  peer: 192.0.2.1:20203 over tcp\n" in text
    assert f"wire: {bench.wire}, {bench.cipher}" in text
    metrics = shown(bench, "--prometheus")
    assert 'ttun_connected{device="ttun0",role="client"} 1' in metrics
    assert 'ttun_connected{device="ttun0",role="server"} 1' in metrics
    for line in metrics.splitlines():
        assert re.fullmatch(r"# (HELP|TYPE) ttun_\w+ .+|ttun_\w+\{[^}]+\} [0-9.e+-]+", line), line
    client.process.send_signal(signal.SIGUSR1)
    assert "status: ttun0: client; peer: 192.0.2.1:20203 over tcp; wire" in client.says("status:")
    assert bench.ping(CLIENT, TUNNEL4[SERVER]) == 1, "it goes on"


@pytest.mark.hosts
def test_totals_go_on_over_sessions_and_only_the_owner_may_ask(bench: Bench) -> None:
    server = bench.server()
    path = Path(f"/run/ttun/ttun0.{server.process.pid}.sock")
    carried = 0
    for number in range(2):
        client = bench.client()
        client.says("authenticated")
        bench.answers()
        assert client.stop() == 0
        server.says("disconnected", times=number + 1)
        answer = status.ask(path)
        assert answer is not None
        assert (answer["role"], answer["peer"], answer["sessions"]) == ("server", None, number + 1)
        assert answer["totals"]["downlink_packets"] > carried
        carried = answer["totals"]["downlink_packets"]
    mode = os.stat(path).st_mode
    assert stat.S_ISSOCK(mode) and stat.S_IMODE(mode) == 0o600
    assert "reconnects: 1" in shown(bench)
    server.kill()
    bench.server()
    assert not path.exists(), "what is left behind is removed by the next one"


@pytest.mark.hosts
def test_watch_shows_rates(bench: Bench) -> None:
    bench.tunnel()
    bench.serve_traffic(SERVER, TUNNEL4[SERVER])
    watching = bench.pair.start(
        SERVER, [*PROGRAM, "show", "--watch"], stdout=subprocess.PIPE,
        environment={"PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    bench.helpers.append(watching)
    assert watching.stdout is not None
    end = time.monotonic() + 20
    while time.monotonic() < end:
        bench.traffic(CLIENT, "send", TUNNEL4[SERVER], PORT, str(8 << 20))
        line = watching.stdout.readline()
        if line.startswith("  sending") and "bit/s" in line and "█" in line:
            break
    else:
        pytest.fail("no graph")
    watching.send_signal(signal.SIGINT)
    assert watching.wait(10) == 0


def test_without_a_tunnel_it_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "directories", lambda: [tmp_path])
    with pytest.raises(TtunError, match="no tunnel runs here on ttun7"):
        show.find("ttun7")
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(tmp_path / "ttun0.sock"))  # of a program that was killed
    left.close()
    with pytest.raises(TtunError, match="no tunnel runs here"):
        show.find(None)


def test_a_place_that_cannot_be_written_to_is_no_trouble(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "directories", lambda: [tmp_path / "missing" / "deeper"])
    silent = status.StatusSocket("ttun0")
    silent.serve(lambda: pytest.fail("nobody can ask"))
    silent.close()


def test_somebody_who_asks_and_says_nothing_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "directories", lambda: [tmp_path])
    import ttun

    endpoint = ttun.Server(b"key")
    listening = status.StatusSocket("ttun0")
    listening.serve(endpoint.status)
    path = tmp_path / f"ttun0.{os.getpid()}.sock"
    silent = [socket.socket(socket.AF_UNIX) for _ in range(5)]
    for sock in silent:
        sock.connect(str(path))
    answer = eventually(lambda: status.ask(path), "an answer")
    assert answer["device"] is None and answer["totals"]["forged"] == 0
    for sock in silent:
        sock.close()
    listening.close()
    assert not path.exists()


def test_the_graph_is_as_high_as_its_values() -> None:
    assert show.graph([0, 1, 2, 4, 8], 8).strip() == "▁▂▄█"
    assert len(show.graph([5] * 10, 5)) == show.GRAPH_WIDTH


def test_a_rate_of_any_size_stands_apart_and_in_the_same_column() -> None:
    rates = show._Rates()
    total = {"uplink_bytes": 0, "downlink_bytes": 0}
    rates.add(0.0, total)
    rates.add(1.0, {"uplink_bytes": 2_900_000_000, "downlink_bytes": 0})
    sending, receiving = rates.lines()
    assert sending.startswith("  sending   23.20 Gbit/s  ")
    assert receiving.startswith("  receiving    0.0 bit/s  ")
    assert len(sending) == len(receiving)
    rates.add(2.0, {"uplink_bytes": 2_900_000_000, "downlink_bytes": 2_900_000_000})
    assert rates.lines()[1].startswith("  receiving 23.20 Gbit/s  ")


@pytest.mark.hosts
def test_the_tests_see_no_tunnel_of_this_machine() -> None:
    """Whoever runs the tests may have a tunnel running, or a dead one's socket in /run/ttun."""
    try:
        outside = Path(f"/proc/{os.getppid()}/root/run").stat().st_dev
    except PermissionError:
        pytest.skip("in a user namespace this process may not look at its parent")
    assert Path("/run").stat().st_dev != outside
