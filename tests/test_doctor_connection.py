"""``ttun doctor PEER``: the connection to a server, its path MTU, and what limits its speed."""

from __future__ import annotations

from pathlib import Path

import pytest
from doctor_report import changed, report
from machine import names
from tunnel import SERVER, Bench

from ttun import congestion
from ttun.commands import doctor_connection, path_mtu
from ttun.commands.doctor import FAIL, OK, SKIP, WARN
from ttun.lab import netns

hosts_only = pytest.mark.hosts


@hosts_only
@pytest.mark.parametrize("peer", ["192.0.2.1", "[2001:db8::1]"])
def test_a_peer_that_answers_and_how_large_a_packet_gets_there(bench: Bench, peer: str) -> None:
    bench.server()
    found = report(bench.pair, peer)
    assert found.code == 0
    assert found["server"] == (OK, f"{peer}:20203 accepts connections")
    assert found["path MTU"] == (OK, "1500 bytes")
    with changed(bench.pair, ["ip", "link", "set", "vclient", "mtu", "1400"],
                 ["ip", "link", "set", "vclient", "mtu", "1500"]):  # fmt: skip
        assert report(bench.pair, peer)["path MTU"] == (OK, "1400 bytes")


@hosts_only
@pytest.mark.nft
def test_a_path_that_drops_large_packets_silently(pair: netns.Hosts) -> None:
    table = "add table ip hole; add chain ip hole in { type filter hook input priority 0; };"
    rules = f"{table} add rule ip hole in ip length > 1300 drop"
    with changed(pair, ["nft", rules], ["nft", "delete table ip hole"], host=SERVER):
        mark, text = report(pair, "192.0.2.1")["path MTU"]
    assert mark == WARN
    passes = int(text.split()[0])
    assert 1300 - path_mtu.STEP <= passes <= 1300
    assert "larger packets, up to 1500, are silently dropped" in text
    assert "fix: sysctl net.ipv4.tcp_mtu_probing=1" in text


@hosts_only
def test_a_route_with_a_smaller_mtu_is_found(pair: netns.Hosts) -> None:
    route = ["ip", "route", "add", "192.0.2.1/32", "dev", "vclient", "mtu", "1380"]
    with changed(pair, route, ["ip", "route", "del", "192.0.2.1/32"]):
        assert report(pair, "192.0.2.1")["path MTU"] == (OK, "1380 bytes")


@hosts_only
@pytest.mark.nft
def test_a_peer_without_a_server_and_one_that_is_silent(pair: netns.Hosts) -> None:
    found = report(pair, "192.0.2.1:9")
    assert found.code == 1
    assert found["server"][0] == FAIL
    assert "192.0.2.1:9: Connection refused" in found["server"][1]
    assert "A tunnel cannot reach this server" in found.text.splitlines()[-1]
    hook = "type filter hook input priority 0; policy drop;"
    rules = f"add table ip hole; add chain ip hole in {{ {hook} }}"
    with changed(pair, ["nft", rules], ["nft", "delete table ip hole"], host=SERVER):
        found = report(pair, "192.0.2.1")
    assert "timed out" in found["server"][1]
    assert found["path MTU"] == (
        SKIP, "1500 bytes according to the kernel; the server answers no probe"
    )  # fmt: skip


@hosts_only
def test_a_name_that_nobody_has(pair: netns.Hosts) -> None:
    found = report(pair, "nobody.invalid")
    assert found.code == 1
    assert found["server"][1].startswith("nobody.invalid: ")
    assert "\nfix: check the name, and /etc/resolv.conf" in found["server"][1]
    assert found["path MTU"] == (SKIP, "not checked: no address")


@hosts_only
@pytest.mark.parametrize("peer", ["203.0.113.9", "[2001:db8:99::9]"])
def test_a_network_without_a_route(pair: netns.Hosts, peer: str) -> None:
    found = report(pair, peer)
    assert found.code == 1
    assert found["server"][1].startswith(f"{peer}:20203: Network is unreachable\n")
    assert "\nfix: check this machine's addresses and gateway" in found["server"][1]


@hosts_only
def test_the_path_is_that_to_the_address_which_accepts(bench: Bench, tmp_path: Path) -> None:
    bench.server()
    with names(tmp_path, **{"two.example": ["192.0.2.3", "192.0.2.1"]}):
        found = report(bench.pair, "two.example")
    assert found["server"] == (OK, "192.0.2.1:20203 accepts connections")
    assert found["path MTU"] == (OK, "1500 bytes")


@pytest.mark.parametrize(
    ("rtt", "wmem", "rmem", "mark", "found"),
    [
        (0.1, 4 << 20, 6 << 20, WARN, "168 Mbit/s at 100.0 ms (tcp_wmem: 4194304)"),
        (0.04, 4 << 20, 6 << 20, OK, "419 Mbit/s at 40.0 ms"),
        (0.1, 64 << 20, 128 << 10, WARN, "5 Mbit/s at 100.0 ms (tcp_rmem: 131072)"),
        (0.00001, 4 << 20, 6 << 20, OK, "at 0.0 ms"),
    ],
)
def test_buffers_that_limit_a_long_path_are_named_with_larger_ones(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    rtt: float,
    wmem: int,
    rmem: int,
    mark: str,
    found: str,
) -> None:
    monkeypatch.setattr(doctor_connection, "SYSCTL", tmp_path)
    for name, most in (("tcp_wmem", wmem), ("tcp_rmem", rmem)):
        (tmp_path / name).write_text(f"4096\t16384\t{most}\n")
    finding = doctor_connection.look_at_buffers(rtt)
    assert finding.mark == mark and found in finding.found
    if mark == WARN:
        needed = int(finding.fix.split('"')[1].split()[2])
        (tmp_path / finding.found.partition("(")[2].partition(":")[0]).write_text(
            f"4096 16384 {needed}"
        )
        assert doctor_connection.look_at_buffers(rtt).mark == OK, "the fix mends it"


def test_a_machine_whose_list_forbids_bbr_is_told_what_to_add(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor_connection, "SYSCTL", tmp_path)
    (tmp_path / "tcp_congestion_control").write_text("cubic\n")
    (tmp_path / "tcp_allowed_congestion_control").write_text("reno cubic\n")
    finding = doctor_connection.look_at_congestion_control()
    assert finding.mark == WARN and finding.effect.startswith("cubic treats each lost segment")
    if "root only" in finding.found:
        assert finding.fix == 'sysctl net.ipv4.tcp_allowed_congestion_control="reno cubic bbr"'


def test_a_kernel_without_bbr_is_told_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(congestion, "FAR", "nosuch")
    finding = doctor_connection.look_at_congestion_control()
    assert finding.mark == WARN and "kmod-tcp-bbr" in finding.fix
