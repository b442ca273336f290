"""What the status of a tunnel says; docs/status.md describes all of it; it fits a screen."""

from __future__ import annotations

import json
import os
import re

import pytest
from impostor import Place, line
from screen import uncolored, written
from tunnel import CLIENT, PROGRAM, ROOT, SERVER, Bench, eventually

from ttun.commands import answer, show
from ttun.record import in_tunnel
from ttun.session import Counters
from ttun.settings import CLIENT as CLIENT_DEFAULTS
from ttun.settings import Addresses

DOC = (ROOT / "docs" / "status.md").read_text()
TYPES = {"number": (int, float), "string": (str,), "object": (dict,), "list of strings": (list,)}


def rows(section: str) -> list[list[str]]:
    """The cells of the tables of a section, without the heads."""
    text = DOC.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]


def test_the_page_describes_each_field_of_its_format(place: Place) -> None:
    texts = {name: "x" for name in answer.FIELDS if name in ("peer4", "peer6", "local4", "local6")}
    numbers = {"congestion_control": "bbr", "retransmitted": 0.5, "mtu": 1280}
    failure = {"last_failure": "x", "last_failure_ago": 1.5}
    place.answer("a.sock", line(**texts, **numbers, **failure))
    (tunnel,) = json.loads(place.show("--json")[0])
    assert tunnel.keys() == {*answer.FIELDS, "uid"}
    described = {
        name: cells[1]
        for cells in rows("JSON")
        if len(cells) == 3
        for name in re.findall(r"`(\w+)`", cells[0])
    }
    assert described.keys() == tunnel.keys()
    for name, kind in described.items():
        assert isinstance(tunnel[name], TYPES[kind]), name
    counted = [
        n for cells in rows("JSON") if len(cells) == 2 for n in re.findall(r"`(\w+)`", cells[0])
    ]
    assert sorted(counted) == sorted(Counters._fields) == sorted(tunnel["totals"])
    assert f"describes format {answer.FORMAT}." in DOC and tunnel["format"] == answer.FORMAT


def test_the_page_has_each_metric(place: Place) -> None:
    place.answer("a.sock", line())
    metrics = set(re.findall(r"^# TYPE (\w+) ", place.show("--prometheus")[0], re.M))
    assert {
        name for cells in rows("Prometheus") for name in re.findall(r"`(ttun_\w+)`", cells[0])
    } == metrics


def test_json_is_a_list_also_where_there_is_no_tunnel(place: Place) -> None:
    for options in ((), ("ttun7",)):
        code, out, err = place.run("--json", *options)
        assert (code, json.loads(out)) == (1, [])
        assert err.startswith("ttun: no tunnel is running") and err.count("\n") == 1
    assert place.run()[:2] == (1, "")


@pytest.mark.parametrize(
    ("local", "peer", "other"),
    [
        ("10.1.1.1/30", None, "10.1.1.2"),
        ("10.1.1.6/30", None, "10.1.1.5"),
        ("10.1.1.4/30", None, None),
        ("10.1.1.4/31", None, "10.1.1.5"),
        ("10.1.1.1/24", None, None),
        ("10.1.1.1/32", "10.9.9.9", "10.9.9.9"),
    ],
)
def test_the_address_of_the_peer_is_the_other_one_of_two(
    local: str, peer: str | None, other: str | None
) -> None:
    class Fake:
        name, mtu, has_ipv6 = "ttun0", 1280, False
        addresses = Addresses.parse(CLIENT_DEFAULTS, local4=local, peer4=peer)

    shown = {"device": "ttun0", "mtu": 1280, "local4": local, "peer4": other}
    assert in_tunnel(Fake()) == shown  # type: ignore[arg-type]
    Fake.has_ipv6 = True
    found = in_tunnel(Fake())  # type: ignore[arg-type]
    assert (found["local6"], found["peer6"]) == ("fc11::2/126", "fc11::1")


@pytest.mark.hosts
def test_both_ends_say_who_they_are_and_what_they_connect(plain: Bench) -> None:
    server, client = plain.tunnel("-mtu", "1400")
    for end, host, role in ((server, SERVER, "server"), (client, CLIENT, "client")):
        eventually(lambda end=end: end.status()["peer"], "its session is recorded")
        found = end.status()
        inode = plain.on(host, lambda: os.stat("/proc/thread-self/ns/net").st_ino)
        assert (found["pid"], found["netns"], found["mtu"]) == (end.process.pid, inode, 1400)
        n, m = (1, 2) if role == "server" else (2, 1)
        assert (found["local4"], found["peer4"]) == (f"10.1.1.{n}/30", f"10.1.1.{m}")
        assert (found["local6"], found["peer6"]) == (f"fc11::{n}/126", f"fc11::{m}")
        assert found["uptime"] >= found["connected_for"] > 0
        assert (found["failed_attempts"], found["last_failure"]) == (0, None)
        assert found["congestion_control"] and 0 <= (found["retransmitted"] or 0) <= 1
    assert server.status()["endpoint"] == "[::]:20203 (tcp and mptcp)"
    assert client.status()["endpoint"] == "192.0.2.1:20203"
    text = plain.run(SERVER, *PROGRAM, "show")
    assert "  listening on: [::]:20203 (tcp and mptcp)\n" in text
    assert "  addresses: 10.1.1.1/30 fc11::1/126, peer 10.1.1.2 fc11::2, MTU 1400\n" in text
    name = plain.pair.names[CLIENT]
    assert f"  process: {client.process.pid}, network namespace {name}, running for " in text


@pytest.mark.hosts
def test_without_ipv6_in_the_tunnel_there_are_no_ipv6_addresses(plain: Bench) -> None:
    found = plain.server("-mtu", "1000", "--local4", "10.7.0.1/24").status()
    assert [found[f"{who}{v}"] for who in ("local", "peer") for v in "46"] == [
        "10.7.0.1/24", None, None, None,
    ]  # fmt: skip


@pytest.mark.hosts
def test_a_client_that_cannot_connect_says_why_and_how_often(plain: Bench) -> None:
    client = plain.client()
    client.says("cannot connect to", times=2)
    found = client.status()
    assert found["failed_attempts"] >= 2 and 0 <= found["last_failure_ago"] < 60
    assert found["last_failure"] == "Connection refused"
    text = plain.run(SERVER, *PROGRAM, "show")
    assert re.search(
        r"\n  not connected\n  failed attempts: \d+, the last [\d.]+ s ago: .*Connection refused\n"
        r"  server: 192.0.2.1:20203\n", text
    )  # fmt: skip
    plain.server()
    eventually(lambda: client.status()["peer"], "a session", 60)
    assert (client.status()["failed_attempts"], client.status()["last_failure"]) == (0, None)


@pytest.mark.hosts
def test_a_server_says_why_a_handshake_failed_and_why_a_session_ended(plain: Bench) -> None:
    server = plain.server()
    other = plain.client(key="another")
    server.says("failed: ")
    found = server.status()
    assert found["failed_attempts"] >= 1
    assert found["last_failure"].startswith("handshake with 192.0.2.2:")
    assert other.stop() == 0
    client = plain.client()
    client.says("authenticated")
    assert client.stop() == 0
    found = eventually(lambda: server.status()["peer"] is None and server.status(), "its end")
    assert (found["failed_attempts"], found["last_failure"]) == (
        0,
        "the peer closed the connection",
    )
    assert re.search(
        r"  last session: ended [\d.]+ s ago: the peer closed", plain.run(SERVER, *PROGRAM, "show")
    )


@pytest.mark.hosts
def test_no_key_and_no_password_is_in_the_status(plain: Bench) -> None:
    """Nor in what it says of an attempt that failed."""
    key = "a key that nobody knows"
    server, client = plain.server(key=key), plain.client(key="another key, as long")
    server.says("failed: ")
    for end in (server, client):
        said = json.dumps(end.status())
        assert key not in said and "another key" not in said


def screen(place: Place, columns: int, rows: int) -> list[str]:
    """The lines of the second picture of ``ttun show --watch`` on a terminal."""
    own = {name: place.environment[name] for name in ("XDG_RUNTIME_DIR", "LC_ALL")}
    pictures = written([*PROGRAM, "show", "--watch"], columns, rows, until=2, **own)
    return uncolored(pictures.split(show.CLEAR)[2]).rstrip("\n").split("\n")


def cells(text: str) -> int:
    return sum(
        2 if "\u1100" <= c <= "\uff60" and not "\u2580" <= c <= "\u259f" else 1 for c in text
    )


@pytest.mark.parametrize(("columns", "rows"), [(80, 24), (80, 60), (120, 40)])
@pytest.mark.parametrize("count", [1, 4])
def test_watch_fits_the_screen_whatever_a_tunnel_says(
    place: Place, columns: int, rows: int, count: int
) -> None:
    """Also the ID of a Tox peer, an IPv6 address with a zone, and characters of two columns."""
    long = {
        "device": "日本語日本", "peer": f"tox:{'A' * 76}", "endpoint": f"tox:{'A' * 76}",
        "last_failure": "[2001:db8:1234:5678:9abc:def0:1234:5678]:20203: Connection refused " * 3,
        "last_failure_ago": 3, "failed_attempts": 12, "cipher": "x" * 100,
        "missing": ["route 2001:db8:1234:5678::/64 missing"] * 3,
    }  # fmt: skip
    for number in range(count):
        place.answer(f"{number}.sock", line(**long, netns=number + 1))
    picture = screen(place, columns, rows)
    assert max(map(cells, picture)) <= columns, picture
    if count > 1 or rows > 24:
        assert len(picture) < rows
    assert any("uplink" in text for text in picture)
    piped = place.watch("uplink", 2 * count)
    assert max(map(cells, piped.splitlines())) <= 80
