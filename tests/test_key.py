"""Where the key comes from, and how a server keeps one."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from ttun import key
from ttun.errors import TtunError, UsageError


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(key, "DEFAULT_FILE", tmp_path / "etc" / "psk")
    monkeypatch.delenv(key.VARIABLE, raising=False)
    return tmp_path


def write(path: Path, content: bytes, mode: int = 0o600) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    path.chmod(mode)
    return path


def test_the_places_are_tried_in_their_order(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert key.find(None, None) is None
    write(key.DEFAULT_FILE, b"default")
    assert key.find(None, None) == b"default"
    monkeypatch.setenv(key.VARIABLE, "environment")
    assert key.find(None, None) == b"environment"
    file = write(places / "key", b"file")
    assert key.find(None, str(file)) == b"file"
    assert key.find("given", str(file)) == b"given"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"k\n", b"k"),
        (b"k\n\n", b"k\n"),
        (b" k ", b" k "),
        (b"\xff\x00\xfe\n", b"\xff\x00\xfe"),
        (b"k\r\n", b"k\r"),
    ],
)
def test_only_one_newline_at_the_end_is_cut(places: Path, content: bytes, expected: bytes) -> None:
    assert key.read_file(write(places / "key", content)) == expected


def test_bytes_that_are_not_utf_8_are_taken_as_given(monkeypatch: pytest.MonkeyPatch) -> None:
    assert key.find(os.fsdecode(b"\xff\xfek"), None) == b"\xff\xfek"
    monkeypatch.setitem(os.environb, key.VARIABLE.encode(), b"\xff\xfee")
    assert key.find(None, None) == b"\xff\xfee"


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660])
def test_a_file_that_others_can_read_is_refused(places: Path, mode: int) -> None:
    file = write(places / "key", b"secret", mode)
    with pytest.raises(TtunError, match=f"others can read .* chmod 600 {file}"):
        key.read_file(file)


def test_a_file_of_root_is_refused_to_others_with_what_to_do(places: Path) -> None:
    file = write(places / "key", b"secret", 0o000)
    program = "import sys; from pathlib import Path; from ttun import key; "
    program += "key.read_file(Path(sys.argv[1]))"
    command = [sys.executable, "-c", program, str(file)]
    if os.geteuid() == 0:
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    assert f"this user may not read the key file {file}: use sudo" in said


def test_a_file_that_is_none_is_refused(places: Path) -> None:
    with pytest.raises(TtunError, match="No such file"):
        key.read_file(places / "nothing")
    with pytest.raises(TtunError, match="Is a directory"):
        key.read_file(places)
    with pytest.raises(TtunError, match="more than"):
        key.read_file(write(places / "huge", bytes(key.MAX_SIZE + 1)))


@pytest.mark.parametrize("content", [b"", b"\n"])
def test_an_empty_key_is_refused(places: Path, content: bytes) -> None:
    with pytest.raises(UsageError, match="empty"):
        key.read_file(write(places / "key", content))
    with pytest.raises(UsageError, match="-k is empty"):
        key.find("", None)


def test_a_key_is_made_once_and_kept_private(places: Path) -> None:
    path = places / "new" / "psk"
    made = key.create(path)
    assert len(bytes.fromhex(made.decode())) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert key.create(path) == made, "a key that is there is not replaced"
    assert os.listdir(path.parent) == ["psk"], "nothing half-written is left"


def test_two_servers_that_make_a_key_at_once_agree(places: Path) -> None:
    program = "import sys; from pathlib import Path; from ttun import key; "
    program += "print(key.create(Path(sys.argv[1])).decode())"
    command = [sys.executable, "-c", program, str(places / "psk")]
    servers = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(8)]
    made = {server.communicate()[0] for server in servers}
    assert len(made) == 1
    assert all(server.returncode == 0 for server in servers)


def test_a_key_that_cannot_be_kept_is_an_error(places: Path) -> None:
    write(places / "file", b"")
    with pytest.raises(TtunError, match=r"cannot keep a key in .*; name one with -k"):
        key.create(places / "file" / "psk")


def test_keys_are_fresh_and_need_no_quotes() -> None:
    first, second = key.generate(), key.generate()
    assert first != second
    assert len(first) == 64
    assert first.isalnum()
