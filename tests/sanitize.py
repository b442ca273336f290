"""Run the tests on a codec built with a sanitizer: ``make asan``, ``make ubsan``, ``make tsan``.

1. Copy the sources to build/: the codec that ./ttun.py runs on stays as it is.
2. Build the codec there with the sanitizer's flags.
3. Make sure that it can fail: a mistake made on purpose has to be reported.
4. Run the unit tests in a Python with the sanitizer's runtime loaded.
5. Run the end-to-end tests on ends that have it loaded; pytest and its helpers do without.
6. A report is a file, whichever process wrote it. Show them all; one is enough to fail.

   python tests/sanitize.py asan [arguments of pytest]
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PARTS = [
    ".ci", "ttun", "csrc", "tests", "docs", "packaging",
    "ttun.py", "setup.py", "pyproject.toml", "Makefile", "README.md", "SECURITY.md", "CHANGELOG.md",
]  # fmt: skip
OF_OTHERS = (
    # They run make, man and shells, with mistakes of their own that a sanitizer reports.
    "tests/test_manual.py",
    "tests/test_services.py",
    "tests/test_packaging.py",
    # No runtime of a sanitizer starts without /proc, or in 60 MB.
    "tests/test_arguments.py::test_a_key_is_hidden_without_proc",
    "tests/test_environments.py",
)


class Sanitizer(NamedTuple):
    """What gcc and the runtime are told, and a mistake that only this one sees."""

    flags: str
    library: str
    variable: str
    options: str
    mistake: str
    leave_out: tuple[str, ...] = ()  # tests that its runtime, not the codec, cannot stand


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
        f"suppressions={ROOT}/tests/tsan.supp",
        "import threading\n"
        "c = ffi.new('struct ttun_coalescer *')\n"
        "body = lambda: [lib.ttun_coalescer_init(c, 1, 1) for _ in range(10000)]\n"
        "threads = [threading.Thread(target=body) for _ in range(2)]\n"
        "[thread.start() for thread in threads]\n"
        "[thread.join() for thread in threads]",
        (
            # The runtime crashes in a program that was started without standard streams.
            "tests/test_cli.py::test_closed_standard_streams_are_no_trouble",
            # Forking many times from a Python with terabytes of shadow memory: ENOMEM.
            "tests/test_key.py::test_two_servers_that_make_a_key_at_once_agree",
            "tests/test_tox_options.py",
            # The runtime crashes in the shell that a hook is run by.
            "tests/test_hooks.py",
        ),
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


def preload(name: str, sanitizer: Sanitizer, reports: Path) -> list[str]:
    """Return what stands before a command line to load the runtime and report to a directory."""
    library = subprocess.run(
        ["gcc", f"-print-file-name={sanitizer.library}"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    return [
        "env",
        f"LD_PRELOAD={os.path.realpath(library)}",
        f"{sanitizer.variable}={sanitizer.options}:log_path={reports}/report",
        "PYTHONMALLOC=malloc",  # buffers that Python makes then have an end that it knows
        # Its shadow memory wants the addresses of a kernel that does not randomize them.
        *(["setarch", "-R"] if name == "tsan" else []),
    ]


def main(name: str, arguments: list[str]) -> int:
    """Run it; 0 when the tests pass and nothing was reported."""
    sanitizer = SANITIZERS[name]
    home = build(name, sanitizer)
    with tempfile.TemporaryDirectory(prefix="ttun-sanitize-") as directory:
        reports = Path(directory)
        reports.chmod(0o1777)  # the ends drop to an unprivileged user, who reports here too
        instrumented = [*preload(name, sanitizer, reports), f"{home}/.venv/bin/python"]
        mistake = f"from ttun._codec import ffi, lib\n{sanitizer.mistake}"
        run([*instrumented, "-c", mistake], home, stderr=subprocess.DEVNULL)
        if not any(reports.iterdir()):
            sys.exit(f"{name} does not report a mistake that was made on purpose")
        for report in reports.iterdir():
            report.unlink()
        left_out = (*OF_OTHERS, *sanitizer.leave_out)
        arguments = [*arguments, *(f"--deselect={test}" for test in left_out)]
        codes = [
            run([*instrumented, "-m", "pytest", *arguments, "-m", "not hosts"], home),
            run(
                [sys.executable, "-m", "pytest", *arguments, "-m", "hosts and not slow"],
                ROOT,
                TTUN_TEST_PROGRAM=shlex.join([*instrumented, f"{home}/ttun.py"]),
            ),
        ]
        found = sorted(reports.iterdir())
        for report in found:
            print(f"---- {report.name}\n{report.read_text(errors='replace')}")
        print(f"{name}: {len(found)} reports")
    # 5: what was asked for has no test of that kind
    return int(bool(found) or not set(codes) <= {0, 5} or set(codes) == {5})


def run(command: list[str], directory: Path, stderr: int | None = None, **env: str) -> int:
    """Run a command and return its exit code."""
    return subprocess.run(
        command, cwd=directory, env={**os.environ, **env}, stderr=stderr, check=False
    ).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
