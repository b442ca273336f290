"""Machines on which the commands of a page run as they stand, each with its own /etc and /run.

Stood in for is what a namespace cannot have. sudo: the tests are root. apt-get: the packages are
here already, so it does what their installation does beyond that. systemctl: it starts what
ExecStart= of a unit says, as root. All else is real: nft, dnsmasq, tinyproxy, resolvconf, ttun.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

from outside import Capture
from tunnel import PROGRAM, ROOT, eventually, in_namespace

from ttun.lab import netns
from ttun.lab.netns import Namespaces

ETC = ("passwd", "group", "nsswitch.conf", "hosts", "ld.so.cache", "resolvconf.conf")
USER = 4711  # ttun, as make install and systemd-sysusers make it
SUDO = 'exec "$@"'
APT = """
case "$1 $2 $3" in  # without -y it asks
"install -y nftables") ;;
"install -y dnsmasq") systemctl start dnsmasq ;;
"remove -y dnsmasq") systemctl stop dnsmasq ;;
# what NetworkManager and dhclient have resolvconf know, and that file without it
"install -y openresolv") cp /etc/resolv.conf /run/before; resolvconf -a eth0 < /run/before ;;
"remove -y openresolv") cp /run/before /etc/resolv.conf; rm -rf /etc/resolv.conf.bak /etc/unbound ;;
*) echo "apt-get: $*?" >&2; exit 1 ;;
esac
"""
ASKS = 'echo "apt $1 asks, and the rest of a pasted block is its answer" >&2; exit 1'
SYSTEMCTL = """
run() { "$@" > "$place/$unit.log" 2>&1 & echo $! > "/run/$unit.pid"; }
start() {
    [ ! -e "/run/$unit.pid" ] || return 0
    case "$unit" in
    nftables) nft -f /etc/nftables.conf ;;
    dnsmasq) run dnsmasq --keep-in-foreground --user=root -7 /etc/dnsmasq.d -x '' ;;
    ttun-*@*)
        export CREDENTIALS_DIRECTORY="/run/$unit"
        install -D -m 600 "/etc/ttun/${unit#*@}.psk" "/run/$unit/psk"
        OPTIONS=$(sed -n s/^OPTIONS=//p "/etc/ttun/${unit#*@}.conf")
        command=$(sed -n "s|^ExecStart=@BINDIR@/||p" "$units/${unit%@*}@.service")
        eval "run $command" ;;
    esac
}
stop() {
    [ -e "/run/$unit.pid" ] || return 0
    pid=$(cat "/run/$unit.pid"); kill "$pid"; rm "/run/$unit.pid"
    while grep -qs '^State:.[^Z]' "/proc/$pid/status"; do sleep 0.05; done
}
does=$1; shift
[ "$1" != --now ] || { now=1; shift; }
for unit; do
    case "$does $now" in
    "start " | "enable 1") start ;;
    "stop " | "disable 1") stop ;;
    "restart ") stop; start ;;
    "enable " | "disable ") ;;
    *) echo "systemctl: $does?" >&2; exit 1 ;;
    esac
done
"""


class Machine:
    """A host of its own as far as the commands of a page see it."""

    def __init__(self, hosts: Namespaces, host: str, directory: Path, name_server: str) -> None:
        self.namespace, self.place = hosts.names[host], directory / host
        for name in ("etc", "bin", "home"):
            (self.place / name).mkdir(parents=True)
        etc = self.place / "etc"
        for name in ETC:
            if Path("/etc", name).exists():
                shutil.copy(f"/etc/{name}", etc)
        for name in ("systemd/system", "sysctl.d", "dnsmasq.d"):
            (etc / name).mkdir(parents=True)
        for name, line in (("passwd", f"ttun:x:{USER}:{USER}::/:/bin/false"),
                           ("group", f"ttun:x:{USER}:")):  # fmt: skip
            text = re.sub("^ttun:.*\n", "", (etc / name).read_text(), flags=re.M)
            (etc / name).write_text(f"{text}{line}\n")
        (etc / "nftables.conf").write_text("flush ruleset\n")
        (etc / "resolv.conf").write_text(f"nameserver {name_server}\noptions timeout:1\n")
        head = f"#!/bin/sh\nset -e\nplace={self.place} units={ROOT}/packaging/systemd now=\n"
        ttun = f'exec {shlex.join(PROGRAM)} "$@"'
        for name, text in (("sudo", SUDO), ("apt-get", APT), ("apt", ASKS),
                           ("systemctl", SYSTEMCTL), ("ttun", ttun)):  # fmt: skip
            (self.place / "bin" / name).write_text(head + text)
            (self.place / "bin" / name).chmod(0o755)
        own = f"mount -t tmpfs none /run; mount --bind {etc} /etc; echo up; exec sleep infinity"
        self.holder = subprocess.Popen(
            hosts.command(host, ["unshare", "--mount", "sh", "-ec", own]),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.holder.stdout is not None
        assert self.holder.stdout.readline() == "up\n"
        self.running = [self.holder]

    def close(self) -> None:
        """End what was started; what else runs there is ended with the namespace."""
        for process in self.running:
            process.kill()
            process.wait()
        assert self.holder.stdout is not None
        self.holder.stdout.close()

    def command(self, script: str) -> list[str]:
        """The command line that runs lines of a shell in its home directory."""
        home = f"export PATH={self.place}/bin:$PATH; cd {self.place}/home\n"
        return ["nsenter", "-t", str(self.holder.pid), "-m", "-n", "sh", "-ec", home + script]

    def start(self, script: str, log: str) -> subprocess.Popen[str]:
        """Start a program, which the lines exec."""
        with (self.place / log).open("w") as file:
            process = subprocess.Popen(
                self.command(script), stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                text=True, env=environment(),
            )  # fmt: skip
        self.running.append(process)
        return process

    def run(self, script: str) -> str:
        """Run lines to their end; what they printed."""
        done = subprocess.run(
            self.command(script), stdin=subprocess.DEVNULL, capture_output=True, text=True,
            check=False, timeout=60, env=environment(),
        )  # fmt: skip
        assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"
        return done.stdout

    def python(self, script: str, *arguments: str) -> str:
        return self.run(shlex.join([sys.executable, "-c", script, *arguments]))

    def says(self, log: str, text: str) -> None:
        path = self.place / log
        eventually(lambda: text in path.read_text(errors="replace"), f"{text!r} in {path}")

    def capture(self) -> Capture:
        """What leaves it on its eth0, and not through the tunnel."""
        return Capture(in_namespace(self.namespace, Capture.opened), "eth0")

    def state(self) -> dict[str, str]:
        """All that a recipe changes on it."""
        etc = self.place / "etc"
        files = {
            str(path.relative_to(etc)): path.read_text(errors="replace")
            for path in sorted(etc.rglob("*"))
            if path.is_file() and path.name != "ld.so.cache"
        }
        ways = ("rule", "-6 rule", "route", "-6 route", "route show table 203", "-br link")
        shown = {way: self.run(f"ip {way} || :").replace("@NONE", "") for way in ways}
        shown["forwarding"] = self.run("cat /proc/sys/net/ipv4/ip_forward")
        shown["rules"] = self.run("nft list ruleset")
        shown["ports"] = "\n".join(sorted(self.run("ss -Htuln").splitlines()))
        return {**files, **shown}


def targets(capture: Capture) -> set[tuple[int, str, int]]:
    """Protocol, address and port of what left, but for packets that find a neighbour."""
    return {
        (each.protocol, each.target, each.port)
        for each in list(capture.sent)
        if not each.target.startswith(("fe80", "ff02", "224.0.0."))
    }


def environment() -> dict[str, str]:
    return {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C", **netns.environment()}


def blocks(page: str, heading: str) -> list[str]:
    """The commands below a heading of a page, as they stand there: a text for each block."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    found = re.findall(r"(?<=\n\n)((?:    .*\n|\n(?=    ))+)", section)
    assert found, heading
    return [textwrap.dedent(block) for block in found]
