"""A saved identity that is damaged ends the start, and no saved identity is ever written to.

Real toxcore and real files, of which each kind of damage is made in turn. Nothing here gets as far
as a network: it ends before, or a Tox is opened and never iterated.
"""

from __future__ import annotations

import logging
import os
import random
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import toxlab
from machine import IS_NOBODY_HERE
from tunnel import run_program

from ttun.errors import TtunError
from ttun.tox import identity, instance, toxcore

pytestmark = pytest.mark.tox

HEADER = 16  # bytes: 0, toxcore's magic, then the length and the type of the section with the keys
NOSPAM = (
    4  # bytes, the first ones in that section; no part of the file tells whether they are right
)
KEYS = slice(HEADER + NOSPAM, HEADER + NOSPAM + 2 * toxcore.PUBLIC_KEY_SIZE)


def good() -> tuple[bytes, bytes]:
    """A saved identity with a friend in it, and its address."""
    tox, friend = instance.Tox(udp_ports=None), instance.Tox(udp_ports=None)
    try:
        assert tox.accept_friend(friend.address()[: toxcore.PUBLIC_KEY_SIZE]) is not None
        return tox.savedata(), tox.address()
    finally:
        tox.close()
        friend.close()


SAVED, ADDRESS = (bytes(100), b"") if toxlab.why_not() else good()


def flipped(bit: int) -> bytes:
    data = bytearray(SAVED)
    data[bit // 8] ^= 1 << bit % 8
    return bytes(data)


DAMAGED_BYTES = {
    "empty": b"",
    "one byte": SAVED[:1],
    "cut in the magic": SAVED[:7],
    "cut behind the magic": SAVED[:8],
    "cut in the keys": SAVED[: HEADER + 40],
    "cut in what follows": SAVED[: KEYS.stop + 11],
    "random": random.Random(1).randbytes(len(SAVED)),
    "zeros": bytes(len(SAVED)),
    "text": b"what somebody wrote here\n" * 40,
    "another version": SAVED[:4] + bytes([SAVED[4] + 1]) + SAVED[5:],
    "encrypted": b"toxEsave" + random.Random(2).randbytes(len(SAVED)),
    "keys of an unknown type": flipped(8 * 12 + 6),
    "another secret key": SAVED[:60] + bytes([SAVED[60] ^ 1]) + SAVED[61:],
}


def as_file(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


def huge(path: Path) -> None:
    with path.open("wb") as file:
        file.write(SAVED)
        file.truncate(1 << 40)


def of_somebody_else(path: Path) -> None:
    path.write_bytes(SAVED)
    try:
        os.chown(path, 12345, -1)
    except OSError:
        pytest.skip("no other user in this user namespace")


DAMAGED: dict[str, Callable[[Path], object]] = {
    **{name: as_file(data) for name, data in DAMAGED_BYTES.items()},
    "huge": huge,
    "of somebody else": of_somebody_else,
    "a directory": Path.mkdir,
    "a FIFO": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to nothing": lambda path: path.symlink_to(path.with_name("missing")),
}


def seen(path: Path) -> tuple[object, ...]:
    """What there is to see of a file, its first bytes too."""
    found = path.lstat()
    data = b""
    if stat.S_ISREG(found.st_mode):
        with path.open("rb") as file:
            data = file.read(1 << 20)
    return found.st_mode, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns, data


def nodes(directory: Path) -> str:
    """A list of nodes that leads nowhere."""
    file = directory / "nodes.json"
    key = "7E5668E0EE09E19F320AD47902419331FFEE147BB3606769CFBE921A2A2FD34C"
    file.write_text(f'{{"nodes": [{{"ipv4": "127.0.0.1", "port": 9, "public_key": "{key}"}}]}}')
    return str(file)


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_identity_ends_the_start_and_stays_as_it_is(tmp_path: Path, kind: str) -> None:
    for mode in (0o600, 0o644):
        directory = tmp_path / oct(mode)
        directory.mkdir()
        path = directory / identity.SAVE
        DAMAGED[kind](path)
        if not path.is_symlink():
            path.chmod(mode)
        for arguments in (
            ["tox", "-s", "secret", "-b", nodes(tmp_path), "-C", str(directory)],
            ["server", "--tox", "-k", "secret secret secret secret", "--tox-dir", str(directory)],
        ):
            if arguments[0] == "server":
                arguments += ["--tox-nodes", nodes(tmp_path)]
            before = seen(path)
            done = run_program(*arguments, timeout=30)
            said = done.stdout + done.stderr
            assert done.returncode == 1, said
            assert said.startswith("ttun: cannot ") or "belongs to" in said
            assert str(path) in said
            assert said.count("\n") == 1, said
            assert seen(path) == before
            assert os.listdir(directory) == [identity.SAVE]


def test_each_bit_of_the_header_is_seen() -> None:
    for bit in range(8 * HEADER):
        with pytest.raises(instance.BadIdentity):
            instance.Tox(savedata=flipped(bit), udp_ports=None)


def test_each_bit_of_the_keys_is_seen_or_makes_no_difference() -> None:
    """X25519 leaves out five bits of a secret key (RFC 7748)."""
    harmless = []
    for bit in range(8 * KEYS.start, 8 * KEYS.stop):
        try:
            tox = instance.Tox(savedata=flipped(bit), udp_ports=None)
        except instance.BadIdentity:
            continue
        assert tox.address() == ADDRESS
        tox.close()
        harmless.append(bit)
    assert len(harmless) == 5


@pytest.mark.skipif(
    os.getuid() != 0 or not IS_NOBODY_HERE, reason="no other user in this user namespace"
)
def test_an_identity_that_this_user_may_not_read_ends_the_start(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    (tmp_path / identity.SAVE).write_bytes(SAVED)
    before = seen(tmp_path / identity.SAVE)
    done = run_program(
        "tox", "-q", "-U", "nobody", "-b", nodes(tmp_path), "-C", str(tmp_path), timeout=30
    )
    assert done.returncode == 1
    assert done.stderr == f"ttun: cannot read {tmp_path / identity.SAVE}: Permission denied\n"
    assert seen(tmp_path / identity.SAVE) == before


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o640, 0o644, 0o666])
def test_a_good_identity_is_only_kept_from_others(tmp_path: Path, mode: int) -> None:
    path = tmp_path / identity.SAVE
    path.write_bytes(SAVED)
    path.chmod(mode)
    before = seen(path)[1:4]
    tox = instance.open_tox(tmp_path, 0, None, server=True)
    assert tox.address() == ADDRESS
    assert tox.friends() == [], "they were never asked for the secret"
    tox.close()
    assert seen(path)[1:4] == before
    assert path.read_bytes() == SAVED
    assert stat.S_IMODE(path.stat().st_mode) == (0o400 if mode == 0o400 else 0o600)


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o644])
def test_a_good_identity_that_cannot_be_changed_is_used(
    tmp_path: Path, mode: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory that is read-only for root too: a mount, in which nothing can be changed."""
    path = tmp_path / identity.SAVE
    path.write_bytes(SAVED)
    path.chmod(mode)

    def read_only(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    for function in ("chmod", "rename", "replace"):
        monkeypatch.setattr(os, function, read_only)
    monkeypatch.setattr(Path, "chmod", read_only)
    with caplog.at_level(logging.INFO):
        tox = instance.open_tox(tmp_path, 0, None, server=True)
    assert tox.address() == ADDRESS
    tox.close()
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert not any("the next start has another" in line for line in said)
    assert len(said) == (mode == 0o644), "that others can read it is true, and is said"


def test_a_start_that_fails_leaves_the_process_id_of_another(tmp_path: Path) -> None:
    (tmp_path / identity.SAVE).write_bytes(b"")
    pid_file = tmp_path / "pid"
    pid_file.write_text("1234567890\n")
    options = ["-b", nodes(tmp_path), "-C", str(tmp_path), "-F", str(pid_file)]
    done = run_program("tox", *options, timeout=30)
    assert done.returncode == 1
    assert pid_file.read_text() == "1234567890\n"


def test_no_memory_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """tox_options_new() returns NULL then, and every use of it would be a crash."""
    ffi, lib = toxcore.load()

    class Lack:
        def __getattr__(self, name: str) -> object:
            return getattr(lib, name)

        def tox_options_new(self, _: object) -> object:
            return ffi.NULL

    monkeypatch.setattr(toxcore, "load", lambda: (ffi, Lack()))
    with pytest.raises(TtunError, match="not enough memory"):
        instance.Tox(udp_ports=None)
