"""The benchmark runs, counts what it says it counts, and refuses what it cannot do."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from tunnel import CLIENT, PROGRAM, SERVER, TUNNEL4, Bench, eventually

from ttun import cli
from ttun.cipher import CIPHERS, fast
from ttun.errors import TtunError, UsageError
from ttun.lab import bench, bench_link, link_report, netns, table, targets
from ttun.lab.bench import COLUMNS
from ttun.lab.demo import end
from ttun.lab.link_emulator import Link, LinkedHosts

PORT = "5001"


def test_codec_has_a_line_for_each_cipher() -> None:
    done = subprocess.run(
        [*PROGRAM, "bench", "codec"], capture_output=True, text=True, check=True, timeout=60
    )
    rows = [line.split() for line in done.stdout.splitlines()]
    figures = {name: [row[1:] for row in rows if row[:1] == [name]] for name in CIPHERS}
    for sealed, opened in figures.values():
        assert len(sealed) == len(opened) == len(bench.SIZES)
        assert all(float(figure) > 0 for figure in sealed + opened)
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert [f"... {name}" for name in CIPHERS] == done.stderr.splitlines()


@pytest.mark.hosts
@pytest.mark.slow
def test_tunnel_measures_everything_of_every_target(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    me = " ".join(PROGRAM)
    other = f"{me} server -k x :: {me} client -k x -s {{peer}}"
    done = subprocess.run(
        [*PROGRAM, "bench", "tunnel", "--rounds", "1", "--seconds", "0.03", "--json", str(report),
         "--against", other],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "round 1 of 1: no tunnel" in done.stderr
    medians = json.loads(report.read_text())["medians"]
    assert len(medians) == 2 + len(fast()) + len([c for c in fast() if c.tag_size == 16])
    for name, figures in medians.items():
        assert set(figures) == set(COLUMNS)
        assert all(figures[column] > 0 for column in ("up", "down_8", "datagrams", "ping"))
        assert (figures["memory"] > 0) == (name != "no tunnel")
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    for name in medians:
        assert sum(line.startswith(f"{name} ") for line in lines) >= 2, "a line in each table"


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


@pytest.mark.hosts
@pytest.mark.slow
def test_link_measures_everything_of_every_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_link, "PINGS", 50)
    monkeypatch.setattr(bench_link, "PAUSE", 0.1)
    report = tmp_path / "report.json"
    me = " ".join(PROGRAM)
    other = f"other={me} server -k x :: {me} client -k x -s {{peer}}"
    line = ["bench", "link", "--rate", "20/5", "--rtt", "20", "--rounds", "1",
            "--seconds", "0.5", "--json", str(report), "--against", other]  # fmt: skip
    assert cli.main(line) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    assert max(len(line) for line in shown.splitlines()) <= 80
    told = json.loads(report.read_text())
    assert (told["link"]["rate"], told["link"]["rate_up"], told["failures"]) == (20, 5, [])
    (result,) = told["results"]
    assert list(result["summary"]) == ["no tunnel, cubic", "no tunnel, bbr", "ttun", "other"]
    for name, found in result["summary"].items():
        assert 0.2 < found["goodput"]["up_1"] <= 5
        assert 0.5 < found["goodput"]["down_8"] <= 21
        for beside in ("idle", "down", "up"):
            assert found[f"ping_{beside}"]["number"] == 50
            assert 20 <= found[f"ping_{beside}"]["median"] <= found[f"ping_{beside}"]["p99"]
        assert found["fetch_idle"]["median"] > 60, "20 ms to dial, 20 for the first byte, and more"
        assert name in shown


@pytest.mark.hosts
@pytest.mark.slow
@pytest.mark.skipif("TTUN_TEST_LONG" not in os.environ, reason="TTUN_TEST_LONG is not set")
def test_link_with_several_losses_measures_goodput_over_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.json"
    plan = bench_link.Plan(Link(20, None, 40), bench_link.parse_losses("0,5"), 1, 0.4, "cubic")
    assert bench_link.run(plan, [], str(report)) == 0
    clean, lossy = json.loads(report.read_text())["results"]
    for name in ("no tunnel, cubic", "ttun"):
        better, worse = (each["summary"][name]["goodput"]["down_1"] for each in (clean, lossy))
        assert better > 2 * worse
        assert set(clean["summary"][name]) == {"goodput"}
    assert "0 %     5 %" in capsys.readouterr().out


@pytest.mark.hosts
@pytest.mark.parametrize("way", ["default", "route"])
def test_connections_of_other_tunnels_have_the_hosts_congestion_control(way: str) -> None:
    with LinkedHosts(Link()) as pair:
        if way == "default":
            assert bench_link._set_default(pair, "reno"), "every machine allows that"
        else:
            bench_link._set_on_route(pair, "reno")
        server = pair.start(
            SERVER, netns.python("ttun.lab.link_traffic", "serve", netns.IPV4[SERVER], PORT),
            environment=netns.environment(), stdout=subprocess.PIPE,
        )  # fmt: skip
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        load = netns.python("ttun.lab.link_traffic", "down", netns.IPV4[SERVER], PORT, "1", "30")
        client = pair.start(
            CLIENT, load, environment=netns.environment(), stdout=subprocess.DEVNULL
        )
        try:
            for host in (SERVER, CLIENT):
                command = pair.command(host, ["ss", "-tinH", "state", "established"])
                eventually(
                    lambda command=command: " reno " in subprocess.run(
                        command, capture_output=True, text=True, check=True
                    ).stdout,
                    f"reno on the {host}",
                )  # fmt: skip
        finally:
            end(client)
            end(server)
            server.stdout.close()


def test_percentiles_are_of_what_was_answered() -> None:
    times = [*(number / 1000 for number in range(1, 101)), *[None] * 25]
    figures = bench_link.Figures({"up_1": 5e6}, {"idle": times}, {"idle": [None]})
    found = link_report.summary([figures, bench_link.Figures({"up_1": 7e6}, {"idle": times[:50]},
                                                             {"idle": [None]})])  # fmt: skip
    assert found["goodput"]["up_1"] == 6
    assert found["ping_idle"]["median"] == 38
    assert found["ping_idle"]["p99"] == 99
    assert found["ping_idle"]["lost"] == pytest.approx(100 * 25 / 175)
    assert found["fetch_idle"]["median"] == float("inf")


@pytest.mark.parametrize("columns", [80, 120, 400])
def test_tables_fit_the_terminal_whatever_the_names(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    times: list[float | None] = [0.04]
    figures = bench_link.Figures(
        dict.fromkeys(link_report.GOODPUT, 1e6), dict.fromkeys(link_report.BESIDE, times),
        {"idle": times},
    )  # fmt: skip
    for name in ("ttun", 90 * "n"):
        summary = {name: link_report.summary([figures])}
        for losses in ([0.0], [0, 0.03, 0.1, 0.3, 1, 3]):
            shown = link_report.render(["a link"], losses, [summary] * len(losses))
            assert max(map(len, shown.splitlines())) <= columns
        shown = bench._tables({name: dict.fromkeys(COLUMNS, 123456.7)})
        assert max(map(len, shown.splitlines())) <= columns
        assert len(shown.split("\n\n")) == 1 or columns < 400, "side by side where there is room"


def test_a_tables_rows_are_names_and_a_missing_figure_is_a_dash() -> None:
    groups = [table.Group("first", ["a", "b"], {"one": ["1", "2"], "two": ["3", "4"]}),
              table.Group("a longer title", ["c"], {"two": ["5"]})]  # fmt: skip
    assert table.render(groups).splitlines() == [
        "     first             a longer title",
        "          a       b         c",
        "one       1       2         -",
        "two       3       4         5",
    ]


def test_columns_of_tables_below_each_other_line_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    rows = {"one": ["1", "2"]}
    titles = ("short", "quite a long title")
    shown = table.render([table.Group(title, ["a", "b"], rows) for title in titles])
    first, second = (block.splitlines()[1:] for block in shown.split("\n\n"))
    assert first == second


def test_what_a_target_cannot_have_is_a_dash() -> None:
    assert bench._cell("memory", 0) == bench._cell("ping", float("inf")) == "-"
    assert bench._cell("datagram_loss", 0) == "0.000"


def test_a_target_has_the_name_that_it_is_given() -> None:
    named = targets.competitor("Go-ttun=sh server :: sh client -s {peer}:1")
    assert (named.name, targets.competitor("sh a=b :: sh").name) == ("Go-ttun", "sh")


def test_bad_competitors_are_a_line() -> None:
    with pytest.raises(UsageError, match="openvpn, wireguard-go or"):
        targets.competitor("tinc")
    with pytest.raises(UsageError, match="a command is missing"):
        targets.competitor(":: client")
    with pytest.raises(TtunError, match="no-such-program is not installed"):
        targets.competitor("no-such-program a :: no-such-program b")
