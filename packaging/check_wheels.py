"""``make check-wheels``: install the wheels of ``make wheels`` on minimal systems, and run them.

Each system gets a new virtual environment, the wheels by pip, and tests/helpers/check_install.py.
The systems are this machine; as root also Debian 12 for aarch64 and armv7l, with Python and no
compiler; and musl with CPython 3.11 for each processor and nothing else (musl_python.sh; if the
wheels are for 3.11). Programs for other processors run in qemu-user (enter.sh): apt install
debootstrap qemu-user-static. Arguments (here, debian-arm64, debian-armhf, musl-amd64, musl-arm64,
musl-armhf) select systems.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from wheels import PACKAGING, ROOT, apt, build_libffi, cross, debian_source, host, run

WORK = ROOT / "build" / "check-wheels"
# Debian's name of a processor: the wheels' name, qemu's, bytes 4 and 18 of the ELF header, elf(5).
PROCESSORS = {"amd64": ("x86_64", "", 2, 62), "arm64": ("aarch64", "aarch64", 2, 183),
              "armhf": ("armv7l", "arm", 1, 40)}  # fmt: skip
NAMES = ["here", "debian-arm64", "debian-armhf", "musl-amd64", "musl-arm64", "musl-armhf"]
NO_COMPILER = "import shutil; assert not shutil.which('cc') and not shutil.which('gcc')"


def check(name: str, python: str, source: Path, place: Path, *enter: str | Path) -> None:
    """Install and check. enter: the command that runs a command in the system."""
    installed = place / "bin" / "python"
    run([*enter, python, "-m", "venv", "--clear", place])
    run([*enter, installed, "-m", "pip", "--disable-pip-version-check", "-q", "install",
         "--no-index", "--find-links", source / "dist", "ttun-tunnel"],
        PIP_CONFIG_FILE=os.devnull)  # fmt: skip
    said = run([*enter, installed, source / "tests/helpers/check_install.py"])
    print(f"{name}: {said}", end="", flush=True)


def check_system(name: str) -> None:
    """Check in a separate system, which is created if it does not exist."""
    kind, processor = name.split("-")
    machine, qemu, bits, code = PROCESSORS[processor]
    root = WORK / name
    if not (root / "made").exists():
        shutil.rmtree(root, ignore_errors=True)
        for below in ("dev", "mnt", "proc", "tmp", "ttun", "usr/bin", "usr/lib", "usr/sbin"):
            (root / below).mkdir(parents=True)
        if kind == "musl":
            make_musl(f"musllinux_1_2_{machine}", processor, root)
        else:
            make_debian(processor, root)
        (root / "made").touch()
    header = rf"\x7fELF\x0{bits}\x01\x01" + r"\x00" * 9 + rf"\x02\x00\x{code:02x}\x00"
    enter: list[str | Path] = [PACKAGING / "enter.sh", root, ROOT, qemu, header]
    run([*enter, "python3", "-c", NO_COMPILER])
    check(name, "python3", Path("/ttun"), Path("/tmp/check"), *enter)


def make_debian(processor: str, root: Path) -> None:
    """Unpack a Debian with Python; no maintainer script runs, so nothing is configured."""
    wanted = ["--include=python3,python3-venv", f"--arch={processor}", "--variant=minbase"]
    packages = root / "var" / "packages"
    run(["debootstrap", "--download-only", *wanted, "bookworm", packages])
    for name in ("bin", "sbin", "lib"):
        (root / name).symlink_to(f"usr/{name}")
    for package in packages.glob("var/cache/apt/archives/*.deb"):
        run(["dpkg-deb", "--extract", package, root])


def make_musl(platform: str, processor: str, root: Path) -> None:
    """Compile Python for musl, and add Debian's musl."""
    place, environment = cross(platform)
    build_libffi(place, environment)
    what = [debian_source("python3.11"), debian_source("zlib"), place / "ffi", place, root]
    run([PACKAGING / "musl_python.sh", *what, host(platform)], **environment)
    (package,) = apt(f"musl:{processor}", "deb", "download").glob("musl_*.deb")
    run(["dpkg-deb", "--extract", package, root])


if __name__ == "__main__":
    if unknown := set(sys.argv[1:]) - set(NAMES):
        sys.exit(f"{', '.join(unknown)}: choose from {', '.join(NAMES)}")
    WORK.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[1:] or NAMES:
        qemu = PROCESSORS.get(name.partition("-")[2], ("", ""))[1]
        if name == "here":
            check(name, sys.executable, ROOT, WORK / "here")
        elif os.geteuid() or (qemu and not shutil.which(f"qemu-{qemu}-static")):
            print(f"{name}: NOT CHECKED: requires root, debootstrap and qemu-user-static")
        elif name.startswith("musl") and sys.version_info[:2] != (3, 11):
            print(f"{name}: NOT CHECKED: requires Python 3.11")
        else:
            check_system(name)
