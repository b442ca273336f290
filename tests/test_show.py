"""``ttun show``: a running tunnel answers, in every form, and only to its owner."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from impostor import Place, line, made
from screen import uncolored, written
from tunnel import CLIENT, PROGRAM, SERVER, TUNNEL4, Bench, eventually

from ttun.commands import show
from ttun.lab import netns

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
        """What both ends answer, once they have counted all that was sent."""
        found = {"client": client.status(), "server": server.status()}
        if found["client"]["totals"]["uplink_bytes"] <= 1 << 20:
            return None
        if found["server"]["totals"]["downlink_bytes"] <= 1 << 20:
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
    assert f"protocol: {bench.wire}, {bench.cipher}" in text
    metrics = shown(bench, "--prometheus")
    netns = f'netns="{bench.pair.names[CLIENT]}"'
    assert f'ttun_connected{{device="ttun0",role="client",{netns}}} 1' in metrics
    assert 'ttun_connected{device="ttun0",role="server"} 1' in metrics
    for text in metrics.splitlines():
        assert re.fullmatch(r"# (HELP|TYPE) ttun_\w+ .+|ttun_\w+\{[^}]+\} [0-9.e+-]+", text), text
    client.process.send_signal(signal.SIGUSR1)
    said = client.says("status:")
    assert "status: ttun0: client; peer: 192.0.2.1:20203 over tcp; protocol: " in said
    assert bench.ping(CLIENT, TUNNEL4[SERVER]) == 1, "it goes on"


@pytest.mark.hosts
def test_totals_go_on_over_sessions(bench: Bench) -> None:
    server = bench.server()
    carried = 0
    for number in range(2):
        client = bench.client()
        client.says("authenticated")
        bench.answers()
        assert client.stop() == 0
        server.says("disconnected", times=number + 1)
        answer = server.status()
        assert (answer["role"], answer["peer"], answer["sessions"]) == ("server", None, number + 1)
        assert answer["totals"]["downlink_packets"] > carried
        carried = answer["totals"]["downlink_packets"]
    assert "reconnects: 1" in shown(bench)


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
    load = netns.python("ttun.lab.traffic", "flood", TUNNEL4[SERVER], PORT, "1", "60")
    bench.helpers.append(
        bench.pair.start(CLIENT, load, environment=netns.environment(), stdout=subprocess.PIPE)
    )
    end = time.monotonic() + 20
    for shows in watching.stdout:
        if shows.startswith("  downlink") and "bit/s" in shows and "█" in shows:
            break
        assert time.monotonic() < end, "no graph"
    watching.send_signal(signal.SIGINT)
    assert watching.wait(10) == 0


@pytest.mark.hosts
def test_tunnels_that_look_alike_are_told_apart(plain: Bench) -> None:
    """Two hosts, and on each a server with a device ttun0."""
    servers = [plain.start(host, "server", "-k", "secret") for host in (SERVER, CLIENT)]
    for server in servers:
        server.says("listening on")
        server.status()
    names = [plain.pair.names[host] for host in (SERVER, CLIENT)]
    found = sorted(re.findall(r"^ttun0: server(.*)$", shown(plain, "ttun0"), re.M))
    expected = [f", netns {name}, pid {server.process.pid}" for name, server in zip(names, servers)]
    assert found == sorted(expected)
    series = shown(plain, "--prometheus").splitlines()
    assert {text for text in series if text.startswith("ttun_connected")} == {
        'ttun_connected{device="ttun0",role="server"} 0',  # on the host that was asked
        f'ttun_connected{{device="ttun0",role="server",netns="{names[1]}"}} 0',
    }
    tunnels = {tunnel["pid"]: tunnel for tunnel in json.loads(shown(plain, "--json"))}
    for host, server in zip((SERVER, CLIENT), servers):
        netns = plain.on(host, lambda: os.stat("/proc/thread-self/ns/net").st_ino)
        assert tunnels[server.process.pid]["netns"] == netns


def test_rates_of_tunnels_that_look_alike_are_not_mixed(place: Place) -> None:
    totals = {**made()["totals"], "uplink_bytes": 10**15}
    place.answer("a.sock", line(netns=1))
    place.answer("b.sock", line(netns=2, totals=totals))
    out = place.watch("  uplink ", 6)
    assert out.count("ttun0: server, netns 1, pid ") >= 2
    rates = re.findall(r"^  uplink +([0-9.]+) bit/s", out, re.M)
    assert len(rates) >= 4 and set(rates) == {"0.0"}, out


def test_watching_says_once_what_is_skipped(place: Place) -> None:
    place.answer("a.sock", b"nonsense")
    place.answer("b.sock", line())
    out = place.watch("ttun0: server", 3)
    assert out.count("skipped") == 1


def test_the_graph_is_as_high_as_its_values() -> None:
    assert show.graph([0, 1, 2, 4, 8], 8).strip() == "▁▂▄█"
    assert len(show.graph([5] * 10, 5)) == show.GRAPH_WIDTH


def test_a_rate_of_any_size_stands_apart_and_in_the_same_column() -> None:
    rates = show._Rates()
    total = {"uplink_bytes": 0, "downlink_bytes": 0}
    rates.add(0.0, total)
    rates.add(1.0, {"uplink_bytes": 2_900_000_000, "downlink_bytes": 0})
    uplink, downlink = rates.lines(80)
    assert uplink.startswith("  uplink    23.20 Gbit/s  ")
    assert downlink.startswith("  downlink     0.0 bit/s  ")
    assert len(uplink) == len(downlink) == 80
    rates.add(2.0, {"uplink_bytes": 2_900_000_000, "downlink_bytes": 2_900_000_000})
    assert rates.lines(200)[1].startswith("  downlink  23.20 Gbit/s  ")
    assert [len(text) for text in rates.lines(200)] == [86, 86], "a minute, and no more"


def on_a_terminal(place: Place, *options: str, columns: int = 80, rows: int = 24) -> str:
    command = [*PROGRAM, "show", *options]
    until = 2 if "--watch" in options else 0
    own = {name: place.environment[name] for name in ("XDG_RUNTIME_DIR", "LC_ALL")}
    return written(command, columns, rows, until=until, **own)


def test_a_terminal_wraps_what_is_wider_and_colors_states(place: Place) -> None:
    peer = f"tox:{'0123456789ABCDEF' * 5}"
    missing = [f"route 203.0.{number}.0/24 missing" for number in range(9)]
    place.answer("a.sock", line(peer=peer, missing=missing))
    place.answer("b.sock", line(peer=None, device="ttun1"))
    text = on_a_terminal(place)
    for state in ("\033[32m  connected\033[0m: ", "\033[35m  not connected\033[0m\n",
                  "\033[31m  device\033[0m: route 203.0.0.0/24 missing"):  # fmt: skip
        assert state in text
    lines = uncolored(text).splitlines()
    assert all(len(each) <= 80 for each in lines if peer not in each)
    piped = place.show()[0]
    assert " ".join(uncolored(text).split()) == " ".join(piped.split())
    assert ", ".join(missing) in piped and "\033" not in piped, "lines of a pipe stay whole"


@pytest.mark.parametrize(("tunnels", "lines_of_each"), [(1, 9), (5, 2)])
def test_watch_fits_the_terminal(place: Place, tunnels: int, lines_of_each: int) -> None:
    for number in range(tunnels):
        place.answer(f"{number}.sock", line(device=f"ttun{number}"))
    *_, before, _ = on_a_terminal(place, "--watch").split(show.CLEAR)
    lines = uncolored(before).splitlines()
    assert tunnels * lines_of_each <= len(lines) < 24
    assert max(map(len, lines)) <= 80
    for number in range(tunnels):
        assert any(each.startswith(f"ttun{number}: server") for each in lines)
    assert sum("uplink " in each and "bit/s" in each for each in lines) == tunnels


def test_watch_says_how_many_tunnels_do_not_fit(place: Place) -> None:
    for number in range(30):
        place.answer(f"{number}.sock", line(device=f"ttun{number}"))
    *_, before, _ = on_a_terminal(place, "--watch", rows=12).split(show.CLEAR)
    lines = uncolored(before).splitlines()
    assert len(lines) == 11
    assert lines[-1] == "and 25 more (ttun show --watch DEVICE shows one)"


@pytest.mark.hosts
def test_the_tests_see_no_tunnel_of_this_machine() -> None:
    """Whoever runs the tests may have a tunnel running, or a dead one's socket in /run/ttun."""
    try:
        outside = Path(f"/proc/{os.getppid()}/root/run").stat().st_dev
    except PermissionError:
        pytest.skip("in a user namespace this process may not look at its parent")
    assert Path("/run").stat().st_dev != outside
