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

import ttun
from ttun.cli import build_parser
from ttun.commands import key
from ttun.commands.parser import join_values

pytest.importorskip("shtab", reason="shtab is not installed")
PARSERS = dict(manual.each(manual.whole_parser()))


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not shutil.which(program), reason=f"{program} is not installed")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """All four, written by the command that ``make install`` runs."""
    directory = tmp_path_factory.mktemp("manual")
    files = {}
    for form in ("man", "bash", "zsh", "fish"):
        text = subprocess.run(
            [sys.executable, "packaging/manual.py", form],
            cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "SOURCE_DATE_EPOCH": "86400"},
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        files[form] = directory / {"man": "ttun.1", "zsh": "_ttun"}.get(form, f"ttun.{form}")
        files[form].write_text(text)
    return files


def test_every_option_and_command_is_in_each(made: dict[str, Path]) -> None:
    assert {"bench link", "doctor", "tox"} <= set(PARSERS)
    for form, file in made.items():
        text = file.read_text().replace(r"\-", "-")
        text = re.sub(r"\\f[BIR]", " ", text)
        for words, parser in PARSERS.items():
            for name in {*parser._option_string_actions, *words.split()} - {"--help"}:
                written = re.sub("^--?", "", name) if form == "fish" else name
                assert re.search(rf"(?<![\w-]){re.escape(written)}(?![\w-])", text), (form, name)


def test_what_the_page_says_of_the_key_is_what_the_program_does(made: dict[str, Path]) -> None:
    page = made["man"].read_text()
    assert f".B {key.VARIABLE}\n" in page
    assert f".I {key.DEFAULT_FILE}\n" in page
    assert '"1970-01-02"' in page, "SOURCE_DATE_EPOCH"


def test_the_page_has_whole_sections_whose_examples_the_program_takes(
    made: dict[str, Path],
) -> None:
    page = made["man"].read_text()
    sections = re.split(r"^\.SH (.*)\n", page, flags=re.M)
    found = dict(zip(sections[1::2], sections[2::2]))
    for name in ("EXAMPLES", "EXIT STATUS", "SIGNALS", "ENVIRONMENT", "FILES", "SEE ALSO"):
        assert len(found[name].splitlines()) > 5, name
    for name in [*ttun.Server(b"key").facts(), "reason"]:
        assert f"TTUN_{name.upper()}" in found["ENVIRONMENT"], "of --up and --down"
    examples = re.findall(r"^# ttun ([^&\n]*)", found["EXAMPLES"].replace("\\-", "-"), re.M)
    assert len(examples) > 5
    parser = build_parser()
    for example in examples:
        parser.parse_args(join_values(example.split(), parser))


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


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with two files, and where a user's tunnel says what it does."""
    (tmp_path / "ttun").mkdir()
    for name in ("secret key", "secret.txt", "ttun/office.7.sock"):
        (tmp_path / name).touch()
    return tmp_path


def environment(place: Path) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "TERM": "dumb", "HOME": str(place),
            "XDG_RUNTIME_DIR": str(place)}  # fmt: skip


COMPLETIONS = [
    (["se"], {"server"}),
    ([""], {"server", "client", "bench", "tox"}),
    (["--ver"], {"--version"}),
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
    (["server", "--mptcp", "--rou"], {"--route"}),
    (["tox", "-I", "secret.t"], {"secret.txt"}),
    (["show", "of"], {"office"}),
]


@needs("bash")
@pytest.mark.parametrize(("words", "expected"), COMPLETIONS)
def test_bash_completes(
    made: dict[str, Path], place: Path, words: list[str], expected: set[str]
) -> None:
    # compopt is for a completion that readline started; here it would only complain.
    script = f"""
        source {made["bash"]}; compopt() {{ :; }}
        COMP_WORDS=(ttun "$@") COMP_CWORD=$#; _ttun; printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    out = subprocess.run(
        ["bash", "--norc", "-c", script, "bash", *words],
        cwd=place, env=environment(place), capture_output=True, text=True, check=True,
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
        os.chdir(directory)
        os.execvpe(shell[0], shell, environment(directory))
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
    ("ttun server --wire=v", "ttun server --wire=v1"),
    ("ttun show --watch off", "ttun show --watch office"),
    ("ttun client -m ch", "ttun client -m chacha20-poly1305"),
    ("ttun.py server --psk-file secret.", "ttun.py server --psk-file secret.txt"),
]


@needs("bash")
@pytest.mark.parametrize(("line", "expected"), PRESSED)
def test_bash_on_a_terminal(made: dict[str, Path], place: Path, line: str, expected: str) -> None:
    press(["bash", "--norc", "-i"], f"source {made['bash']}", line, expected, place)


@needs("zsh")
@pytest.mark.parametrize(("line", "expected"), PRESSED)
def test_zsh_on_a_terminal(made: dict[str, Path], place: Path, line: str, expected: str) -> None:
    start = f"fpath=({made['zsh'].parent} $fpath); autoload -U compinit; compinit -u -D"
    press(["zsh", "-f", "-i"], start, line, expected, place)


@needs("fish")
@pytest.mark.parametrize(
    ("words", "expected"),
    # fish reads -mt as -m with the value t: that is how it tells -m and -mtu apart.
    [case for case in COMPLETIONS if case[0][-1] != "-mt"],
)
def test_fish_completes(
    made: dict[str, Path], place: Path, words: list[str], expected: set[str]
) -> None:
    line = " ".join(["ttun", *words])
    out = subprocess.run(
        ["fish", "--no-config", "-c", f"source {made['fish']}; complete -C '{line}'"],
        cwd=place, env=environment(place), capture_output=True, text=True, check=True,
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
