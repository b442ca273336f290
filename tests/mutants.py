"""Would the tests notice? Plant small mistakes in a copy of the sources, one at a time.

    make mutants SEED=1 [MODULES="control.py segment.c"] [EACH=15] [WORKERS=2]

 1. Find the places in each module where a mistake can be made: a comparison, a number, a condition,
    a call whose result is not used. Leave out strings, log lines, errors, assertions, annotations.
 2. Take a sample of them by seed. Plant each in a copy of the project; compile it if it is in C.
    One that does not compile does not count, and another one takes its place.
 3. Run the tests that touch the module, the quick ones first, up to the first one that fails. Tests
    that hang have noticed it, too.
 4. Print the mistakes that no test noticed, the survivors, and the score.

docs/design.md names survivors that change nothing anybody could see. Both mutators are our own: the
known ones for Python run the tests in one process, while ours start programs, and know no C.
"""

from __future__ import annotations

import ast
import concurrent.futures
import contextlib
import os
import queue
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sanitize import PARTS, ROOT


class Tests(NamedTuple):
    """Those that touch a module: quick ones run first, in one process; slow ones, which wait much,
    side by side.
    """

    quick: tuple[str, ...]
    slow: tuple[str, ...] = ()


OFFLOAD = Tests(
    ("test_offload", "test_whole", "test_control"), ("test_kernel_segments", "test_odd_packets")
)
MODULES = {
    "ttun/handshake.py": Tests(
        ("test_handshake", "test_x1", "test_pending"), ("test_stranger", "test_wrong_setups")
    ),
    "ttun/peer.py": Tests(("test_pending", "test_pending_turns"), ("test_keys",)),
    "ttun/pending.py": Tests(
        ("test_pending", "test_pending_turns"), ("test_waiting", "test_stranger", "test_peers")
    ),
    "ttun/x1.py": Tests(("test_x1", "test_handshake", "test_rekey"), ("test_stranger",)),
    "ttun/control.py": Tests(("test_times", "test_control", "test_rekey")),
    "ttun/commands/key.py": Tests(("test_key",), ("test_keys", "test_cli")),
    "ttun/privileges.py": Tests(("test_privileges",), ("test_doctor", "test_environments")),
    "ttun/network/routes.py": Tests(("test_routes",), ("test_device_watch", "test_resolver")),
    "ttun/mptcp.py": Tests(("test_mptcp", "test_vanished"), ("test_multipath", "test_roaming")),
    "csrc/session.c": Tests(
        (
            "test_session_memory",
            "test_buffers",
            "test_wipe",
            "test_pump",
            "test_control",
            "test_rekey",
        )
    ),
    "csrc/segment.c": OFFLOAD,
    "csrc/coalesce.c": OFFLOAD,
    "csrc/codel.c": Tests(("test_codel",)),
}
SIDE_BY_SIDE = 4
PATIENCE = 4.0  # times what the tests take as they are: those that take longer hang
SWAPS = {
    "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==",
    "in": "not in", "not in": "in", "is": "is not", "is not": "is",
}  # fmt: skip


class Mutant(NamedTuple):
    """A mistake: what stands from start to end (characters of the file) is replaced."""

    path: str
    start: int
    end: int
    new: str

    def describe(self, text: str) -> str:
        """Return where it is and what it does, in a line."""
        line = text.count("\n", 0, self.start) + 1
        old = " ".join(text[self.start : self.end].split())
        return f"{self.path}:{line}: {old[:60]!r} -> {self.new.strip()[:60]!r}"


# ---- Python ----


class Finder(ast.NodeVisitor):
    """Finds the places of a module in Python."""

    def __init__(self, path: str, text: str) -> None:
        self.path, self.text = path, text
        self.lines = [0]
        for line in text.splitlines(keepends=True):
            self.lines.append(self.lines[-1] + len(line))
        self.found: list[Mutant] = []

    def span(self, node: ast.AST) -> tuple[int, int]:
        """Return from where to where a node stands. Columns of ast are bytes of UTF-8."""

        def at(line: int, column: int) -> int:
            start = self.lines[line - 1]
            raw = self.text[start : self.lines[line]].encode()[:column]
            return start + len(raw.decode())

        assert isinstance(node, (ast.expr, ast.stmt))
        assert node.end_lineno is not None and node.end_col_offset is not None
        first, last = at(node.lineno, node.col_offset), at(node.end_lineno, node.end_col_offset)
        return first, last

    def add(self, start: int, end: int, new: str) -> None:
        self.found.append(Mutant(self.path, start, end, new))

    def negate(self, test: ast.expr) -> None:
        start, end = self.span(test)
        if not isinstance(test, ast.NamedExpr) and "TYPE_CHECKING" not in self.text[start:end]:
            self.add(start, end, f"(not ({self.text[start:end]}))")

    def visit_Compare(self, node: ast.Compare) -> None:
        left: ast.expr = node.left
        for right in node.comparators:
            start, end = self.span(left)[1], self.span(right)[0]
            between = self.text[start:end].strip(" ()\n")
            if between in SWAPS:
                at = self.text.index(between, start)
                self.add(at, at + len(between), SWAPS[between])
            left = right
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        start, end = self.span(node)
        if isinstance(node.value, bool):
            self.add(start, end, str(not node.value))
        elif isinstance(node.value, (int, float)):
            self.add(start, end, repr(node.value + 1))
            if node.value > 1:
                self.add(start, end, repr(node.value * 10))

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        word = "and" if isinstance(node.op, ast.And) else "or"
        for left, right in zip(node.values, node.values[1:]):
            start, end = self.span(left)[1], self.span(right)[0]
            at = self.text.index(word, start, end)
            self.add(at, at + len(word), "or" if word == "and" else "and")
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        self.negate(node.test)
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.negate(node.test)
        self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call) and not is_log(node.value):
            self.add(*self.span(node), "pass")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if not is_log(node):
            self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_arguments(self, node: ast.arguments) -> None:
        for default in [*node.defaults, *filter(None, node.kw_defaults)]:
            self.visit(default)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if not isinstance(node.value, ast.Name) or node.value.id[:1].islower():  # no type
            self.generic_visit(node)

    def leave_out(self, node: ast.AST) -> None:
        """Look no further into it."""

    visit_JoinedStr = visit_Raise = visit_Assert = visit_Import = visit_ImportFrom = leave_out


def is_log(call: ast.Call) -> bool:
    """Return whether it writes a line to the log."""
    function = call.func
    if not isinstance(function, ast.Attribute):
        return False
    known = {"log", "debug", "info", "warning", "error", "exception"}
    return function.attr in known or (
        isinstance(function.value, ast.Name) and function.value.id == "log"
    )


def find_in_python(path: str, text: str) -> list[Mutant]:
    finder = Finder(path, text)
    finder.visit(ast.parse(text))
    return finder.found


# ---- C ----

HIDDEN = re.compile(
    r'/\*.*?\*/|"(?:\\.|[^"\\\n])*"|^[ \t]*#[^\n]*|\b(?:static_assert|assert)\(.*?\);', re.S | re.M
)
COMPARISON = re.compile(r" (==|!=|<=|>=|<|>) ")
NUMBER = re.compile(r"(?<![\w.])(0x[0-9a-fA-F]+|\d+)(?=[uUlL]*\b)")
CALL = re.compile(r"(?<=[;{}):])(\s+)((?!return\b|if\b|while\b|for\b|switch\b)\w+\([^;{}]*\);)")


def find_in_c(path: str, text: str) -> list[Mutant]:
    """Find the places of a module in C, formatted as clang-format does."""
    code = HIDDEN.sub(lambda match: re.sub(r"\S", " ", match[0]), text)
    found = []

    def add(start: int, end: int, new: str) -> None:
        found.append(Mutant(path, start, end, new))

    for match in COMPARISON.finditer(code):
        add(*match.span(1), SWAPS[match[1]])
    for match in NUMBER.finditer(code):
        value = int(match[1], 0)
        add(*match.span(1), str(value + 1))
        if value > 1:
            add(*match.span(1), str(value * 10))
    for match in re.finditer(r"&&|\|\|", code):
        add(*match.span(), "||" if match[0] == "&&" else "&&")
    for match in CALL.finditer(code):
        add(*match.span(2), ";")
    for match in re.finditer(r"\bif \(", code):
        depth, end = 1, match.end()
        while depth:
            depth += {"(": 1, ")": -1}.get(code[end], 0)
            end += 1
        add(match.end(), end - 1, f"!({text[match.end() : end - 1]})")
    return found


# ---- planting ----


class Tree:
    """A copy of the project, for one mutant at a time."""

    def __init__(self, home: Path) -> None:
        self.home, self.stale = home, False
        self.patience = 0.0  # seconds
        self.passing: dict[tuple[str, ...], int] = {}  # how many of these tests, without a mistake
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        for part in PARTS:
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            copy(ROOT / part, home / part)
        (home / ".venv").symlink_to(Path(sys.executable).parent.parent)
        if not self.build():
            sys.exit("the sources do not compile as they are")

    def build(self) -> bool:
        """Compile the codec; whether that went well."""
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--force",
                   "--build-lib", "build/lib", "--build-temp", "build/temp"]  # fmt: skip
        return (
            subprocess.run(command, cwd=self.home, capture_output=True, check=False).returncode == 0
        )

    @contextlib.contextmanager
    def planted(self, mutant: Mutant) -> Iterator[bool]:
        """Have a mutant in the sources; whether they compile."""
        path = self.home / mutant.path
        text = path.read_text()
        path.write_text(text[: mutant.start] + mutant.new + text[mutant.end :])
        in_c = path.suffix == ".c"
        try:
            yield not in_c or self.build()
        finally:
            path.write_text(text)
            self.stale = in_c  # usually, the next one is in C and builds anyway

    def tests_fail(self, tests: Tests) -> bool:
        """Whether one of these does, or hangs."""
        end = time.monotonic() + self.patience
        return self._fails(tests.quick, end) or (
            bool(tests.slow) and self._fails(tests.slow, end, "-n", str(SIDE_BY_SIDE))
        )

    def _fails(self, names: tuple[str, ...], end: float, *options: str) -> bool:
        tests = [f"tests/{name}.py" for name in names]
        with tempfile.TemporaryFile("w+") as said:
            process = subprocess.Popen(
                [sys.executable, "-B", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
                 "-m", "not slow", *options, *tests],
                cwd=self.home, stdout=said, stderr=subprocess.DEVNULL,
                # Compiled files are told apart by seconds and size, which a mutant may share. What
                # make sets is relative, and some tests run where there is no directory.
                env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": ""},
                start_new_session=True,
            )  # fmt: skip
            try:
                failed = process.wait(end - time.monotonic()) != 0
            except subprocess.TimeoutExpired:
                return True
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            said.seek(0)
            passed = sum(map(int, re.findall(r"(\d+) passed", said.read())))
        # A mistake can make tests think that they cannot run here.
        return failed or passed < self.passing.setdefault(names, passed)


def judge(tree: Tree, mutant: Mutant) -> bool | None:
    """Return whether a mutant is noticed; None for one that does not compile."""
    with tree.planted(mutant) as compiles:
        return tree.tests_fail(MODULES[mutant.path]) if compiles else None


def main(seed: int, each: int, workers: int, chosen: list[str]) -> int:
    """Plant some into each module; 0 when at most one in ten survives."""
    modules = [path for path in MODULES if not chosen or any(path.endswith(c) for c in chosen)]
    started = time.monotonic()
    home = ROOT / "build" / "mutants"
    trees: queue.SimpleQueue[Tree] = queue.SimpleQueue()
    for number in range(workers):
        trees.put(Tree(home / str(number)))
    samples, texts = {}, {path: (ROOT / path).read_text() for path in modules}
    for path in modules:
        find = find_in_c if path.endswith(".c") else find_in_python
        found = find(path, texts[path])
        samples[path] = random.Random(f"{seed} {path}").sample(found, len(found))
    survivors: list[str] = []
    judged = 0

    def module(path: str) -> None:
        nonlocal judged
        tree = trees.get()
        count = 0
        try:
            if tree.stale:
                tree.build()
            began, tree.patience = time.monotonic(), 1800.0
            if tree.tests_fail(MODULES[path]):
                sys.exit(f"{path}: its tests fail as it is")
            tree.patience = 60 + PATIENCE * (time.monotonic() - began)
            for mutant in samples[path]:
                noticed = judge(tree, mutant)
                if noticed is None:
                    continue
                count, judged = count + 1, judged + 1
                line = mutant.describe(texts[path])
                print(f"{'noticed ' if noticed else 'SURVIVED'} {line}", flush=True)
                if not noticed:
                    survivors.append(line)
                if count == each:
                    break
        finally:
            trees.put(tree)

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        for result in [pool.submit(module, path) for path in modules]:
            result.result()
    minutes = (time.monotonic() - started) / 60
    print(f"seed {seed}: {len(survivors)} of {judged} survived, in {minutes:.0f} minutes")
    for line in sorted(survivors):
        print(f"  {line}")
    return int(10 * len(survivors) > judged)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:4]), sys.argv[4:]))
