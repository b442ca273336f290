"""``make check-dist``: is what ``make dist`` made whole? It takes no network and no root.

1. The sdist has each file that git has.
2. The wheel is small and stripped, and its help is that of the source, which has all comments.
3. In an empty virtual environment pip installs the wheel, without an index: ``ttun --version``,
   tests/check_install.py.
4. In the unpacked sdist the codec is built, and the tests that need no root pass.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from wheels import LARGEST, run

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "check-dist"
MADE_BY_SETUPTOOLS = {"PKG-INFO", "setup.cfg"}


def check_sdist(sdist: Path) -> None:
    """End the program if git has files that the sdist lacks, or the other way round."""
    with tarfile.open(sdist) as archive:
        found = {name.partition("/")[2] for name in archive.getnames() if "/" in name}
        files = {member.name.partition("/")[2] for member in archive if member.isfile()}
    generated = {name for name in found if name.split("/")[0].endswith(".egg-info")}
    if (ROOT / ".git").exists():
        # CI's root may not own what it checks out.
        git = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"]
        tracked = set(run(git, ROOT).split("\0")) - {""}
        different = tracked ^ (files - generated - MADE_BY_SETUPTOOLS)
        if different:
            sys.exit(f"{sdist.name} and git differ (see MANIFEST.in): {sorted(different)}")


def check_wheel(wheel: Path) -> None:
    """End the program if the wheel is too large, or has what only a debugger reads."""
    size = wheel.stat().st_size
    if size > LARGEST:
        sys.exit(f"{wheel.name} has {size} bytes: more than {LARGEST}")
    with zipfile.ZipFile(wheel) as archive:
        codec = archive.read("ttun/_codec.abi3.so")
    if b".symtab" in codec or b".debug_info" in codec:
        sys.exit(f"{wheel.name}: the codec is not stripped")


def install(wheel: Path) -> None:
    """Install the wheel where there is nothing else, and run what it installed."""
    place = WORK / "venv"
    run([sys.executable, "-m", "venv", place])
    offline = ["--no-index", "--find-links", str(ROOT / ".venv" / "wheels")]
    run([place / "bin" / "python", "-m", "pip", "-q", "install", *offline, wheel])
    said = run([place / "bin" / "ttun", "--version"], WORK)
    if said.split()[0] != "ttun":
        sys.exit(f"ttun --version: {said}")
    print(run([place / "bin" / "python", ROOT / "tests" / "check_install.py"], WORK), end="")
    for name in ("ttun.Server", "ttun.Client", "ttun.Status", "ttun.TtunError"):
        show = f"import ttun, pydoc; print(ttun.__doc__, pydoc.plain(pydoc.render_doc({name})))"
        shown = {
            run([python, "-c", show], cwd)
            for python, cwd in ((place / "bin" / "python", WORK), (sys.executable, ROOT))
        }
        if len(shown) != 1:
            sys.exit(f"help({name}) of the wheel is not that of the source")


def check_tests(sdist: Path) -> None:
    """Run the unit tests in the unpacked sdist, with the Python that make built."""
    with tarfile.open(sdist) as archive:
        archive.extractall(WORK)
    (home,) = WORK.glob("ttun_tunnel-*")
    (home / ".venv").symlink_to(ROOT / ".venv")
    run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], home)
    tests = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-m", "not hosts and not slow"]
    if subprocess.run(tests, cwd=home, check=False).returncode != 0:
        sys.exit(f"tests fail in {home}")


def main() -> None:
    """Check what is in dist."""
    (sdist,) = ROOT.glob("dist/ttun_tunnel-*.tar.gz")
    (wheel,) = ROOT.glob("dist/ttun_tunnel-*-linux_*.whl")
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    check_sdist(sdist)
    check_wheel(wheel)
    install(wheel)
    check_tests(sdist)
    print(f"{sdist.name} and {wheel.name}, {wheel.stat().st_size / 1000:.0f} kB: whole")


if __name__ == "__main__":
    main()
