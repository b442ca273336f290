"""``make check-services``: the systemd units under a real systemd, booted in namespaces. As root.

A Debian 12 with systemd is made by debootstrap (once), ``make install`` puts ttun into it, and its
systemd is started in namespaces and a control group of its own, with two tunnels: a server and a
client of that server. A unit of the test's own then looks at them, kills one, stops another, and
writes down what came of it. Nothing of it reaches this machine's network, services or /dev.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SYSTEM = ROOT / "build" / "check-services"
PACKAGES = "systemd,systemd-sysv,dbus,python3,iproute2"
OPTIONS = {
    "office": "-l :20203",
    "home": "-s 127.0.0.1 --dev ttun9 --local4 10.9.9.2 --peer4 10.9.9.1 "
    "--local6 fd00::2 --peer6 fd00::1",
}
FILES = {
    **{f"etc/ttun/{name}.conf": f"OPTIONS={text}\n" for name, text in OPTIONS.items()},
    **{f"etc/ttun/{name}.psk": "a key of two tunnels\n" for name in OPTIONS},
    "etc/systemd/system/report.service": """\
[Unit]
After=multi-user.target
[Service]
Type=oneshot
ExecStart=/bin/sh /report.sh
[Install]
WantedBy=multi-user.target
""",
    "report.sh": """\
exec > /report.txt 2>&1
unit=ttun-server@office
pid() { systemctl show -P MainPID $unit; }
state() { echo "$1=$(systemctl show -P ActiveState $unit)" \\
    "$(systemctl show -P NRestarts $unit)"; }
sleep 5
state ready
echo "client=$(systemctl show -P ActiveState ttun-client@home)"
echo "shown=$(/usr/local/bin/ttun show | grep -c 'wire: x1')"
echo "user=$(stat -c %U /proc/$(pid))"
sed -n 's/^CapEff:\\s*/capabilities=/p; s/^Seccomp:\\s*/seccomp=/p' /proc/$(pid)/status
echo "sockets=$(find /run/ttun -type s | wc -l)"
kill -KILL $(pid); sleep 6; state killed
echo "sockets=$(find /run/ttun -type s | wc -l)"
kill -STOP $(pid); sleep 45; state hung
systemctl stop $unit ttun-client@home; echo "left=$(ls -A /run/ttun)"
echo "end=$(systemctl show -P Result $unit)"
""",
}
EXPECTED = [
    "ready=active 0", "client=active", "shown=2", "user=ttun", "capabilities=0000000000000000",
    "seccomp=2", "sockets=2", "killed=active 1", "sockets=2", "hung=active 2", "left=",
    "end=success",
]  # fmt: skip
BOOT = """
set -e
mount --make-rprivate /
mount --bind "$0" "$0"
mkdir -p "$0.cgroup" && mount -t cgroup2 none "$0.cgroup"
mkdir -p "$0.cgroup/ttun-check" && echo 0 > "$0.cgroup/ttun-check/cgroup.procs"
exec unshare --cgroup --fork --kill-child --pid --uts --ipc --net sh -ec '
    ip link set lo up
    cd "$0"
    mount -t proc proc proc
    mount -t sysfs -o ro sysfs sys
    mount -t cgroup2 none sys/fs/cgroup
    mount -t tmpfs -o mode=755 tmpfs dev
    mkdir dev/net dev/pts dev/shm
    for name in null zero full random urandom tty; do
        touch dev/$name; mount --bind /dev/$name dev/$name
    done
    mknod -m 666 dev/net/tun c 10 200
    mount --make-rshared .
    mount -t tmpfs tmpfs run
    mount -t tmpfs tmpfs tmp
    exec env -i container=other PATH=/usr/sbin:/usr/bin chroot . /lib/systemd/systemd
' "$0"
"""


def make_system() -> None:
    """Make the system, or bring the one that is there up to date."""
    if not (SYSTEM / "made").exists():
        shutil.rmtree(SYSTEM, ignore_errors=True)
        bootstrap = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}"]
        subprocess.run([*bootstrap, "bookworm", SYSTEM], check=True, stdout=subprocess.DEVNULL)
        (SYSTEM / "made").touch()
    subprocess.run(
        ["make", "install", "PREFIX=/usr/local", f"DESTDIR={SYSTEM}"],
        cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    for name, text in FILES.items():
        path = SYSTEM / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o600 if name.endswith(".psk") else 0o644)
    inside = ["chroot", str(SYSTEM)]
    subprocess.run([*inside, "systemd-sysusers"], check=True)
    units = ["ttun-server@office", "ttun-client@home", "report"]
    subprocess.run([*inside, "systemctl", "-q", "enable", *units], check=True)
    foreign = ["systemd-udevd", "console-getty", "getty@tty1"]
    subprocess.run([*inside, "systemctl", "-q", "mask", *foreign], check=True)


def boot() -> list[str]:
    """Start its systemd, wait for the report, and return that."""
    report = SYSTEM / "report.txt"
    report.unlink(missing_ok=True)
    with subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", BOOT, str(SYSTEM)], stdin=subprocess.DEVNULL
    ) as system:
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline and system.poll() is None:
            if report.exists() and "end=" in report.read_text():
                break
            time.sleep(1)
        system.kill()  # and with it, by --kill-child, the systemd of that namespace
    return report.read_text().splitlines() if report.exists() else []


if __name__ == "__main__":
    if os.geteuid() != 0 or not shutil.which("debootstrap"):
        sys.exit("it takes root and debootstrap: apt install debootstrap; sudo make check-services")
    make_system()
    found = boot()
    print("\n".join(found))
    if found != EXPECTED:
        sys.exit("expected:\n" + "\n".join(EXPECTED))
