"""``make check-wheels``: install what ``make wheels`` made where there is nothing else, and run it.

Each place gets a fresh virtual environment and tests/check_install.py, after
``pip install --no-index --find-links dist ttun-tunnel``:

1. this machine;
2. with root, Debian 12 for aarch64 and armv7l, made by debootstrap with Python and no compiler;
3. with root, CPython 3.11 and musl for each of the three processors, and nothing else
   (musl_python.py; if these wheels are for 3.11).

The programs of another processor run through qemu-user. binfmt_misc belongs to a user namespace of
the check's own, so nothing is registered on this machine (Linux 6.7 and newer).

    apt install debootstrap qemu-user-static

With names (here, debian-arm64, debian-armhf, musl-x86_64, musl-aarch64, musl-armv7l): only those.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import musl_python
import wheels

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "check-wheels"
CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000  # linux/sched.h
# Debian's name, qemu's, and the ELF header up to e_machine: binfmt_misc.rst.
FOREIGN = {
    "arm64": (
        "aarch64",
        rb"\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00",
    ),
    "armhf": ("arm", rb"\x7fELF\x01\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\x28\x00"),
}
DEBIAN = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "armhf"}
MASK = rb"\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff"
COMMANDS = [
    ["python3", "-c", "import shutil; assert not shutil.which('cc') and not shutil.which('gcc')"],
    ["python3", "-m", "venv", "--clear", "/tmp/check"],
    ["/tmp/check/bin/pip", "--disable-pip-version-check", "-q", "install", "--no-index",
     "--find-links", "/ttun/dist", "ttun-tunnel"],
    ["/tmp/check/bin/python", "/ttun/tests/check_install.py"],
]  # fmt: skip
# A user namespace of root's may make no device node: what debootstrap wants of them is there.
SECOND_STAGE = "\ncheck_sane_mount() { :; }\nsetup_devices() { :; }\nsetup_proc() { :; }\n"


def check_here() -> None:
    """Install and check on this machine."""
    place = WORK / "here"
    subprocess.run([sys.executable, "-m", "venv", "--clear", place], check=True)
    subprocess.run(
        [place / "bin" / "pip", "--disable-pip-version-check", "-q", "install", "--no-index",
         "--find-links", ROOT / "dist", "ttun-tunnel"], check=True,
        env={"PIP_CONFIG_FILE": os.devnull},
    )  # fmt: skip
    check = [place / "bin" / "python", ROOT / "tests" / "check_install.py"]
    subprocess.run(check, check=True, cwd="/")


def check_debian(debian: str) -> None:
    """Install and check in a Debian of another processor."""
    root = WORK / f"debian-{debian}"
    if not can_run(debian) or not shutil.which("debootstrap"):
        print(f"{root.name}: NOT CHECKED: it takes root, debootstrap and qemu-user-static")
        return
    if not (root / "made").exists():
        shutil.rmtree(root, ignore_errors=True)
        include = "--include=python3,python3-venv"
        bootstrap = ["debootstrap", "--foreign", "--variant=minbase", f"--arch={debian}", include]
        subprocess.run([*bootstrap, "bookworm", root], check=True, stdout=subprocess.DEVNULL)
        with (root / "debootstrap" / "functions").open("a") as functions:
            functions.write(SECOND_STAGE)
        run_in(root, debian, ["/debootstrap/debootstrap", "--second-stage"])
        (root / "made").touch()
    check_in(root, debian)


def check_musl(platform: wheels.Platform) -> None:
    """Install and check under a Python on musl."""
    root = WORK / f"musl-{platform.machine}"
    debian = DEBIAN[platform.machine]
    if not can_run(debian) or sys.version_info[:2] != musl_python.VERSION:
        wanted = ".".join(map(str, musl_python.VERSION))
        print(f"{root.name}: NOT CHECKED: it takes root, qemu-user-static, Python {wanted}")
        return
    if not (root / "made").exists():
        tools = wheels.Tools(ROOT / "build" / "wheels")
        musl_python.make(tools, platform, debian, root)
        (root / "made").touch()
    check_in(root, debian)


def can_run(debian: str) -> bool:
    """Whether run_in can run programs of a processor here."""
    qemu = FOREIGN.get(debian, ("", b""))[0]
    return os.geteuid() == 0 and (not qemu or Path(f"/usr/bin/qemu-{qemu}-static").exists())


def check_in(root: Path, debian: str) -> None:
    """Install and check in a directory that has a system of its own."""
    print(f"{root.name}: ", end="", flush=True)
    for command in COMMANDS:
        run_in(root, debian, command)


def run_in(root: Path, debian: str, command: list[str]) -> None:
    """Run a command in a root of a processor, as root of a user namespace that has every user."""
    for name in ("dev", "mnt", "proc", "ttun"):
        if (root / name).is_symlink():  # /proc, if debootstrap thinks that this is a container
            (root / name).unlink()
        (root / name).mkdir(exist_ok=True)
    rule = b""
    if debian in FOREIGN:
        qemu, magic = FOREIGN[debian]
        rule = b":qemu:M::" + magic + b":" + MASK + f":/usr/bin/qemu-{qemu}-static:OCF".encode()
    script = """
        set -e
        rule="$(cat)"
        if [ -n "$rule" ]; then
            mount -t binfmt_misc none "$0/mnt"
            printf %s "$rule" > "$0/mnt/register"
        fi
        for below in dev proc; do mount --rbind "/$below" "$0/$below"; done
        mount --bind "$1" "$0/ttun"
        root="$0"; shift
        exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C chroot "$root" "$@"
    """
    ready, mapped, stdin = os.pipe(), os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        if ctypes.CDLL(None).unshare(CLONE_NEWNS | CLONE_NEWUSER) != 0:
            os._exit(1)
        os.write(ready[1], b"\0")
        os.read(mapped[0], 1)
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
        os.dup2(stdin[0], 0)
        os.close(stdin[1])
        os.execvp("sh", ["sh", "-c", script, str(root), str(ROOT), *command])
    os.write(stdin[1], rule)
    os.close(stdin[1])
    os.close(ready[1])
    if os.read(ready[0], 1):
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{child}/{name}").write_text("0 0 4294967295\n")
        os.write(mapped[1], b"\0")
    if os.waitpid(child, 0)[1] != 0:
        sys.exit(f"failed in {root}: {' '.join(command)}")


if __name__ == "__main__":
    if not list(ROOT.glob("dist/ttun_tunnel-*.whl")):
        sys.exit("there are no wheels in dist: make wheels")
    WORK.mkdir(parents=True, exist_ok=True)
    checks: dict[str, Callable[[], None]] = {"here": check_here}
    for name in FOREIGN:
        checks[f"debian-{name}"] = partial(check_debian, name)
    for platform in wheels.PLATFORMS:
        if platform.libc.startswith("musllinux"):
            checks[f"musl-{platform.machine}"] = partial(check_musl, platform)
    for name in sys.argv[1:] or checks:
        checks[name]()
