"""What is built of this tree: the sdist, the wheel, and ``make`` without a network or by root."""

from __future__ import annotations

import ast
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import wheels
from compact import compact
from press import press
from tunnel import ROOT

WHEELS = ROOT / ".venv" / "wheels"
MADE = shutil.ignore_patterns(
    ".git", ".venv", "build", "dist", "*.egg-info", "*.so", "__pycache__", ".*_cache",
    ".hypothesis", "beside.log", "lint.log", "PKG-INFO", "setup.cfg",
)  # fmt: skip
USER = 12345  # who owns a tree that root builds in
NOWHERE = "https://127.0.0.1:9/simple"  # the port discard, where nobody listens

long = pytest.mark.skipif(not os.environ.get("TTUN_TEST_LONG"), reason="TTUN_TEST_LONG=1 runs it")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.together,
    pytest.mark.skipif(not (ROOT / ".venv" / ".built").exists(), reason="not built with make"),
]


def clean(**more: str) -> dict[str, str]:
    """An environment without what this machine tells pip, make and Python, and no index to ask."""
    theirs = ("PIP_", "MAKE", "MFLAGS", "PYTHON")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(theirs)}
    return {**kept, "PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": NOWHERE, **more}


def run(*command: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env=clean(**env), capture_output=True, text=True, check=False, timeout=300
    )


def make(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run("make", f"PYTHON={sys._base_executable}", *arguments, cwd=tree)  # type: ignore[attr-defined]


def files(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The source, as it is before anything is built."""
    return Path(shutil.copytree(ROOT, tmp_path / "tree", ignore=MADE))


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The sdist, made as pip and build make it, in a directory of its own."""
    directory = tmp_path_factory.mktemp("sdist")
    source = shutil.copytree(ROOT, directory / "source", ignore=MADE)
    script = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    done = run(sys.executable, "-c", script, directory, cwd=source)
    assert done.returncode == 0, done.stderr
    (sdist,) = directory.glob("ttun_tunnel-*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(directory)
    yield sdist.with_name(sdist.name.removesuffix(".tar.gz"))


@pytest.fixture(scope="module")
def wheel(unpacked: Path) -> Path:
    """The wheel, made of the sdist and of what pyproject.toml says that it takes."""
    done = run(
        sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", unpacked.parent, unpacked,
        cwd=unpacked.parent, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(WHEELS), PIP_NO_COMPILE="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (made,) = unpacked.parent.glob("*.whl")
    return made


def test_the_sdist_has_every_file(unpacked: Path) -> None:
    whole = {
        name
        for name in files(unpacked.parent / "source")
        if ".egg-info/" not in name and "__pycache__/" not in name
    }
    assert whole - files(unpacked) == set()
    assert {"csrc/uplink.c", "tests/fuzz/fuzz.h", "tests/vectors/wire-v1.json"} < whole


def test_an_index_shows_the_readme_with_links_that_lead_there(tree: Path) -> None:
    """Once pyproject.toml says where the project lives; before that, its first sentence."""
    project = tree / "pyproject.toml"
    script = "import sys; from setuptools import build_meta; build_meta.build_sdist('.')"
    shown = []
    for more in "", '\n[project.urls]\nSource = "https://git.example/me/ttun"\n':
        project.write_text(project.read_text() + more)
        done = run(sys.executable, "-c", script, cwd=tree)
        assert done.returncode == 0, done.stderr
        (sdist,) = tree.glob("ttun_tunnel-*.tar.gz")
        with tarfile.open(sdist) as archive:
            file = archive.extractfile(f"{sdist.name.removesuffix('.tar.gz')}/PKG-INFO")
            assert file is not None
            shown.append(file.read().decode().partition("\n\n")[2])
    sentence, readme = shown
    assert sentence.count(".") == 1 and "](" not in sentence
    targets = re.findall(r"\]\(([^)]+)\)", readme)
    assert "https://git.example/me/ttun/raw/HEAD/docs/demo.svg" in targets
    assert "https://git.example/me/ttun/blob/HEAD/docs/services.md" in targets
    assert all(target.startswith(("https://", "#")) for target in targets), targets


def test_the_wheel_is_small_and_stripped(wheel: Path) -> None:
    assert wheel.name.startswith("ttun_tunnel-"), "PyPI's ttun is another project"
    assert wheel.stat().st_size < wheels.LARGEST
    with zipfile.ZipFile(wheel) as archive:
        codec = archive.read("ttun/_codec.abi3.so")
        metadata = archive.read(f"{wheel.name.rpartition('-cp')[0]}.dist-info/METADATA").decode()
    assert b".debug_info" not in codec
    assert b".symtab" not in codec
    assert "\nLicense-Expression: MIT\n" in metadata


def test_a_pressed_wheel_is_a_valid_zip_file(tmp_path: Path) -> None:
    """Strict installers refuse an entry whose size is not that of its data."""
    text = b"some text, some text" * 100
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as plain:
        plain.writestr("a/", b"")
        plain.writestr("a/b.py", text)
    press(tmp_path / "a.whl")
    with zipfile.ZipFile(tmp_path / "a.whl") as pressed:
        for item in pressed.infolist():
            assert (
                item.compress_type == zipfile.ZIP_DEFLATED or item.compress_size == item.file_size
            )
        assert pressed.read("a/b.py") == text
        assert pressed.getinfo("a/b.py").compress_size < len(text) // 10


FOR_ANNOTATIONS = {"__future__", "typing", "collections.abc"}


def bones(source: str) -> list[str]:
    """The statements of a program; definitions without what describes them."""
    shown = []
    tree = ast.parse(source)
    tree.body = [n for n in tree.body if "TYPE_CHECKING:" not in ast.unparse(n).split("\n")[0]]
    for node in ast.walk(tree):
        if not isinstance(node, ast.stmt):
            continue
        if isinstance(node, ast.ImportFrom) and node.module in FOR_ANNOTATIONS:
            continue
        text = ast.unparse(node)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring, or what stands in its place
        if isinstance(node, ast.AnnAssign) and node.value is not None:
            text = f"{ast.unparse(node.target)} = {ast.unparse(node.value)}"
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            args = [arg.arg for arg in ast.walk(node) if isinstance(arg, ast.arg)]
            text = f"{type(node).__name__} {node.name} {args}"
        elif hasattr(node, "body"):
            continue  # what is in it is seen by itself
        shown.append(text)
    return shown


def test_the_wheel_has_the_same_program(wheel: Path) -> None:
    """Comments, docstrings and annotations are not in it; what help(ttun.Server) shows is."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        rare = zipfile.ZipFile(io.BytesIO(archive.read("ttun/rare.zip")))
        for path in sorted(ROOT.glob("ttun/**/*.py")):
            if path.parent.name == "lab":
                continue
            source = path.read_text(encoding="utf-8")
            name = str(path.relative_to(ROOT))
            if name in names:
                built = archive.read(name).decode().partition("\n__path__.append(")[0]
            else:
                built = rare.read(name.partition("/")[2]).decode()
            assert bones(source) == bones(built), path
            if path.name == "tcp.py":
                assert len(built) < 0.8 * len(source)
        server = archive.read("ttun/server.py").decode()
    assert not any(name.startswith("ttun/lab") for name in names)
    assert ">>> server.start()" in server
    assert "listen:str|Sequence[str]|Listener=DEFAULT_LISTEN" in server, (
        "for type checkers of other programs"
    )


def test_what_a_wheel_has_not_is_one_line_and_where_it_is(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    for command in (["demo"], ["bench", "codec"], ["bench", "tunnel"]):
        done = run(sys.executable, "-m", "ttun", *command, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.count("\n") == 1
        assert f"./ttun.py {command[0]} in the source directory" in done.stderr
    whole = run(sys.executable, "-m", "ttun", "--version", cwd=tmp_path)
    assert whole.stdout.startswith("ttun "), whole.stderr


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('def f(a: int, *b: str, c: "x" = 1) -> int:\n    """Say."""\n    return a  # why\n',
         "def f(a,*b,c=1):\n return a\n"),
        ("x = 1 if  a else f'{b } - {c!r}' 'd'\n", "x=1 if a else f'{b} - {c!r}d'\n"),
        ('def f():\n    """Nothing else."""\n', "def f():\n ...\n"),
        ("class A:\n    x: int = 1\n\n    def f(self):\n        self.y: int = 2\n",
         "class A:\n x:int=1\n def f(self):\n  self.y=2\n"),
        ('x = """\n    # text\n    """\n', "x='\\n    # text\\n    '\n"),
        ('if x:\n    y = f(\n        1,  # one\n        "#",\n    )\n',
         "if x:\n y=f(1,'#')\n"),
        ("def f() -> A[\n    int\n]:\n    x: A[\n        int\n    ] = 1\n",
         "def f():\n x=1\n"),
        ('def gr\u00fc\u00df(\u00e4: "\u00f6") -> "\u00fc":\n    return \u00e4\n',
         "def gr\u00fc\u00df(\u00e4):\n return \u00e4\n"),
    ],
)  # fmt: skip
def test_compact_source(source: str, expected: str) -> None:
    assert compact(source) == expected


@long
def test_make_says_that_it_takes_a_network_and_with_the_wheels_takes_none(tree: Path) -> None:
    without = make(tree)
    assert without.returncode != 0
    said = [line for line in without.stderr.splitlines() if not line.startswith("make:")]
    assert said == [
        "pip cannot reach its package index: make needs network access (see .venv/pip.log)"
    ]
    shutil.copytree(WHEELS, tree / ".venv" / "wheels", dirs_exist_ok=True)
    built = make(tree)
    assert built.returncode == 0, built.stderr
    assert built.stdout.splitlines()[-1] == "built; now: sudo ./ttun.py server"
    with_tools = make(tree, "test")
    assert with_tools.stderr.splitlines()[:-1] == said, "what the tests take is not there"


@pytest.mark.parametrize("most", [2**31 - 1, 2**63 - 1], ids=["32-bit", "64-bit"])
def test_a_32_bit_system_may_take_atomic_operations_from_libatomic(
    tree: Path, tmp_path: Path, most: int
) -> None:
    """Whatever `uname -m` says: the compiler of Raspberry Pi OS makes code for ARMv6 everywhere.

    This processor has them all, so the codec does without.
    """
    script = f"import sys; sys.maxsize = {most}; sys.argv[0] = 'setup.py'; import setup"
    args = ("build_ext", "--build-lib", tmp_path)
    done = run(sys.executable, "-c", script, *args, cwd=tree, TTUN_CFLAGS="-O0")
    assert done.returncode == 0, done.stderr
    assert ("-latomic" in done.stdout) == (most < 2**32)
    (made,) = tmp_path.glob("ttun/_codec*.so")
    assert b"libc.so" in made.read_bytes() and b"libatomic" not in made.read_bytes()


@long
def test_root_leaves_nothing_of_roots_in_a_users_tree(tree: Path, tmp_path: Path) -> None:
    shutil.copytree(WHEELS, tree / ".venv" / "wheels")
    try:
        os.chown(tree, USER, USER)
    except OSError:
        pytest.skip("it takes root, with more users than one")
    if os.geteuid() != 0:
        pytest.skip("it takes root")
    for path in tree.rglob("*"):
        os.chown(path, USER, USER)

    def of_root() -> list[Path]:
        return [path for path in tree.rglob("*") if path.lstat().st_uid != USER]

    prefix = tmp_path / "prefix"
    installed = make(tree, "install", f"PREFIX={prefix}")
    assert installed.returncode == 0, installed.stderr
    assert (tree / ".venv" / ".built").exists(), "root built it, as nobody had before"
    assert of_root() == []
    assert (prefix / "bin" / "ttun").stat().st_uid == 0
    for path in tree.rglob("*.py"):
        os.utime(path)  # so that all byte-code there is old
    for command in ([tree / "ttun.py", "--version"], ["make", "uninstall", f"PREFIX={prefix}"]):
        assert run(*command, cwd=tree).returncode == 0
        assert of_root() == []
    (tree / "csrc" / "frame.c").write_text("no C\n")
    assert make(tree, "install", f"PREFIX={prefix}").returncode != 0
    assert of_root() == [], "nor if it fails"
