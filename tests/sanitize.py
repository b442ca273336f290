"""Run the tests on a codec built with a sanitizer: ``make asan``, ``make ubsan``, ``make tsan``.

1. Copy the sources to build/: the codec that ./ttun.py runs on stays as it is.
2. Build the codec there with the sanitizer's flags.
3. Make sure that it can fail: a mistake made on purpose has to be reported.
4. Run pytest with the sanitizer's runtime loaded into every program that the tests start.
5. A report is a file, whichever process wrote it. Show them all; one is enough to fail.

   python tests/sanitize.py asan [arguments of pytest]
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PARTS = ["ttun", "csrc", "tests", "ttun.py", "setup.py", "pyproject.toml"]


class Sanitizer(NamedTuple):
    """What gcc and the runtime are told, and a mistake that only this one sees."""

    flags: str
    library: str
    variable: str
    options: str
    mistake: str


SANITIZERS = {
    "asan": Sanitizer(
        "-fsanitize=address",
        "libasan.so",
        "ASAN_OPTIONS",
        # The interpreter keeps much until its end, so leaks are looked for elsewhere: the fuzzers
        # (make fuzz) run with leak checks, and test_faults.py watches the memory of both ends.
        "detect_leaks=0:strict_string_checks=1:detect_stack_use_after_return=1",
        "lib.ttun_sum(0, ffi.new('uint8_t[]', 1000), 1001)",
    ),
    "ubsan": Sanitizer(
        "-fsanitize=undefined",
        "libubsan.so",
        "UBSAN_OPTIONS",
        "print_stacktrace=1",
        "odd = ffi.cast('char *', ffi.new('uint8_t[]', 8000)) + 1\n"
        "lib.ttun_coalescer_init(ffi.cast('struct ttun_coalescer *', odd), True, True)",
    ),
    "tsan": Sanitizer(
        "-fsanitize=thread",
        "libtsan.so",
        "TSAN_OPTIONS",
        # Python forks while other threads run, for subprocess, and execs at once.
        f"die_after_fork=0:suppressions={ROOT}/tests/tsan.supp",
        "import threading\n"
        "c = ffi.new('struct ttun_coalescer *')\n"
        "body = lambda: [lib.ttun_coalescer_init(c, 1, 1) for _ in range(10000)]\n"
        "threads = [threading.Thread(target=body) for _ in range(2)]\n"
        "[thread.start() for thread in threads]\n"
        "[thread.join() for thread in threads]",
    ),
}


def build(name: str, sanitizer: Sanitizer) -> Path:
    """Return a copy of the project with an instrumented codec."""
    home = ROOT / "build" / name
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, home / part)
    for built in (home / "ttun").glob("_codec*.so"):
        built.unlink()
    (home / ".venv").symlink_to(Path(sys.executable).parent.parent)
    flags = f"-g -O1 -fno-omit-frame-pointer {sanitizer.flags}"
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=home, env={**os.environ, "TTUN_CFLAGS": flags}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    if done.returncode != 0:
        sys.exit(done.stdout + done.stderr)
    return home


def environment(sanitizer: Sanitizer, reports: Path) -> dict[str, str]:
    """Return what makes every program below load the runtime and report into a directory."""
    library = subprocess.run(
        ["gcc", f"-print-file-name={sanitizer.library}"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    return {
        **os.environ,
        "LD_PRELOAD": os.path.realpath(library),
        sanitizer.variable: f"{sanitizer.options}:log_path={reports}/report",
        # Buffers that Python makes then have an end that the sanitizer knows.
        "PYTHONMALLOC": "malloc",
        "TTUN_TEST_SANITIZER": "1",
    }


def main(name: str, arguments: list[str]) -> int:
    """Run it; 0 when the tests pass and nothing was reported."""
    sanitizer = SANITIZERS[name]
    home = build(name, sanitizer)
    python = [str(home / ".venv" / "bin" / "python")]
    if name == "tsan":  # its shadow memory wants the addresses that a kernel without ASLR gives
        python = ["setarch", "-R", *python]
    with tempfile.TemporaryDirectory(prefix="ttun-sanitize-") as directory:
        reports = Path(directory)
        reports.chmod(0o1777)  # the ends drop to an unprivileged user, who reports here too
        env = environment(sanitizer, reports)
        mistake = f"from ttun._codec import ffi, lib\n{sanitizer.mistake}"
        subprocess.run(
            [*python, "-c", mistake], cwd=home, env=env, check=False, capture_output=True
        )
        if not (found := list(reports.iterdir())):
            sys.exit(f"{name} does not report a mistake that was made on purpose")
        for report in found:
            report.unlink()
        code = subprocess.run(
            [*python, "-m", "pytest", *arguments], cwd=home, env=env, check=False
        ).returncode
        found = sorted(reports.iterdir())
        for report in found:
            print(f"---- {report.name}\n{report.read_text(errors='replace')}")
        print(f"{name}: {len(found)} reports")
        return code or bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
