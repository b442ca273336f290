"""Keys on the command line: hidden however they are written, and shown by no error."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from tunnel import PROGRAM, eventually

from ttun.cli import build_parser, main
from ttun.commands.parser import join_values
from ttun.process import argv
from ttun.tox import options as tox_options

KEY = "the-Key.of=this/very+test"


def blocked(*command: str) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
    """A program that waits in its first line on stderr: into a pipe that is full."""

    @contextlib.contextmanager
    def start() -> Iterator[subprocess.Popen[bytes]]:
        readable, writable = os.pipe()
        os.set_blocking(writable, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writable, bytes(65536))
        os.set_blocking(writable, True)
        process = subprocess.Popen(command, stderr=writable, stdin=subprocess.DEVNULL)
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            os.close(readable)
            os.close(writable)

    return start()


def shown(pid: int) -> list[str]:
    """The command line of a process as ps shows it."""
    line = Path(f"/proc/{pid}/cmdline").read_bytes()
    return [os.fsdecode(part) for part in line.split(b"\0")[:-1]]


FIELDS = len(KEY) * "*"
HIDDEN = {  # what is typed, and what is seen of it; all of them fail, so no device is made
    f"server -m none -k {KEY}": f"server -m none -k {FIELDS}",
    f"server -m none -k{KEY}": f"server -m none -k{FIELDS}",
    f"server -k={KEY} -m none": f"server -k={FIELDS} -m none",
    f"server -m none --psk {KEY}": f"server -m none --psk {FIELDS}",
    f"server -m none --psk={KEY}": f"server -m none --psk={FIELDS}",
    f"client -s h -k {KEY} -k{KEY} --psk={KEY} --psk -m -m none": (
        f"client -s h -k {FIELDS} -k{FIELDS} --psk={FIELDS} --psk ** -m none"
    ),
    f"server -psk {KEY}": f"server -*** {FIELDS}",
    f"server -psk={KEY}": f"server -psk={FIELDS}",
    f"server --psk-fil {KEY}": f"server --******* {FIELDS}".replace("--*", "-**", 1),
    f"server -k {KEY} extra": f"server -k {FIELDS} *****",
    f"server -k {KEY} -mtu many": f"server -k {FIELDS} -mtu many",
    f"client -s h --proxy {KEY} -m none": f"client -s h --proxy {FIELDS} -m none",
    f"client -s h --proxy={KEY} -m none": f"client -s h --proxy={FIELDS} -m none",
    f"client -s h --proxy http://a:{KEY}@h:1 -k{KEY} --proxy {KEY} -m none": (
        f"client -s h --proxy {'*' * 13}{FIELDS} -k{FIELDS} --proxy {FIELDS} -m none"
    ),
    f"client -s h -proxy {KEY}": f"client -s h -***** {FIELDS}",
    f"client -s h --prox {KEY}": f"client -s h --**** {FIELDS}".replace("--*", "-**", 1),
    f"client -s h --prox={KEY}": f"client -s h --prox={FIELDS}",
    f"server --proxy {KEY}": f"server -****** {FIELDS}",
    f"doctor --proxy {KEY}": f"doctor -****** {FIELDS}",
    f"tox --proxy {KEY} -x": f"tox -****** {FIELDS} -*",
    f"-k {KEY} server": f"-* {FIELDS} server",
    f"doctor -k {KEY}": f"doctor -* {FIELDS}",
    f"tox -s {KEY} -x": f"tox -s {FIELDS} -*",
    f"tox -s{KEY} -x": f"tox -s{FIELDS} -*",
    f"tox -dqs{KEY} -L nonsense": f"tox -dqs{FIELDS} -L nonsense",
    f"tox -dqs {KEY} -s -s -D 1080 -p": f"tox -dqs {FIELDS} -s ** -D 1080 -p",
    f"tox -k {KEY}": f"tox -* {FIELDS}",
}


@pytest.mark.parametrize("line", HIDDEN)
def test_a_key_is_hidden_in_the_process_list_however_it_is_written(line: str) -> None:
    """Also where the command line is wrong, before that is said: reading it may take a while."""
    command = [*PROGRAM, *line.split()]
    with blocked(*command) as process:
        own = len(HIDDEN[line].split())

        def seen() -> list[str]:
            return shown(process.pid)[-own:]

        eventually(lambda: seen() == HIDDEN[line].split(), f"{seen()} is hidden", 10)
        assert not any(KEY in part for part in shown(process.pid))
        assert process.poll() is None, "it is there to be seen"


def test_a_secret_is_hidden_behind_the_name_of_tuntox(tmp_path: Path) -> None:
    link = tmp_path / "tuntox"
    link.symlink_to(PROGRAM[1])
    with blocked(PROGRAM[0], str(link), "-d", "-s", KEY, "-x") as process:
        wanted = [str(link), "-d", "-s", FIELDS, "-*"]
        eventually(lambda: shown(process.pid)[-5:] == wanted, "it is hidden", 10)


def test_arguments_of_any_bytes_are_hidden_to_the_byte() -> None:
    key = os.fsdecode("schlüssel €".encode() + b"\xff\xfe \n")
    with blocked(*PROGRAM, "server", "--psk", key, "--user", "ä", "-m", "none") as process:
        stars = len(os.fsencode(key)) * "*"
        wanted = ["--psk", stars, "--user", "ä", "-m", "none"]
        eventually(lambda: shown(process.pid)[-6:] == wanted, "it is hidden", 10)


@pytest.mark.hosts
def test_a_key_is_hidden_without_proc() -> None:
    """Nobody has mounted it in this program's own place; others outside see it all the same."""
    script = 'mount -t tmpfs none /proc && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", script, "sh", *PROGRAM, "server", "-m", "none"]
    with blocked(*command, "-k", KEY) as process:
        eventually(lambda: shown(process.pid)[-2:] == ["-k", FIELDS], "it is hidden", 10)


def code_of(line: Sequence[str]) -> object:
    """The exit code of a command line that is wrong."""
    try:
        return main(line)
    except SystemExit as end:
        return end.code


WRONG = [  # command lines with a key where none belongs
    ["server", "-psk", KEY],
    ["server", "-psk=" + KEY],
    ["server", "-ps", KEY],
    ["server", "-p" + KEY],
    ["server", "-key", KEY],
    ["server", "--key", KEY],
    ["server", "--psk-fil", KEY],
    ["server", "--psk-fil=" + KEY],
    ["server", "-psk-f" + KEY],
    ["server", "--psk-file", KEY],
    ["server", "--psk-file", KEY.replace("/", "")],
    ["server", "--psk-file", 300 * KEY],
    ["server", "-x" + KEY],
    ["server", "--" + KEY],
    ["server", "-k", KEY, KEY],
    ["server", "-k", KEY, "--", KEY],
    ["server", "-takeover" + KEY],
    ["server", "--takeover=" + KEY],
    ["server", "--tox", KEY],
    ["server", "-mptcp", KEY],
    ["server", "-h=" + KEY],
    ["client", "-k", KEY, "-s", "h:1", "extra" + KEY],
    ["client", "-k", KEY, "-s", "h:1", "-server", KEY],
    ["client", "-k", KEY],
    ["client", "-k", "k", "-s", "h:1", "--proxy", KEY],
    ["client", "-k", "k", "-s", "h:1", "--proxy", f"http://u:{KEY}"],
    ["client", "-k", "k", "-s", "h:1", "--proxy", f"http://u:{KEY}@h"],
    ["client", "-k", "k", "-s", "h:1", f"--proxy=socks4://u:{KEY}@h:1"],
    ["client", "-k", "k", "-s", "h:1", "-proxy", KEY],
    ["client", "-k", "k", "-s", "h:1", f"-proxy={KEY}"],
    ["server", "--proxy", KEY],
    ["-k", KEY, "server"],
    ["--version=" + KEY],
    [KEY],
    ["doctor", "-k", KEY],
    ["show", "ttun0", KEY],
    ["show", "-k", KEY],
    ["genkey", KEY],
    ["demo", KEY],
    ["bench", KEY],
    ["bench", "-k", KEY, "codec"],
    ["bench", "codec", KEY],
    ["tox", "-k", KEY],
    ["tox", "-k" + KEY],
    ["tox", KEY],
    ["tox", "-D", KEY],
    ["tox", "-i", KEY, "-p"],
    ["tox", "-ds" + KEY, "-x" + KEY],
    ["tox", "-s", KEY, "--", KEY],
    ["tox", "-s", KEY + 1000 * "x"],
]


@pytest.mark.parametrize("line", WRONG, ids=lambda line: " ".join(line)[:40].replace(KEY, "KEY"))
def test_no_error_shows_what_may_be_a_key(
    line: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TUNTOX_SHARED_SECRET", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", "/nonexistent")
    code = code_of(line)
    out, err = capsys.readouterr()
    assert code == (1 if "--psk-file" in line else 2)
    assert err.count("\n") == 1
    assert KEY not in out + err
    assert KEY[:8] not in out + err


@pytest.mark.parametrize("variable", ["ALL_PROXY", "all_proxy"])
@pytest.mark.parametrize("value", [f"ftp://me:{KEY}@h:1", f"socks5://me:{KEY}@h:1", KEY])
def test_no_error_shows_the_password_of_a_proxy(
    variable: str, value: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    assert main(["tox"]) == 2
    assert KEY not in capsys.readouterr().err


SUGGESTED = {
    "server -psk x": "unknown option -psk (did you mean --psk or --psk-file?)",
    "server --psk-fil x": "unknown option --psk-fil (did you mean --psk-file?)",
    "server -tak": "unknown option -tak (did you mean --takeover?)",
    "server -mtux": "unknown option (not shown: it may be a key; did you mean --mtu?)",
    "server -mtu1400": "unknown option (not shown: it may be a key; did you mean --mtu?)",
    "server --take-over": "unknown option (not shown: it may be a key; did you mean --takeover?)",
    "server -s h": "unknown option -s;",
    "server -listen :5": "unknown option -listen (did you mean --listen?)",
    "server -listen=:5 -m none": "unknown option -listen (did you mean --listen?)",
    "server -listen:5": "unknown option (not shown: it may be a key; did you mean --listen?)",
    "server -lis :5": "unknown option -lis (did you mean --listen?)",
    "client -server h": "unknown option -server (did you mean --server?)",
    "client -cipher=x -s h": "unknown option -cipher (did you mean --cipher?)",
    "client -s h -listen :5": "unknown option (not shown: it may be a key); see",
    "clinet -s h": "unknown command (choose from server, client, demo, bench, show, genkey, "
    "doctor, tox; did you mean client?)",
}


@pytest.mark.parametrize("line", SUGGESTED)
def test_a_mistyped_option_is_named_where_it_is_one(
    line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_of(line.split()) == 2
    assert SUGGESTED[line] in capsys.readouterr().err


def parsed(line: Sequence[str]) -> dict[str, object]:
    parser = build_parser()
    return vars(parser.parse_args(join_values(line, parser)))


def test_the_options_of_go_ttun_stay_with_one_dash_and_values_may_be_joined() -> None:
    assert parsed(["server", "-takeover"])["takeover"] is True
    assert parsed(["server", "-psk-file", "x"])["psk_file"] == ["x"]
    assert parsed(["server", "-mtu", "1400", "-wire=x1"])["wire"] == "x1"
    joined = parsed(["server", f"-k{KEY}", "-l:5", "-maegis-256"])
    assert (joined["psk"], joined["listen"], joined["cipher"]) == (KEY, [":5"], "aegis-256")
    assert parsed(["client", "-sh:1", "-k=-x"])["server"] == ["h:1"]


@pytest.mark.parametrize(
    "line",
    [
        "server -k - -l :5 -takeover --dev t -mptcp=true --route 192.0.2.0/24",
        "client -s h:1 --up true --user x -mtu 1400",
        "show ttun0 --json",
        "doctor host:1",
        "bench tunnel --rounds 3 --against openvpn",
        "bench link --rate 50/10 --rtt 40 --loss 0,1 --queue 100 --congestion-control cubic",
        "genkey",
        "demo --size 3",
    ],
)
def test_nothing_else_is_hidden(line: str) -> None:
    words = line.split()
    parsed(words)  # it is right
    places = list(argv.find_secrets(words, build_parser()))
    assert places == ([(2, 0)] if "-k" in words else [])


def test_nothing_else_is_hidden_of_the_options_of_tuntox() -> None:
    line = "tox -d -i ID -L 1:h:2 -D 1080 -D1081 -C dir -dp -t 0 -V -z -F x"
    assert list(tox_options.find_secrets(line.split())) == []
