"""``ttun doctor`` on hosts that lack something: the effect, and how to fix it."""

from __future__ import annotations

import datetime
import ipaddress
import os
import subprocess
import sys
from pathlib import Path

import impostor
import pytest
from doctor_report import changed, report
from impostor import Place
from kept import as_root
from tunnel import CLIENT, PROGRAM, ROOT, SERVER, Bench, in_namespace

from ttun import sodium, tox
from ttun.commands import doctor
from ttun.commands.doctor import FAIL, OK, SKIP, WARN, Route
from ttun.lab import netns

hosts_only = pytest.mark.hosts
HIDE_NODE = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /dev/net && exec "$@"', "sh"]
FALSE_NODE = ["unshare", "--mount", "sh", "-c", 'mount --bind /dev/null /dev/net/tun && exec "$@"',
              "sh"]  # fmt: skip
NO_RIGHT = ["setpriv", "--bounding-set", "-net_admin"]


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


@as_root
def test_the_remedy_for_a_missing_node_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container has no /dev/net either."""
    monkeypatch.setattr(doctor, "NODE", tmp_path / "net" / "tun")
    finding = doctor.look_at_node()
    assert finding.mark == FAIL
    command = finding.fix.rpartition(", or ")[2]
    if subprocess.run(["sh", "-c", command], capture_output=True, check=False).returncode:
        assert (tmp_path / "net").exists(), "a user namespace forbids mknod alone"
        return
    assert doctor.look_at_node().found not in ("No such file or directory", "not the TUN device")


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
def test_your_own_running_tunnel_is_no_conflict(bench: Bench) -> None:
    bench.server().status()
    found = report(bench.pair, host=SERVER)
    for version, network in (("4", "10.1.1.0/30"), ("6", "fc11::/126")):
        assert found[f"IPv{version} addresses"] == (OK, f"{network}: of the running tunnel ttun0")


@hosts_only
def test_the_tunnel_of_another_program_is_a_conflict(pair: netns.Hosts) -> None:
    do = "ip tuntap add ttun0 mode tun && ip addr add 10.1.1.1/30 dev ttun0 && ip link set ttun0 up"
    with changed(pair, ["sh", "-c", do], ["ip", "tuntap", "del", "ttun0", "mode", "tun"]):
        mark, text = report(pair)["IPv4 addresses"]
    assert mark == WARN and "in use on ttun0" in text


@hosts_only
def test_an_answer_that_claims_the_device_of_another_hides_no_conflict(
    pair: netns.Hosts, place: Place
) -> None:
    """It says that the veth device is a tunnel's."""
    inode = in_namespace(pair.names[CLIENT], lambda: os.stat("/proc/thread-self/ns/net").st_ino)
    place.answer("a.sock", impostor.line(device="vclient", netns=inode))
    add = "addr add 10.1.1.1/30 dev vclient"
    prefix = ["env", f"XDG_RUNTIME_DIR={place.directory.parent}"]
    with changed(pair, ["ip", *add.split()], ["ip", *add.replace(" add ", " del ").split()]):
        mark, text = report(pair, prefix=prefix)["IPv4 addresses"]
    assert mark == WARN and "in use on vclient" in text


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


def test_it_starts_also_where_a_package_is_missing() -> None:
    script = "import sys; sys.modules['pytun'] = None; from ttun import cli; sys.exit(cli.main())"
    done = subprocess.run(
        [sys.executable, "-c", script, "doctor"], cwd=ROOT, capture_output=True, text=True,
        check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout.startswith("FAIL  packages") and "clock" in done.stdout, done.stderr


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
