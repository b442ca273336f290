"""``ttun doctor`` on hosts that lack something: the effect, and how to fix it."""

from __future__ import annotations

import datetime
import ipaddress
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tunnel import CLIENT, PROGRAM, ROOT, SERVER, Bench

from ttun import congestion, sodium, tox
from ttun.commands import doctor, doctor_connection, path_mtu
from ttun.commands.doctor import FAIL, OK, SKIP, WARN, Route
from ttun.lab import netns

hosts_only = pytest.mark.hosts
HIDE_NODE = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /dev/net && exec "$@"', "sh"]
FALSE_NODE = ["unshare", "--mount", "sh", "-c", 'mount --bind /dev/null /dev/net/tun && exec "$@"',
              "sh"]  # fmt: skip
NO_RIGHT = ["setpriv", "--bounding-set", "-net_admin"]


class Report:
    """What the program said on a host, by subject."""

    def __init__(self, pair: netns.Hosts, host: str, *arguments: str, prefix: list[str]) -> None:
        done = subprocess.run(
            pair.command(host, [*prefix, *PROGRAM, "doctor", *arguments]),
            capture_output=True, text=True, timeout=120, check=False,
            env={**os.environ, **netns.environment()},
        )  # fmt: skip
        assert done.stderr == ""
        assert max(map(len, done.stdout.splitlines())) <= 80 and "\033" not in done.stdout
        self.code, self.text = done.returncode, done.stdout
        self.blocks: dict[str, tuple[str, str]] = {}
        subject = ""
        for line in self.text.splitlines():
            if line.startswith(" " * 21):
                mark, found = self.blocks[subject]
                is_item = line[21:].startswith(("effect: ", "fix: "))
                joint = "\n" if is_item else " "  # else it is the rest of a wrapped line
                self.blocks[subject] = mark, f"{found}{joint}{line.strip()}"
            elif line[:5].strip() in (OK, WARN, FAIL, SKIP):
                subject = line[6:20].strip()
                assert subject not in self.blocks
                self.blocks[subject] = line[:5].strip(), line[21:]

    def __getitem__(self, subject: str) -> tuple[str, str]:
        return self.blocks[subject]


def report(
    pair: netns.Hosts, *arguments: str, host: str = CLIENT, prefix: list[str] | None = None
) -> Report:
    return Report(pair, host, *arguments, prefix=prefix or [])


@contextmanager
def changed(
    pair: netns.Hosts, do: list[str], undo: list[str], host: str = CLIENT
) -> Iterator[None]:
    subprocess.run(pair.command(host, do), check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(pair.command(host, undo), check=True, capture_output=True)


@hosts_only
@pytest.mark.parametrize(("everywhere", "there"), [(1, 0), (0, 1), (0, 2), (0, 0)])
def test_strict_filtering_outside_is_named(pair: netns.Hosts, everywhere: int, there: int) -> None:
    def set_to(*values: int) -> str:
        paths = (f"net/ipv4/conf/{device}/rp_filter" for device in ("all", "vclient"))
        return " ".join(f"{path}={value}" for path, value in zip(paths, values))

    gateway = ["ip", "route", "add", "default", "via", "192.0.2.1"]
    undo = f"ip route del default; sysctl -qw {set_to(0, 0)}"
    do = f"{' '.join(gateway)}; sysctl -qw {set_to(everywhere, there)}"
    with changed(pair, ["sh", "-c", do], ["sh", "-c", undo]):
        found = report(pair)
    assert found.code == 0
    if 2 in (everywhere, there) or everywhere == there:
        assert "rp_filter" not in found.blocks
    else:
        mark, text = found["rp_filter"]
        assert mark == WARN and text.startswith("1 on vclient")
        assert "sysctl -w net/ipv4/conf/vclient/rp_filter=2" in text


@hosts_only
def test_where_all_is_well_a_tunnel_can_run(pair: netns.Hosts) -> None:
    found = report(pair)
    assert found.code == 0
    for subject in ("packages", "privileges", "/dev/net/tun", "IPv6", "clock",
                    "IPv4 addresses", "IPv6 addresses"):  # fmt: skip
        assert found[subject][0] == OK, found.text
    assert found["offloads"][1].startswith("vnet header")
    assert "server" not in found.blocks, "no peer was named"
    assert "A tunnel can run on this machine" in found.text.splitlines()[-1]
    links = netns.ip("-n", pair.names[CLIENT], "link")
    assert "vclient" in links
    assert ": ttun" not in links, "the device that it looked with is gone again"


@hosts_only
@pytest.mark.parametrize(
    ("prefix", "subject", "says"),
    [
        (NO_RIGHT, "privileges", "no CAP_NET_ADMIN\neffect: cannot create a TUN device\nfix: "),
        (HIDE_NODE, "/dev/net/tun", "No such file"),
        (FALSE_NODE, "/dev/net/tun", "not the TUN device"),
    ],
)
def test_where_no_tunnel_can_run_it_says_so(
    pair: netns.Hosts, prefix: list[str], subject: str, says: str
) -> None:
    found = report(pair, prefix=prefix)
    assert found.code == 1
    assert found[subject][0] == FAIL
    assert found[subject][1].startswith(says)
    assert "fix: " in found[subject][1]
    assert found["offloads"][0] in (SKIP, FAIL)
    assert "cannot run on this machine: fix the items marked FAIL" in found.text.splitlines()[-1]


@hosts_only
@pytest.mark.parametrize(
    ("setting", "bad", "good", "subject"),
    [
        ("net.mptcp.enabled", "0", "1", "Multipath TCP"),
        ("net.ipv6.conf.default.disable_ipv6", "1", "0", "IPv6"),
    ],
)
def test_what_is_disabled_is_a_warning_and_the_tunnel_runs(
    pair: netns.Hosts, setting: str, bad: str, good: str, subject: str
) -> None:
    path = "/proc/sys/" + setting.replace(".", "/")
    if not Path(path).exists():
        pytest.skip(f"this kernel has no {setting}")
    write = ["sh", "-c", 'echo "$1" > "$2"', "sh"]
    with changed(pair, [*write, bad, path], [*write, good, path]):
        found = report(pair)
    assert found.code == 0
    assert found[subject][0] == WARN
    assert found[subject][1].startswith("disabled\neffect: ")
    assert f"fix: sysctl {setting.split('.', maxsplit=1)[0]}" in found[subject][1]
    assert report(pair)[subject][0] == OK


@hosts_only
@pytest.mark.parametrize(
    ("add", "subject", "says"),
    [
        ("addr add 10.1.1.9/24 dev vclient", "IPv4 addresses", "inside 10.1.1.0/24 on vclient"),
        ("addr add 10.1.1.2/32 dev lo", "IPv4 addresses", "in use on lo"),
        ("route add 10.0.0.0/8 via 192.0.2.1", "IPv4 addresses", "inside 10.0.0.0/8 on vclient"),
        ("addr add fc11::2/126 dev vclient", "IPv6 addresses", "in use on vclient"),
        ("-6 route add fc00::/7 dev vclient", "IPv6 addresses", "inside fc00::/7 on vclient"),
    ],
)
def test_addresses_that_something_else_has(
    pair: netns.Hosts, add: str, subject: str, says: str
) -> None:
    remove = add.replace(" add ", " del ")
    with changed(pair, ["ip", *add.split()], ["ip", *remove.split()]):
        found = report(pair)
    assert found.code == 0
    assert found[subject][0] == WARN
    assert says in found[subject][1]
    assert report(pair)[subject][0] == OK


@hosts_only
def test_a_default_route_is_no_conflict(pair: netns.Hosts) -> None:
    add = ["ip", "route", "add", "default", "via", "192.0.2.1"]
    with changed(pair, add, ["ip", "route", "del", "default"]):
        assert report(pair)["IPv4 addresses"][0] == OK


@hosts_only
def test_another_tunnel_is_a_conflict(bench: Bench) -> None:
    bench.server()
    found = report(bench.pair, host=SERVER)
    assert "in use on ttun0" in found["IPv4 addresses"][1]
    assert "in use on ttun0" in found["IPv6 addresses"][1]


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
    assert found["path MTU"][0] == SKIP


def test_without_a_package_it_says_which_and_looks_at_the_rest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "ttun.device", raising=False)
    monkeypatch.delattr("ttun.device", raising=False)
    monkeypatch.setitem(sys.modules, "pytun", None)
    assert doctor.run(None) == 1
    out = capsys.readouterr().out
    assert "pytun" in out.splitlines()[0]
    assert "fix: run make in its directory" in out
    assert "clock" in out


def test_a_processor_without_aes_and_a_system_without_toxcore(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sodium, "HAS_AES", False)
    aes = doctor.look_at_aes()
    assert aes.mark == WARN
    assert "chacha20-poly1305" in aes.effect
    monkeypatch.setattr(tox, "LIBRARY", "libtoxcore.so.99")
    toxcore = doctor.look_at_toxcore()
    assert (toxcore.mark, toxcore.found) == (WARN, "libtoxcore.so.99 not found")


def test_another_distribution_of_the_name_is_named(tmp_path: Path) -> None:
    """PyPI's ttun 2.4.1 is another project, whose package and command overwrite ours."""
    (tmp_path / "ttun_tunnel-0.2.0.dist-info").mkdir()
    (tmp_path / "ttun_tunnel-0.2.0.dist-info" / "METADATA").write_text("Name: ttun-tunnel\n")
    command, path = [sys.executable, "-m", "ttun", "doctor"], f"{ROOT}:{tmp_path}"

    def says() -> str:
        return subprocess.run(
            command, env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path,
            capture_output=True, text=True, timeout=60, check=False,
        ).stdout  # fmt: skip

    assert "other ttun" not in says(), "ours is not another"
    other = tmp_path / "ttun-2.4.1.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: ttun\nVersion: 2.4.1\n")
    block = " ".join(says().partition("other ttun")[2].split())
    assert f"ttun 2.4.1 in {tmp_path} is another project" in block
    assert "effect: package and command have the same names: each overwrites" in block
    assert "fix: pip uninstall ttun; " in block


@pytest.mark.hosts
def test_without_proc_it_says_so_in_one_line() -> None:
    """As in a chroot where nobody mounted it."""
    script = 'mount -t tmpfs none /proc && exec "$@"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", *PROGRAM, "doctor"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith("/proc is not mounted (mount -t proc proc /proc)\n")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("day", "mark"), [("1970-01-01", WARN), ("2026-11-22", OK), ("2090-01-01", WARN)]
)
def test_the_clock(day: str, mark: str) -> None:
    assert doctor.look_at_clock(datetime.date.fromisoformat(day)).mark == mark


def test_the_most_specific_network_around_is_named() -> None:
    wanted = ipaddress.ip_network("10.1.1.0/30")
    routes = [Route(ipaddress.ip_network(text), "eth0") for text in ("10.0.0.0/8", "10.1.0.0/16")]
    assert "inside 10.1.0.0/16" in doctor.look_at_addresses("x", wanted, routes).found
    assert doctor.look_at_addresses("x", wanted, []).mark == OK


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
