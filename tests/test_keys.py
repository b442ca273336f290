"""A server with several keys: a key is changed over the tunnel itself."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from tunnel import CLIENT, PROGRAM, SERVER, Bench, End

import ttun
from ttun.commands import key
from ttun.settings import MAX_KEYS

every_wire = pytest.mark.parametrize("bench", ["x1", "v1"], indirect=True)


def files(directory: Path, *names: str) -> list[str]:
    """Key files, and the options that name them."""
    options = []
    for name in names:
        path = directory / name
        path.write_text(key.generate() + "\n")
        path.chmod(0o600)
        options += ["--psk-file", str(path)]
    return options


def server(bench: Bench, *options: str) -> End:
    end = bench.start(SERVER, "server", *options, *bench.options)
    end.says("listening on")
    return end


def client(bench: Bench, *options: str) -> End:
    return bench.start(CLIENT, "client", "-s", "192.0.2.1", *options, *bench.options)


@pytest.mark.hosts
@every_wire
def test_the_log_says_which_key_a_client_has(bench: Bench, tmp_path: Path) -> None:
    options = files(tmp_path, "one", "two", "three", "four")
    end = server(bench, *options)
    for number in (3, 0):
        mine = options[2 * number : 2 * number + 2]
        one = client(bench, *mine)
        said = end.says(f", key {mine[1]}; other clients wait")
        bench.answers()
        assert one.stop() == 0
        end.says("disconnected", 1 if number else 2)
        for path in tmp_path.iterdir():
            if path.stat().st_mode & 0o777 == 0o600:
                assert path.read_text().strip() not in said
    stranger = client(bench, *files(tmp_path, "other"))
    stranger.says("probably a different pre-shared key")
    end.says("authentication failed (different pre-shared key or cipher?)")


@pytest.mark.hosts
def test_a_silent_server_knows_each_of_its_keys(plain: Bench, tmp_path: Path) -> None:
    options = files(tmp_path, "one", "two")
    end = server(plain, *options, "--wire", "x1")
    client(plain, *options[2:])
    end.says(f", key {options[3]}; other clients wait")
    plain.answers()


def test_five_keys_are_too_many_and_one_file_that_is_bad_is_named(tmp_path: Path) -> None:
    def fails(options: list[str]) -> tuple[int, str]:
        command = [*PROGRAM, "server", *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, done.stderr

    options = files(tmp_path, *"abcde")
    assert fails(options) == (
        2, "ttun: --psk-file: 5 files are too many (at most 4); see ttun server -h\n"
    )  # fmt: skip
    (tmp_path / "b").chmod(0o644)
    code, said = fails(options[:4])
    assert (code, f"key file {tmp_path}/b is readable by other users" in said) == (1, True)


def test_the_library_takes_one_key_or_up_to_four() -> None:
    ttun.Server(b"one")
    ttun.Server([b"one", b"two"])
    for wrong in ([], [b""], [b"one", b""], [b"x"] * (MAX_KEYS + 1), ["text"], "text", None):
        with pytest.raises(ttun.UsageError, match="key"):
            ttun.Server(wrong)  # type: ignore[arg-type]
