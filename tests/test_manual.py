"""The man page and the completions: all of the parser is in them, and the shells take them."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import manual
import pytest
from tunnel import ROOT

from ttun.commands import parser

TREE = manual.read(parser.build_parser(), [], "")
NAMES = sorted({name for c in TREE.all() for option in c.options for name in option.names})


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not shutil.which(program), reason=f"{program} is not installed")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """All four, written by the command that ``make install`` runs."""
    directory = tmp_path_factory.mktemp("manual")
    files = {}
    for form in manual.FORMATS:
        text = subprocess.run(
            [sys.executable, "packaging/manual.py", form],
            cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
            check=True,
        ).stdout  # fmt: skip
        files[form] = directory / {"man": "ttun.1", "zsh": "_ttun"}.get(form, f"ttun.{form}")
        files[form].write_text(text)
    return files


def test_the_tree_is_the_parsers_own() -> None:
    paths = {command.path for command in TREE.all()}
    assert {
        "",
        "server",
        "client",
        "bench",
        "bench codec",
        "bench tunnel",
        "bench link",
        "doctor",
    } <= paths
    assert {"-mtu", "--mtu", "-k", "--psk-file", "--against", "--version"} <= set(NAMES)


def test_every_option_and_command_is_in_each(made: dict[str, Path]) -> None:
    for form, file in made.items():
        text = re.sub(r"\\f[BIR]", "", file.read_text().replace(r"\-", "-"))
        for name in NAMES:
            written = manual._fish_name(name) if form == "fish" else name
            assert re.search(rf"(?<![\w-]){re.escape(written)}(?![\w-])", text), (form, name)
        for command in TREE.all():
            for word in command.words:
                assert word in text, (form, word)


def test_an_unknown_form_is_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert manual.main(["tcsh"]) == 2
    assert capsys.readouterr().err == "usage: python packaging/manual.py man|bash|zsh|fish\n"


@needs("mandoc")
def test_mandoc_finds_nothing_wrong(made: dict[str, Path]) -> None:
    done = subprocess.run(
        ["mandoc", "-Tlint", "-Wwarning", made["man"]], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


@needs("man")
def test_man_shows_it_without_a_warning(made: dict[str, Path]) -> None:
    done = subprocess.run(
        ["man", "--warnings", "-E", "UTF-8", "-l", made["man"]],
        capture_output=True, text=True, check=True,
        env={**os.environ, "MANWIDTH": "200", "PAGER": "cat"},
    )  # fmt: skip
    assert done.stderr == ""
    assert "ttun - a point-to-point tunnel" in done.stdout
    assert "MTU of the device, 576 to 65519 (default: 1280)" in done.stdout
    assert "'SERVER COMMAND :: CLIENT COMMAND'" in done.stdout
    assert "SIGTERM, SIGINT, SIGHUP" in done.stdout


COMPLETIONS = [
    (["se"], {"server"}),
    ([""], {"server", "client", "bench", "--version"}),
    (["server", "--lis"], {"--listen"}),
    (["server", "-mt"], {"-mtu"}),
    (["server", "-l", ":1", "--mt"], {"--mtu"}),
    (["bench", ""], {"codec", "tunnel", "link"}),
    (["bench", "link", "--congestion-c"], {"--congestion-control"}),
    (["bench", "link", "--emulator", ""], {"auto", "relay", "netem"}),
    (["bench", "tunnel", "--ag"], {"--against"}),
    (["client", "-m", "ae"], {"aes-256-gcm", "aegis-256"}),
    (["client", "--wire", ""], {"auto", "v1", "x1"}),
    (["server", "--buffers", ""], {"normal", "small"}),
    (["server", "-psk-file", "secret"], {"secret key", "secret.txt"}),
]


@needs("bash")
@pytest.mark.parametrize(("words", "expected"), COMPLETIONS)
def test_bash_completes(
    made: dict[str, Path], tmp_path: Path, words: list[str], expected: set[str]
) -> None:
    for name in ("secret key", "secret.txt"):
        (tmp_path / name).touch()
    # compopt is for a completion that readline started; here it would only complain.
    script = f"""
        source {made["bash"]}; compopt() {{ :; }}
        COMP_WORDS=(ttun "$@") COMP_CWORD=$#; _ttun; printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    out = subprocess.run(
        ["bash", "--norc", "-c", script, "bash", *words],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert out.stderr == ""
    offered = set(out.stdout.splitlines())
    assert expected <= offered
    if words[-1]:
        assert offered == expected


@needs("bash")
def test_bash_offers_nothing_where_only_the_user_knows(made: dict[str, Path]) -> None:
    line = "COMP_WORDS=(ttun client -k '') COMP_CWORD=3"
    script = f"source {made['bash']}; {line}; _ttun; declare -p COMPREPLY"
    out = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout == "declare -a COMPREPLY=()\n"


def press(shell: list[str], start: str, line: str, expected: str, directory: Path) -> None:
    """Type a line and a tab into a shell on a terminal; wait for what it makes of them."""
    pid, terminal = pty.fork()
    if pid == 0:
        environment = {"PATH": os.environ["PATH"], "TERM": "dumb", "HOME": str(directory)}
        os.chdir(directory)
        os.execvpe(shell[0], shell, environment)
    shown = b""

    def wait_for(text: str) -> None:
        nonlocal shown
        deadline = time.monotonic() + 20
        while text.encode() not in shown:
            assert select.select([terminal], [], [], max(0, deadline - time.monotonic()))[0], shown
            shown += os.read(terminal, 4096)

    try:
        os.write(terminal, f"{start}; echo lo''aded\r".encode())
        wait_for("loaded")
        shown = b""
        os.write(terminal, f"{line}\t".encode())
        wait_for(expected)
    finally:
        os.close(terminal)
        os.waitpid(pid, 0)


PRESSED = [
    ("ttun se", "ttun server "),
    ("ttun bench tu", "ttun bench tunnel "),
    ("ttun client --ci", "ttun client --cipher"),
    ("ttun server --mptcp=t", "ttun server --mptcp=true"),
    ("ttun server -mptcp=f", "ttun server -mptcp=false"),
    ("ttun client -m ch", "ttun client -m chacha20-poly1305"),
    ("ttun.py server --psk-file sec", "ttun.py server --psk-file secret.txt"),
]


@needs("bash")
@pytest.mark.parametrize(("line", "expected"), PRESSED)
def test_bash_on_a_terminal(
    made: dict[str, Path], tmp_path: Path, line: str, expected: str
) -> None:
    (tmp_path / "secret.txt").touch()
    press(["bash", "--norc", "-i"], f"source {made['bash']}", line, expected, tmp_path)


@needs("zsh")
@pytest.mark.parametrize(("line", "expected"), PRESSED)
def test_zsh_on_a_terminal(made: dict[str, Path], tmp_path: Path, line: str, expected: str) -> None:
    (tmp_path / "secret.txt").touch()
    start = f"fpath=({made['zsh'].parent} $fpath); autoload -U compinit; compinit -u -D"
    press(["zsh", "-f", "-i"], start, line, expected, tmp_path)


@needs("fish")
@pytest.mark.parametrize(
    ("words", "expected"),
    # fish reads -mt as -m with the value t: that is how it tells -m and -mtu apart.
    [case for case in COMPLETIONS if case[0][-1] != "-mt"],
)
def test_fish_completes(
    made: dict[str, Path], tmp_path: Path, words: list[str], expected: set[str]
) -> None:
    for name in ("secret key", "secret.txt"):
        (tmp_path / name).touch()
    line = " ".join(["ttun", *words])
    out = subprocess.run(
        ["fish", "--no-config", "-c", f"source {made['fish']}; complete -C '{line}'"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
        env={**os.environ, "HOME": str(tmp_path)},
    )  # fmt: skip
    assert out.stderr == ""
    offered = {row.split("\t")[0] for row in out.stdout.splitlines()}
    # fish offers options only behind a dash
    assert {word for word in expected if words[-1] or word[0] != "-"} <= offered
    assert "genkey" not in offered or len(words) == 1


@needs("fish")
@pytest.mark.parametrize("prefix", ["/usr", "/usr/local"])
def test_a_distributions_fish_looks_where_make_install_puts_it(prefix: str, tmp_path: Path) -> None:
    if shutil.which("fish") != "/usr/bin/fish":
        pytest.skip("this fish was built by hand")
    command = ["make", "-n", "install", f"PREFIX={prefix}"]
    plan = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    places = subprocess.run(
        ["/usr/bin/fish", "-c", "string join \\n $fish_complete_path"],
        env={"HOME": str(tmp_path)}, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    found = re.search(r"> (\S+)/ttun\.fish", plan)
    assert found
    assert found[1] in places.splitlines()
