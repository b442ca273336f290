"""Options in a file: ``ttun client @FILE``."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from tunnel import CLIENT, PROGRAM, SERVER, Bench

from ttun.commands.parser import build_parser, join_values
from ttun.errors import TtunError


def write(path: Path, text: str, mode: int = 0o600) -> str:
    path.write_text(text)
    path.chmod(mode)
    return f"@{path}"


def words(*arguments: str) -> list[str]:
    return join_values(arguments, build_parser())


FILE = r"""
# the office
-s vpn.example.net   # behind NAT
--up 'echo "it is up" # really'
  --down "a \"b\" \\ c"
-k it\'s#one'"'key
--route	192.0.2.0/24
-takeover
--psk -x
--dev ""
"""
READ = [
    "-s=vpn.example.net", '--up=echo "it is up" # really', '--down=a "b" \\ c', "-k=it's#one\"key",
    "--route=192.0.2.0/24", "-takeover", "--psk=-x", "--dev", "",
]  # fmt: skip


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_it_is_read_as_a_shell_reads_words(tmp_path: Path, ends: str) -> None:
    file = write(tmp_path / "o", FILE.replace("\n", ends))
    assert words("client", "-mtu", "1400", file, "-m", "x") == [
        "client", "-mtu=1400", *READ, "-m=x"
    ]  # fmt: skip
    assert words("client", write(tmp_path / "none", "")) == ["client"]


def test_a_key_of_any_bytes_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "o").write_bytes(b"-k '\xff\xfe \xc2\x85'")
    (tmp_path / "o").chmod(0o600)
    assert os.fsencode(words("server", f"@{tmp_path}/o")[1]) == b"-k=\xff\xfe \xc2\x85"


def test_only_a_bare_word_names_a_file(tmp_path: Path) -> None:
    file = write(tmp_path / "o", "-m x\n@other\n")
    for option in ("-k", "--psk", "-s", "--up"):
        assert words("client", option, file) == ["client", f"{option}={file}"]
    assert words("client", f"-k{file}") == ["client", f"-k{file}"]
    assert words("client", file) == ["client", "-m=x", "@other"], "no file within a file"
    assert words("client", "-mptcp", file) == ["client", "-mptcp", "-m=x", "@other"]
    for other in ("show", "doctor", "genkey"):
        assert words(other, file) == [other, file]


@pytest.mark.parametrize("line", ["-k secret", "-ksecret", "--psk secret", "--psk=secret", "-k=x"])
@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660])
def test_one_with_a_key_is_not_for_others(tmp_path: Path, line: str, mode: int) -> None:
    file = write(tmp_path / "o", f"-m aes-256-gcm\n{line}\n", mode)
    with pytest.raises(TtunError, match=r"key .*/o is readable by other users \(chmod 600 .*/o"):
        words("server", file)
    assert words("server", write(tmp_path / "o", f"{line}\n"))[0] == "server"


def test_a_proxy_is_a_secret_only_with_a_password(tmp_path: Path) -> None:
    for line in ("--proxy http://h:1", "--proxy=http://h:1"):
        assert words("client", write(tmp_path / "o", line, 0o644))[0] == "client"
        with pytest.raises(TtunError, match="is readable by other users"):
            words("client", write(tmp_path / "o", line.replace("h:", "me:pw@h:"), 0o644))


def test_one_of_another_editor_begins_with_a_mark(tmp_path: Path) -> None:
    (tmp_path / "o").write_bytes(b"\xef\xbb\xbf-m x\r\n")
    assert words("server", f"@{tmp_path}/o") == ["server", "-m=x"]


def test_one_without_a_key_others_may_read_but_not_write(tmp_path: Path) -> None:
    text = "--psk-file /etc/ttun/psk\n--listen :1\n-m x\n"
    assert len(words("server", write(tmp_path / "o", text, 0o644))) == 4
    with pytest.raises(TtunError, match="is writable by other users"):
        words("server", write(tmp_path / "o", text, 0o646))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("-m x\n-k 'sec", r"/o, line 2: a quote or backslash"),
        ('--up "a', "line 1: a quote"),
        ("-m x\\", "line 1: a quote or backslash"),
        ("\n-k a\0b", "line 2: it has a zero byte"),
        (70000 * "#", "larger than 65536 bytes"),
    ],
)
def test_one_that_is_wrong_is_an_error_without_what_is_in_it(
    tmp_path: Path, text: str, why: str
) -> None:
    with pytest.raises(TtunError, match=why) as raised:
        words("server", write(tmp_path / "o", text))
    assert "sec" not in str(raised.value)


@pytest.mark.parametrize("name", ["", "/nothing", "/dev"])
def test_one_that_is_none_is_an_error(name: str) -> None:
    with pytest.raises(TtunError, match=r"cannot read the options in|@ without a file name"):
        words("client", f"@{name}")


def test_what_is_wrong_in_it_is_one_line_and_no_key(tmp_path: Path) -> None:
    for text in ("-k a-key\nextra-key\n", "-psk a-key\n", "-k a-key\n-mtu many\n", "a-key"):
        file = write(tmp_path / "o", text)
        done = subprocess.run(
            [*PROGRAM, "client", "-s", "h", file], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr.count("\n"), "-key" in done.stderr) == (2, 1, False)
    file = write(tmp_path / "o", "-k a-key\n@/etc/other-key\n")
    done = subprocess.run([*PROGRAM, "client", file], capture_output=True, text=True, check=False)
    assert "client: unexpected @FILE: a file of options cannot name another one; " in done.stderr


@pytest.mark.hosts
@pytest.mark.parametrize("bench", ["x1"], indirect=True)
def test_both_ends_run_with_it_and_ps_shows_its_name_only(bench: Bench, tmp_path: Path) -> None:
    server = bench.start(SERVER, "server", write(tmp_path / "s", "-k 'a secret'\n-l :20204\n"))
    server.says("listening on")
    file = write(tmp_path / "c", "-s 192.0.2.1:20204 # there\n-k 'a secret'\n")
    client = bench.start(CLIENT, "client", file, *bench.options, environment={})
    client.says("authenticated")
    bench.answers()
    line = Path(f"/proc/{client.process.pid}/cmdline").read_bytes()
    assert file.encode() in line and b"secret" not in line
