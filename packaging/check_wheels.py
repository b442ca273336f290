"""``make check-wheels``: install what ``make wheels`` made where there is nothing else, and run it.

Each place gets a fresh virtual environment, ``pip install --no-index --find-links dist ttun`` and
tests/check_install.py:

1. this machine;
2. with root, Debian 12 for aarch64 and armv7l, made by debootstrap with Python and no compiler. Its
   programs run through qemu-user. binfmt_misc belongs to a user namespace of the check's own, so
   nothing is registered on this machine (Linux 6.7 and newer);
3. musl on x86_64 without a Python for it: its loader has to find every symbol that is not Python's.

    apt install debootstrap qemu-user-static musl
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

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
MASK = rb"\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff"
CHECK = """
set -e
! command -v cc && ! command -v gcc
python3 -m venv --clear /tmp/check
/tmp/check/bin/pip --disable-pip-version-check -q install --no-index --find-links /ttun/dist ttun
/tmp/check/bin/python /ttun/tests/check_install.py
"""
# A user namespace of root's may make no device node: what debootstrap wants of them is there.
SECOND_STAGE = "\ncheck_sane_mount() { :; }\nsetup_devices() { :; }\nsetup_proc() { :; }\n"


def check_here() -> None:
    """Install and check on this machine."""
    place = WORK / "here"
    subprocess.run([sys.executable, "-m", "venv", "--clear", place], check=True)
    subprocess.run(
        [place / "bin" / "pip", "--disable-pip-version-check", "-q", "install", "--no-index",
         "--find-links", ROOT / "dist", "ttun"], check=True, env={"PIP_CONFIG_FILE": os.devnull},
    )  # fmt: skip
    check = [place / "bin" / "python", ROOT / "tests" / "check_install.py"]
    subprocess.run(check, check=True, cwd="/")


def check_foreign(debian: str) -> None:
    """Install and check in a Debian of another processor."""
    qemu, magic = FOREIGN[debian]
    interpreter = Path(f"/usr/bin/qemu-{qemu}-static")
    if os.geteuid() != 0 or not interpreter.exists() or not shutil.which("debootstrap"):
        print(f"{debian}: NOT CHECKED: it takes root, debootstrap and qemu-user-static")
        return
    root = WORK / debian
    if not (root / "made").exists():
        shutil.rmtree(root, ignore_errors=True)
        include = "--include=python3,python3-venv"
        bootstrap = ["debootstrap", "--foreign", "--variant=minbase", f"--arch={debian}", include]
        subprocess.run([*bootstrap, "bookworm", root], check=True, stdout=subprocess.DEVNULL)
        shutil.copy(interpreter, root / "usr" / "bin")
        with (root / "debootstrap" / "functions").open("a") as functions:
            functions.write(SECOND_STAGE)
        run_in(root, qemu, magic, ["/debootstrap/debootstrap", "--second-stage"])
        (root / "made").touch()
    run_in(root, qemu, magic, ["/bin/sh", "-c", CHECK])


def run_in(root: Path, qemu: str, magic: bytes, command: list[str]) -> None:
    """Run a command in a foreign root, as root of a user namespace that has every user."""
    (root / "ttun").mkdir(exist_ok=True)
    rule = b":qemu:M::" + magic + b":" + MASK + f":/usr/bin/qemu-{qemu}-static:OCF".encode()
    script = """
        set -e
        mount -t binfmt_misc none "$0/mnt" && cat > "$0/mnt/register"
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


def check_musl() -> None:
    """Have musl's loader look for what the codec needs."""
    loader = Path("/lib/ld-musl-x86_64.so.1")
    if not loader.exists():
        print("musl: NOT CHECKED: it takes musl (apt install musl)")
        return
    wheel = next((ROOT / "dist").glob("ttun-*-musllinux_*_x86_64.whl"))
    with zipfile.ZipFile(wheel) as archive:
        codec = archive.extract("ttun/_codec.abi3.so", WORK / "musl")
    listed = subprocess.run([loader, "--list", codec], capture_output=True, text=True, check=False)
    output = listed.stdout + listed.stderr
    missing = set(re.findall(r"(\w+): symbol not found", output))
    others = sorted(name for name in missing if not name.startswith(("Py", "_Py")))
    if others or not missing or "No such file" in output:
        sys.exit(f"{wheel.name}: not in musl: {others}\n{output}")
    print(f"{wheel.name}: musl's loader finds all but Python's own {len(missing)} symbols; not run")


if __name__ == "__main__":
    WORK.mkdir(parents=True, exist_ok=True)
    check_here()
    for name in FOREIGN:
        check_foreign(name)
    check_musl()
