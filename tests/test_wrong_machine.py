"""Machines that are set up wrong, made in namespaces: one line of the log, show or doctor says how.

No bbr, no forwarding, strict reverse path filtering, no IPv6, a wrong clock. Nothing of this
machine is changed: settings are of a network namespace, files are covered in a mount namespace.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tunnel import CLIENT, PROGRAM, ROOT, SERVER, Bench, eventually

from ttun.lab import netns

pytestmark = pytest.mark.hosts
ALLOWED = "/proc/sys/net/ipv4/tcp_allowed_congestion_control"
DISABLED = "ipv6/conf/default/disable_ipv6"
COVER = ["unshare", "--mount", "sh", "-c", 'mount --bind "$0" "$1" && shift && exec "$@"']


def doctor(bench: Bench, host: str, *prefix: str, **environment: str) -> str:
    """The report, each item with its effect and its remedy in one line."""
    done = subprocess.run(
        bench.pair.command(host, [*prefix, *PROGRAM, "doctor"]), capture_output=True, text=True,
        env={**os.environ, **netns.environment(COLUMNS="1000", **environment)}, check=False,
        timeout=60,
    )  # fmt: skip
    assert done.stderr == ""
    return re.sub(r"\n +", "; ", done.stdout)


@contextmanager
def setting(bench: Bench, host: str, name: str, value: str) -> Iterator[None]:
    """Change a setting of a host's network namespace for a while."""
    path = f"/proc/sys/net/{name}"
    before = bench.run(host, "cat", path).strip()
    bench.run(host, "sh", "-c", f"echo {value} > {path}")
    try:
        yield
    finally:
        bench.run(host, "sh", "-c", f"echo {before} > {path}")


def test_no_bbr(plain: Bench, tmp_path: Path) -> None:
    """An administrator's list of allowed ones leaves it out; or the kernel has none."""
    listed = tmp_path / "allowed"
    listed.write_text("reno cubic\n")
    report = doctor(plain, CLIENT, *COVER, str(listed), ALLOWED)
    assert re.search(r"warn  congestion     bbr (for root only|not in this kernel)", report), report
    assert "effect: " in report and re.search("fix: (sysctl net.ipv4.tcp_allowed|modprobe)", report)
    plain.server("--congestion-control", "reno")
    end = plain.client("--congestion-control", "nosuch")
    assert end.ended() == 1
    assert (
        "cannot use nosuch: not in this kernel, or module not loaded (modprobe tcp_nosuch)"
        in end.log()
    )


def test_no_forwarding(plain: Bench) -> None:
    with setting(plain, CLIENT, "ipv4/ip_forward", "0"):
        assert re.search(
            r"warn  forwarding +disabled: net.ipv4.ip_forward=0.*; effect: networks behind this "
            r"machine cannot use the tunnel.*; fix: .*sysctl net.ipv4.ip_forward=1",
            doctor(plain, CLIENT),
        )
    with setting(plain, CLIENT, "ipv4/ip_forward", "1"), \
            setting(plain, CLIENT, "ipv6/conf/all/forwarding", "1"):  # fmt: skip
        assert re.search("ok    forwarding +enabled", doctor(plain, CLIENT))


@pytest.mark.skipif(not shutil.which("sysctl"), reason="apt install procps")
def test_what_enables_forwarding_keeps_the_route_of_a_router_advertisement(plain: Bench) -> None:
    """A router ignores advertisements, and forgets at once what it had from one."""
    name = plain.pair.names[CLIENT]
    paths = [f"/proc/sys/net/{x}" for x in ("ipv4/ip_forward", "ipv6/conf/all/forwarding")]

    def advertise() -> bool:
        with socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6) as sock:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
            message = struct.pack(">BBHBBHII", 134, 0, 0, 64, 0, 1800, 0, 0)  # RFC 4861
            sock.sendto(message, ("ff02::1", 0, 0, socket.if_nametoindex("vserver")))
        time.sleep(0.1)
        return has_route()

    def has_route() -> bool:
        return "proto ra" in netns.ip("-n", name, "-6", "route", "show", "default")

    with setting(plain, CLIENT, "ipv4/ip_forward", "0"), \
            setting(plain, CLIENT, "ipv6/conf/all/forwarding", "0"), \
            setting(plain, CLIENT, "ipv6/conf/vclient/accept_ra", "1"):  # fmt: skip
        try:
            eventually(lambda: plain.on(SERVER, advertise), "a route")
            report = doctor(plain, CLIENT)
            remedy = re.search("fix: if it routes for others: (sysctl [^;\n]*)", report)
            assert remedy and "forwarding=1" in remedy[1], report
            plain.run(CLIENT, *remedy[1].split())
            assert [plain.run(CLIENT, "cat", path) for path in paths] == ["1\n", "1\n"]
            assert has_route(), remedy[1]
        finally:
            for path in paths:
                plain.run(CLIENT, "sh", "-c", f"echo 0 > {path}")
            netns.ip("-n", name, "-6", "route", "flush", "proto", "ra")


@pytest.mark.skipif(not shutil.which("sysctl"), reason="apt install procps")
def test_the_remedy_for_strict_filtering_holds_for_a_device_of_any_name(plain: Bench) -> None:
    """sysctl(8) takes a dot for the end of a name."""
    for name, port in (("a.5", "20203"), ("b.5", "20204")):
        plain.server("--dev", name, "-l", port).status()
    with setting(plain, SERVER, "ipv4/conf/a.5/rp_filter", "1"), \
            setting(plain, SERVER, "ipv4/conf/b.5/rp_filter", "1"):  # fmt: skip
        found = re.search("fix: (sysctl .*), or --route for each", doctor(plain, SERVER))
        assert found
        plain.run(SERVER, *found[1].split())
        assert re.search("ok    reverse path +not filtered strictly", doctor(plain, SERVER))


def test_strict_reverse_path_filtering(plain: Bench) -> None:
    """A ping from an address behind the client that the server has no route to is dropped."""
    plain.tunnel()
    plain.answers()
    netns.ip("-n", plain.pair.names[CLIENT], "address", "add", "203.0.113.9/32", "dev", "lo")
    netns.ip("-n", plain.pair.names[SERVER], "route", "add", "203.0.113.0/24", "via", "192.0.2.2")
    pattern = r"warn  reverse path +strict: net.ipv4.conf.all.rp_filter=1 \((\d+) packets dropped"
    try:
        with setting(plain, SERVER, "ipv4/conf/all/rp_filter", "1"):
            before = re.search(pattern, doctor(plain, SERVER))
            assert before
            lost = plain.pair.command(
                CLIENT, ["ping", "-c", "2", "-i", "0.2", "-W", "1", "-I", "203.0.113.9", "10.1.1.1"]
            )
            if shutil.which("ping"):
                assert subprocess.run(lost, capture_output=True, check=False).returncode == 1
            report = doctor(plain, SERVER)
            after = re.search(pattern, report)
            assert after and (int(after[1]) >= int(before[1]) + 2 or not shutil.which("ping"))
            assert re.search(
                "effect: packets from the tunnel are silently dropped.*--route", report
            )
        with setting(plain, SERVER, "ipv4/conf/ttun0/rp_filter", "1"):
            assert "strict: net.ipv4.conf.ttun0.rp_filter=1" in doctor(plain, SERVER)
            with setting(plain, SERVER, "ipv4/conf/all/rp_filter", "2"):
                assert re.search("ok    reverse path +not filtered strictly", doctor(plain, SERVER))
    finally:
        netns.ip("-n", plain.pair.names[CLIENT], "address", "del", "203.0.113.9/32", "dev", "lo")
        netns.ip("-n", plain.pair.names[SERVER], "route", "del", "203.0.113.0/24")


def test_no_ipv6(plain: Bench) -> None:
    with setting(plain, SERVER, DISABLED, "1"):
        report = doctor(plain, SERVER)
        assert (
            "warn  IPv6           disabled; effect: the tunnel carries IPv4 only; fix: sysctl"
            in report
        )
        server = plain.server()
        said = server.says("no IPv6 in the tunnel: ")
        remedy = re.search(r"in the tunnel: disabled \((sysctl [^;]*); then restart", said)
        assert remedy, said
        found = server.status()
        assert (found["local6"], found["peer6"]) == (None, None)
        assert "addresses: 10.1.1.1/30, peer 10.1.1.2, MTU" in plain.run(SERVER, *PROGRAM, "show")
        assert server.stop() == 0
        assert remedy[1] == f"sysctl net.{DISABLED.replace('/', '.')}=0"
        plain.run(SERVER, "sh", "-c", f"echo 0 > /proc/sys/net/{DISABLED}")
        server = plain.server()
        assert server.status()["local6"] and "no IPv6" not in server.log()


def test_a_wrong_clock(plain: Bench, tmp_path: Path) -> None:
    """As a board without a battery has it. The tunnel connects nevertheless."""
    library, file = tmp_path / "clock.so", tmp_path / "ahead"
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    source = ROOT / "tests/helpers/clock.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    file.write_bytes(struct.pack("=2q", -56 * 365 * 86400, 0))
    wrong = {"LD_PRELOAD": str(library), "TTUN_TEST_CLOCK": str(file)}
    report = doctor(plain, CLIENT, **wrong)
    assert re.search(
        r"warn  clock +19\d\d-\d\d-\d\d, not plausible; effect: wrong dates in the log", report
    )
    plain.server()
    client = plain.start(CLIENT, "client", "-k", "secret", "-s", "192.0.2.1", environment=wrong)
    client.says("authenticated")
    assert re.match(r"19\d\d/", client.log()), "its lines have that date"
    eventually(lambda: client.status()["peer"], "a session")
