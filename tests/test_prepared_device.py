"""A device that an administrator prepared: ttun attaches to it, without any privilege."""

from __future__ import annotations

import contextlib
import fcntl
import json
import struct
import subprocess
import sys
from collections.abc import Iterator

import pytest
from machine import IS_NOBODY_HERE, opened, threads
from pytun import IFF_NO_PI, IFF_TUN, IFF_VNET_HDR, TunTapDevice
from ttun._codec import lib
from tunnel import CLIENT, PROGRAM, ROOT, Bench, Program

from ttun.lab import netns

UID = 65534
ROUTES = ["--route", "198.51.100.0/24", "--route", "fd00:9::/64"]
ADDRESSES = ["10.1.1.2/30", "fc11::2/126"]
COMPLETE = [
    "link set tun5 mtu 1280 up",
    *(f"address add {address} dev tun5" for address in ADDRESSES),
    "route add 198.51.100.0/24 dev tun5",
    "route add fd00:9::/64 dev tun5",
]

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(not IS_NOBODY_HERE, reason="no other user in this user namespace"),
]


class Prepared:
    """A host with the device tun5 of an unprivileged user."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.name = bench, bench.pair.names[CLIENT]

    def ip(self, *lines: str) -> None:
        for line in lines:
            netns.ip("-n", self.name, *line.split())

    def addresses(self) -> list[str]:
        shown = json.loads(netns.ip("-n", self.name, "-json", "address", "show", "dev", "tun5"))
        return [
            f"{each['local']}/{each['prefixlen']}"
            for each in shown[0]["addr_info"]
            if each["scope"] == "global"
        ]

    def as_user(self, first: str = ":") -> list[str]:
        """What to put before a command to run it as that user, with no capability.

        first: a shell command of root's, for what only the command shall see.
        """
        script = f"""
            {first}
            mount -t tmpfs none /mnt
            {opened(ROOT, sys.base_prefix, sys.prefix)}
            exec setpriv --reuid {UID} --regid {UID} --clear-groups --bounding-set=-all "$@"
        """
        works = ["unshare", "--mount", "sh", "-c", script, "sh"]
        trial = [*works, *PROGRAM, "--version"]
        if subprocess.run(trial, capture_output=True, check=False).returncode != 0:
            pytest.skip("no other user can run ttun here")
        return works

    def client(self, *options: str, first: str = ":") -> Program:
        """A client that runs as that user."""
        works = self.as_user(first)
        log = self.bench.directory / f"user{len(self.bench.ends)}.log"
        with log.open("w") as file:
            process = self.bench.pair.start(
                CLIENT,
                [*works, *PROGRAM, "client", "-k", "secret", "-s", "192.0.2.1", "--dev", "tun5",
                 *self.bench.options, *options],
                stderr=file, environment=netns.environment(XDG_RUNTIME_DIR=""),
            )  # fmt: skip
        program = Program(process, log)
        self.bench.ends.append(program)  # type: ignore[arg-type]
        return program


@pytest.fixture
def prepared(bench: Bench) -> Iterator[Prepared]:
    made = Prepared(bench)
    made.ip(f"tuntap add dev tun5 mode tun user {UID}")
    try:
        yield made
    finally:
        bench.close()
        made.ip("link delete tun5")


def test_a_user_without_privileges_attaches_to_it(bench: Bench, prepared: Prepared) -> None:
    prepared.ip(*COMPLETE)
    bench.server()
    for _ in range(2):  # the device outlives the program
        client = prepared.client(*ROUTES)
        client.says("authenticated")
        bench.answers()
        for task in threads(client.process.pid):
            assert int(task["CapEff"], 16) == 0 and task["Uid"].split() == [str(UID)] * 4
        assert client.stop() == 0
        assert "incomplete" not in client.log() and "missing" not in client.log()
        assert prepared.addresses() == ADDRESSES


def test_another_program_may_have_left_a_longer_header(bench: Bench, prepared: Prepared) -> None:
    """With num_buffers (linux/virtio_net.h), as virtual machines have it: 12 bytes, not 10."""

    def use() -> None:
        with contextlib.closing(TunTapDevice("tun5", IFF_TUN | IFF_NO_PI | IFF_VNET_HDR)) as device:
            fcntl.ioctl(device, lib.TUNSETVNETHDRSZ, struct.pack("=i", 12))

    bench.on(CLIENT, use)
    prepared.ip(*COMPLETE)
    bench.server()
    prepared.client(*ROUTES).says("authenticated")
    bench.answers()


def test_doctor_knows_that_a_tunnel_runs_on_it(bench: Bench, prepared: Prepared) -> None:
    command = bench.pair.command(CLIENT, [*prepared.as_user(), *PROGRAM, "doctor"])
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert "no CAP_NET_ADMIN; prepared for this user: tun5\n" in done.stdout, done.stderr
    assert "effect: a tunnel runs with --dev tun5 only" in done.stdout
    assert done.returncode == 0 and "A tunnel can run on this machine" in done.stdout
    prepared.ip("link delete tun5", "tuntap add dev tun5 mode tun user 1")
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1 and "FAIL  privileges     no CAP_NET_ADMIN\n" in done.stdout


def test_what_it_lacks_is_one_line_and_what_comes_later_is_seen(
    bench: Bench, prepared: Prepared
) -> None:
    bench.server()
    client = prepared.client(*ROUTES)
    client.says("authenticated")
    (line,) = [x for x in client.says("tun5 is incomplete").splitlines() if "incomplete" in x]
    assert "device down, MTU is 1500, not 1280, address 10.1.1.2/30 missing" in line
    commands = line.partition("(to add: ")[2].rstrip(")")
    for command in commands.split("; "):
        prepared.ip(command.partition("sudo ip ")[2])
    client.says("tun5 is complete again")
    bench.answers()
    assert client.stop() == 0


def test_root_adds_what_it_lacks_and_an_address_that_is_there_is_no_error(
    bench: Bench, prepared: Prepared
) -> None:
    prepared.ip("link set tun5 up", "address add fc11::2/126 dev tun5")
    bench.server()
    for _ in range(2):
        client = bench.client("--dev", "tun5", *ROUTES)
        client.says("authenticated")
        bench.answers()
        assert client.status()["missing"] == []
        assert client.stop() == 0
        assert sorted(prepared.addresses()) == ADDRESSES
        assert "no IPv6" not in client.log() and "incomplete" not in client.log()


@pytest.mark.parametrize("lack", ["", "-mtu"])
def test_one_without_ipv6_says_why(bench: Bench, prepared: Prepared, lack: str) -> None:
    off = "/proc/sys/net/ipv6/conf/tun5/disable_ipv6"
    bench.run(CLIENT, "sh", "-c", f"echo {int(not lack)} > {off}")
    client = bench.client("--dev", "tun5", *([lack, "1000"] if lack else []))
    said = client.says("no IPv6 in the tunnel: ")
    why = (
        "the MTU is below 1280"
        if lack
        else ("disabled (sysctl net.ipv6.conf.tun5.disable_ipv6=0; then restart ttun)")
    )
    assert f"no IPv6 in the tunnel: {why}\n" in said
    assert client.stop() == 0
    prepared.ip("link set tun5 mtu 1280")  # below that the kernel has no settings of IPv6
    bench.run(CLIENT, "sh", "-c", f"echo 0 > {off}")
    client = bench.client("--dev", "tun5")
    client.says("attached to tun5")
    assert client.status()["local6"] == "fc11::2/126"


def test_a_device_that_cannot_be_attached_to_is_an_error_that_says_why(
    bench: Bench, prepared: Prepared
) -> None:
    bench.client("--dev", "tun5").says("attached to tun5")
    again = bench.client("--dev", "tun5")
    assert again.ended() == 1
    assert "ttun: device tun5 is used by another program (choose another name)" in again.log()
    prepared.ip(
        "tuntap add dev tun6 mode tun user 1",
        "tuntap add dev tap5 mode tap",
        f"tuntap add dev tunm mode tun multi_queue user {UID}",
    )
    try:
        for name, why in (
            ("tun6", "belongs to another user (sudo ip link delete tun6; sudo ip tuntap add"),
            (
                "tap5",
                "tap5 is not a plain TUN device: tap, multi_queue or other (choose another name",
            ),
            ("tunm", "tunm is not a plain TUN device"),
            ("tun7", "run with sudo, or prepare it: sudo ip tuntap add dev tun7 mode tun user"),
        ):
            user = prepared.client("--dev", name)
            assert user.ended() == 1
            assert user.log().count("\nttun: ") == 1 and why in user.log(), user.log()
        closed = "mount -t tmpfs none /dev/net && mknod -m 600 /dev/net/tun c 10 200"
        user = prepared.client("--dev", "tun6", first=closed)
        assert user.ended() == 1
        node = "/dev/net/tun"
        why = f"cannot open {node}: permission denied (run with sudo, or chmod 666 {node})"
        assert f"\nttun: {why}\n" in user.log(), user.log()
    finally:
        prepared.ip("link delete tun6", "link delete tap5", "link delete tunm")
