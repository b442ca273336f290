"""Where the key comes from, and how a server keeps one."""

from __future__ import annotations

import os
import pwd
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tunnel import PROGRAM, ROOT, eventually

from ttun.commands import key
from ttun.errors import TtunError, UsageError
from ttun.process import files


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
    with pytest.raises(TtunError, match=rf"is readable by other users \(chmod 600 {file}"):
        key.read_file(file)


def test_a_file_of_root_is_refused_to_others_with_what_to_do(places: Path) -> None:
    file = write(places / "key", b"secret", 0o000)
    program = "import sys; from pathlib import Path; from ttun.commands import key; "
    program += "key.read_file(Path(sys.argv[1]))"
    command = [sys.executable, "-c", program, str(file)]
    if os.geteuid() == 0:
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    assert f"cannot read the key file {file}: permission denied (use sudo)" in said


@pytest.fixture
def stranger() -> int:
    """A user who is neither root nor us."""
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    return pwd.getpwnam("daemon").pw_uid


def give(path: Path, user: int) -> Path:
    try:
        os.chown(path, user, user)
    except OSError:
        pytest.skip("no other user in this user namespace")
    return path


def test_a_file_of_another_user_is_refused_unless_sudo_says_that_he_called(
    places: Path, monkeypatch: pytest.MonkeyPatch, stranger: int
) -> None:
    monkeypatch.delenv("SUDO_UID", raising=False)
    file = give(write(places / "key", b"secret"), stranger)
    link = places / "link"
    link.symlink_to(file)
    for path in (file, link):
        with pytest.raises(TtunError, match=rf"{path} belongs to user daemon \(chown root {path}"):
            key.read_file(path)
    monkeypatch.setenv("SUDO_UID", str(stranger + 1))
    with pytest.raises(TtunError, match="belongs to user daemon"):
        key.read_file(file)
    monkeypatch.setenv("SUDO_UID", str(stranger))
    assert key.read_file(link) == b"secret"


def test_the_program_says_in_one_line_whose_file_it_does_not_take(
    places: Path, stranger: int
) -> None:
    file = give(write(places / "key", b"secret"), stranger)
    environment = {name: value for name, value in os.environ.items() if name != "SUDO_UID"}
    done = subprocess.run(
        [*PROGRAM, "server", "-m", "none", "--psk-file", file],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == (
        f"ttun: the key file {file} belongs to user daemon (chown root {file})\n"
    )


def test_a_user_may_have_a_key_of_his_own_and_one_of_roots(places: Path, stranger: int) -> None:
    program = "import os, sys; from pathlib import Path; from ttun.commands import key; "
    program += "os.chdir(sys.argv[1]); user = int(sys.argv[2]); os.setgid(user); os.setuid(user); "
    program += "print(key.read_file(Path('own')), key.read_file(Path('roots')))"
    give(write(places / "own", b"of his own"), stranger)
    os.chmod(places, 0o755)
    directory = places / "credentials"
    write(directory / "roots", b"root's", 0o440)
    os.chown(directory / "roots", 0, stranger)  # an access control list would do it as well
    (places / "roots").symlink_to("credentials/roots")
    environment = {**os.environ, "CREDENTIALS_DIRECTORY": ".", "PYTHONPATH": str(ROOT)}
    environment.pop("SUDO_UID", None)
    done = subprocess.run(
        [sys.executable, "-c", program, places, str(stranger)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout == "b'of his own' b\"root's\"\n", done.stderr


def test_a_credential_of_systemd_is_taken_whoever_owns_it(
    places: Path, monkeypatch: pytest.MonkeyPatch, stranger: int
) -> None:
    file = give(write(places / "psk", b"secret", 0o400), stranger)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(places))
    assert key.read_file(file) == b"secret"


@pytest.mark.parametrize("device", ["/dev/null", "/dev/zero", "/dev/tty"])
def test_a_device_is_no_key_file_and_nobody_is_told_to_change_its_mode(device: str) -> None:
    with pytest.raises(TtunError, match=r"is a device|cannot read") as raised:
        key.read_file(Path(device))
    assert "chmod" not in str(raised.value)


READ = "server -m none --psk-file {}"  # it gets as far as the cipher if there is a key
GIVEN = {
    "{} <(printf secret)": "unknown cipher",
    "{} <(sleep 1; echo secret; sleep 1)": "unknown cipher",
    "{} <(true)": "is empty",
    "{} /dev/stdin < <(echo secret)": "unknown cipher",
    "echo secret | {} /dev/stdin": "unknown cipher",
    "{} /dev/stdin <<< secret": "unknown cipher",
    "{} <(yes)": "larger than 65536 bytes",
}


@pytest.mark.parametrize("line", GIVEN)
def test_a_key_may_come_out_of_a_pipe(line: str) -> None:
    command = line.format(" ".join([*PROGRAM, *READ.split()]).format(""))
    done = subprocess.run(
        ["bash", "-c", command], stdin=subprocess.DEVNULL,
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert GIVEN[line] in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("option", ["--psk-file <(printf secret)", "@<(printf '%s' '-k secret')"])
def test_a_pipe_that_sudo_closed_is_named_with_what_works(option: str) -> None:
    """sudo(8) closes all descriptors from 3 on."""
    program, closes = " ".join(PROGRAM), "bash -c 'exec 63<&- 62<&-; exec \"$@\"' bash"
    done = subprocess.run(
        ["bash", "-c", f"{closes} {program} server -m none {option}"], stdin=subprocess.DEVNULL,
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode in (1, 2) and done.stderr.count("\n") == 1
    assert (
        "/dev/fd/63: it is closed (sudo closes <(COMMAND): use COMMAND | sudo ttun" in done.stderr
    )
    given = re.sub(r"<\(.*", "/dev/stdin", option)
    piped = option.partition("<(")[2].rstrip(")")
    command = f"{piped} | {closes} {program} server -m none {given}"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, check=False, timeout=60
    )
    assert "unknown cipher" in done.stderr


def test_a_pipe_of_somebody_else_is_taken_as_who_started_us_made_it(stranger: int) -> None:
    """As in ``pass show ttun | doas ttun server --psk-file /dev/stdin``."""
    becomes = ["setpriv", f"--reuid={stranger}", "--clear-groups", "sh", "-c", "echo secret | cat"]
    with subprocess.Popen(becomes, stdout=subprocess.PIPE) as made:
        assert made.stdout is not None
        with os.fdopen(os.dup(made.stdout.fileno())) as pipe:
            command = [*PROGRAM, *READ.format("/dev/stdin").split()]
            done = subprocess.run(
                command, stdin=pipe, capture_output=True, text=True, check=False, timeout=60
            )
    if made.returncode != 0:
        pytest.skip("no other user in this user namespace")
    assert "unknown cipher" in done.stderr


@pytest.mark.parametrize("what", ["nobody writes", "it does not end", "a byte now and then"])
def test_a_fifo_has_an_end_in_time(
    places: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(files, "WAIT", 2.0)
    fifo = places / "fifo"
    os.mkfifo(fifo, 0o600)
    said: list[str] = []

    def read() -> None:
        try:
            key.read_file(fifo)
        except TtunError as error:
            said.append(str(error))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    if what != "nobody writes":
        with fifo.open("wb", buffering=0) as writer:
            while reader.is_alive() and what != "it does not end":
                time.sleep(0.1)
                try:
                    writer.write(b"x")
                except BrokenPipeError:
                    break
            reader.join(20)
    reader.join(20)
    assert said == [
        f"cannot read the key file {fifo}: no end of file within 2 s"
    ]  # fmt: skip


def test_a_fifo_of_another_user_is_refused(places: Path, stranger: int) -> None:
    fifo = places / "fifo"
    os.mkfifo(fifo, 0o600)
    give(fifo, stranger)
    done = subprocess.run(
        [*PROGRAM, *READ.format(fifo).split()],
        capture_output=True, text=True, check=False, timeout=20,
    )  # fmt: skip
    assert f"the key file {fifo} belongs to user daemon" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_wait_for_a_key(places: Path, number: int) -> None:
    fifo, log = places / "fifo", places / "log"
    os.mkfifo(fifo, 0o600)
    with log.open("w") as file:
        process = subprocess.Popen([*PROGRAM, "server", "--psk-file", fifo], stderr=file)
    try:
        eventually(lambda: f"waiting for {fifo}" in log.read_text(), "it says that it waits")
        process.send_signal(number)
        assert process.wait(10) == 0, "as at any other moment of its start"
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in log.read_text()


def test_a_file_that_is_none_is_refused(places: Path) -> None:
    with pytest.raises(TtunError, match="No such file"):
        key.read_file(places / "nothing")
    with pytest.raises(TtunError, match="--psk-file takes a file name") as raised:
        key.read_file(Path("a key, not a name"))
    assert "a key, not" not in str(raised.value)
    with pytest.raises(TtunError, match="Is a directory"):
        key.read_file(places)
    with pytest.raises(TtunError, match="larger than"):
        key.read_file(write(places / "huge", bytes(key.MAX_SIZE + 1)))


@pytest.mark.parametrize("content", [b"", b"\n"])
def test_an_empty_key_is_refused(places: Path, content: bytes) -> None:
    with pytest.raises(UsageError, match="empty"):
        key.read_file(write(places / "key", content))
    with pytest.raises(UsageError, match="-k is empty"):
        key.find("", None)


def test_a_key_is_made_once_and_kept_private(places: Path) -> None:
    path = places / "new" / "psk"
    before = os.umask(0)
    try:
        made = key.create(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o755
    assert len(bytes.fromhex(made.decode())) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert key.create(path) == made, "a key that is there is not replaced"
    assert os.listdir(path.parent) == ["psk"], "nothing half-written is left"


def test_what_a_killed_server_of_the_same_number_left_is_no_trouble(places: Path) -> None:
    """In a container the number of the process is the same each time."""
    (places / f".psk.{os.getpid()}").write_bytes(b"half a k")
    assert len(key.create(places / "psk")) == 64
    assert os.listdir(places) == ["psk"]


def test_two_servers_that_make_a_key_at_once_agree(places: Path) -> None:
    program = "import sys; from pathlib import Path; from ttun.commands import key; "
    program += "print(key.create(Path(sys.argv[1])).decode())"
    command = [sys.executable, "-c", program, str(places / "psk")]
    servers = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(8)]
    made = {server.communicate()[0] for server in servers}
    assert len(made) == 1
    assert all(server.returncode == 0 for server in servers)


def test_a_key_that_cannot_be_kept_is_an_error(places: Path) -> None:
    write(places / "file", b"")
    with pytest.raises(TtunError, match=r"cannot write a key to .*: .* \(give a key with -k"):
        key.create(places / "file" / "psk")


def test_keys_are_fresh_and_need_no_quotes() -> None:
    first, second = key.generate(), key.generate()
    assert first != second
    assert len(first) == 64
    assert first.isalnum()


def test_a_server_takes_all_files_up_to_four(places: Path) -> None:
    files = [str(write(places / str(number), b"%d" % number)) for number in range(5)]
    for many in range(1, 5):
        assert key.find_all(None, files[:many]) == [b"%d" % number for number in range(many)]
    with pytest.raises(UsageError, match="5 files are too many"):
        key.find_all(None, files)
    assert key.find_all("given", []) == [b"given"]
    assert key.find_all(None, []) == []


def test_less_than_sixteen_bytes_are_weak(caplog: pytest.LogCaptureFixture) -> None:
    key.warn_if_short(bytes(16))
    assert caplog.text == ""
    key.warn_if_short(bytes(15))
    assert "weak key: 15 bytes" in caplog.text
