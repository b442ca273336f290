"""Pictures show what a terminal shows; charts name what is better and the machine, in any light."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pictures
import pytest
from impostor import Place, line
from pictures import Screen, Span
from tunnel import ROOT


def shown(*texts: str, columns: int = 80) -> list[pictures.Line]:
    screen = Screen(columns)
    for text in texts:
        screen.feed(text)
    return screen.lines()


def test_a_line_is_rewritten_and_erased() -> None:
    assert shown("one two\rsix\033[K\r\n\r\nend") == [
        (Span(0, "six", ""),),
        (),
        (Span(0, "end", ""),),
    ]
    assert shown("abcdef\rxy") == [(Span(0, "xycdef", ""),)]
    assert shown("gone\r\n", "\r\033[K") == [(Span(0, "gone", ""),)]
    assert shown("a\r\nb\033[H\033[Jc") == [(Span(0, "c", ""),)], "as show --watch begins anew"


def test_a_sequence_may_come_in_two_parts_and_an_unknown_one_shows_nothing() -> None:
    assert shown("\033", "[?25", "lx") == [(Span(0, "x", ""),)]


def test_colors_and_wide_gaps_begin_a_span() -> None:
    assert shown("  \033[32mok\033[0m    tunnel up  \033[31m1\033[0m s") == [
        (Span(2, "ok", "green"), Span(8, "tunnel up", ""), Span(19, "1", "red"), Span(21, "s", "")),
    ]  # fmt: skip


def test_a_long_line_wraps() -> None:
    assert shown("abcdef", columns=4) == [(Span(0, "abcd", ""),), (Span(0, "ef", ""),)]


def test_a_command_is_recorded_and_drawn(tmp_path: Path) -> None:
    command = ["sh", "-c", "tput cols; printf '50 %%'; sleep 0.3; printf '\\r\\033[K<\\033[32mok'"]
    file = tmp_path / "a.svg"
    pictures.draw("try it", pictures.record(command, 20, 100), file, 100)
    svg = ElementTree.parse(file).getroot()
    spans = ["".join(text.itertext()) for text in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert spans == ["# try it", "100", "50 %", "<ok"]
    assert 'class="green"' in file.read_text()


def labels(file: Path) -> list[str]:
    root = ElementTree.parse(file).getroot()
    return [text.text or "" for text in root.iter("{http://www.w3.org/2000/svg}text")]


def test_charts_say_what_is_better_and_where_it_was_measured(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from ttun.lab import plot

    columns = [column for _, _, columns in plot.PANELS for column in columns]
    medians = {name: dict.fromkeys(columns, 5.0) for name in ("no tunnel", "ttun", "other")}
    plot.draw(medians, "a machine", tmp_path / "bars.svg")
    goodput = dict.fromkeys(("up_1", "down_1", "up_8", "down_8"), 5.0)
    summary = {"ttun": {"goodput": goodput}}
    plot.draw_link([0, 1], [summary] * 2, "a machine", tmp_path / "lines.svg")
    for name in ("bars", "lines"):
        texts = labels(tmp_path / f"{name}.svg")
        assert "prefers-color-scheme:dark" in (tmp_path / f"{name}.svg").read_text()
        assert "a machine" in texts
        assert sum("is better)" in text for text in texts) == 4


@pytest.mark.parametrize("name", ["performance", "loss"])
def test_charts_of_the_docs_are_legible_in_the_dark(name: str) -> None:
    text = (ROOT / "docs" / f"{name}.svg").read_text(encoding="utf-8")
    style = text.partition("<style>")[2].partition("</style>")[0]
    assert "prefers-color-scheme:dark" in style
    changed = set(re.findall(r": (#\w+)\"\]", style))
    used = set(re.findall(r"(?:fill|stroke): (#\w+)", text))
    black = {color for color in used if max(bytes.fromhex(color[1:])) < 0x60}
    white = {color for color in used if min(bytes.fromhex(color[1:])) > 0xB0}
    assert black | white <= changed, "everything but the series"
    texts = labels(ROOT / "docs" / f"{name}.svg")
    assert any("AMD EPYC" in each for each in texts)
    assert sum("is better)" in each for each in texts) == 4


def test_the_chart_of_the_docs_has_the_figures_of_their_table() -> None:
    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    expected = []
    for row in (
        "one stream up, Gbit/s",
        "one stream down, Gbit/s",
        "64-byte datagrams per second, flooded |",
        "CPU seconds per million 64-byte datagrams, evenly",
        "ping during one",
    ):
        (line,) = [each for each in page.splitlines() if each.startswith(f"| {row}")]
        expected += [float(cell.replace(",", "")) for cell in line.split("|")[3:-1]]
    texts = [each.replace(",", "") for each in labels(ROOT / "docs/performance.svg")]
    drawn = [float(each) for each in texts if re.fullmatch(r"[\d.]+", each)]
    assert drawn == pytest.approx(expected, abs=0.051)


def words_of(name: str) -> str:
    root = ElementTree.parse(ROOT / "docs" / f"{name}.svg").getroot()
    texts = root.iter("{http://www.w3.org/2000/svg}text")
    return "\n".join(" ".join(text.itertext()) for text in texts)


def test_the_pictures_of_the_readme_show_what_the_program_writes_today(place: Place) -> None:
    """Each label of the text of ttun show that the picture has a figure for; each row of demo."""
    place.answer("a.sock", line(role="client", endpoint="192.0.2.1:1", peer="192.0.2.1:1",
                                congestion_control="bbr", mtu=1280, uptime=1.0,
                                transport="tcp", wire="x1", cipher="c", round_trip=0.1,
                                connected_for=1.0, silent_for=1.0))  # fmt: skip
    shown = words_of("watch").replace(" :", ":")  # the colon has another color
    for label in re.findall(r"^  ([a-z ]+):", place.show()[0], re.M):
        assert f"{label}: " in shown, label
    demo = words_of("demo")
    for text in re.findall(r'steps\.next\("(.*)"\)', (ROOT / "ttun/lab/demo.py").read_text()):
        assert text in demo
    for host in ("server", "client"):
        assert f"ok {host} stopped cleanly exit code 0" in " ".join(demo.split())
    assert "One TCP stream: " in demo
