"""A server with several keys: a key is changed over the tunnel itself."""

from __future__ import annotations

import re
import socket
import subprocess
from pathlib import Path

import pytest
from tunnel import CLIENT, PROGRAM, ROOT, SERVER, TUNNEL4, Bench, End

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


@pytest.mark.hosts
def test_a_client_says_that_it_uses_the_last_of_several_files(plain: Bench, tmp_path: Path) -> None:
    options = files(tmp_path, "one", "two")
    server(plain, *options[2:])
    end = client(plain, *options)
    end.says("authenticated")
    assert "a client has one key: only the last --psk-file is used" in end.log()


def test_the_library_takes_one_key_or_up_to_four() -> None:
    ttun.Server(b"one")
    ttun.Server([b"one", b"two"])
    for wrong in ([], [b""], [b"one", b""], [b"x"] * (MAX_KEYS + 1), ["text"], "text", None):
        with pytest.raises(ttun.UsageError, match="key"):
            ttun.Server(wrong)  # type: ignore[arg-type]


def steps() -> list[str]:
    """The commands of "Change the key" in docs/services.md, one text for each step."""
    page = (ROOT / "docs" / "services.md").read_text()
    section = page.partition("## Change the key\n")[2].partition("\n## ")[0]
    found = re.split(r"^\d\. ", section, flags=re.M)[1:]
    return ["\n".join(re.findall(r"^ {7}(.*)", step, re.M)) for step in found]


class Host:
    """A host with an /etc/ttun of its own; systemctl runs what the unit says, as root."""

    def __init__(self, bench: Bench, host: str, directory: Path) -> None:
        self.bench, self.host, self.etc = bench, host, directory / host
        self.etc.mkdir()
        self.end: End | None = None

    def run(self, lines: str) -> str:
        """Run lines of the page. The paths are ours, and there is no user ttun."""
        lines = re.sub(r"^.*systemctl restart .*$", "", lines, flags=re.M)
        lines = re.sub(r"sudo |-o ttun ", "", lines).replace("/etc/ttun", str(self.etc))
        lines = re.sub(r"\bttun genkey", " ".join([*PROGRAM, "genkey"]), lines)
        return self.bench.run(self.host, "sh", "-ec", lines)

    def restart(self) -> End:
        if self.end is not None:
            assert self.end.stop() == 0
        unit = (ROOT / "packaging" / "systemd" / f"ttun-{self.host}@.service").read_text()
        arguments = re.findall(r"^ExecStart=\S+ (.*)", unit, re.M)[0]
        options = (self.etc / "office.conf").read_text().strip().partition("=")[2]
        for name, value in (
            ("${CREDENTIALS_DIRECTORY}/psk", str(self.etc / "office.psk")),
            ("$OPTIONS", options.replace("/etc/ttun", str(self.etc))),
        ):
            arguments = arguments.replace(name, value)
        self.end = self.bench.start(self.host, *arguments.split(), *self.bench.options)
        return self.end


def copy_through_the_tunnel(bench: Bench, source: Path, target: Path) -> None:
    """As scp would: the server's host sends the file to the tunnel address of the client's."""
    address = (TUNNEL4[CLIENT], 5005)
    listener = bench.on(CLIENT, lambda: socket.create_server(address))
    sending = bench.on(SERVER, lambda: socket.create_connection(address, 20))
    with listener, sending, listener.accept()[0] as receiving:
        sending.sendall(source.read_bytes())
        sending.shutdown(socket.SHUT_WR)
        receiving.settimeout(20)
        target.touch(0o600)
        with receiving.makefile("rb") as file:
            target.write_bytes(file.read())


@pytest.mark.hosts
@every_wire
def test_a_key_is_changed_over_the_tunnel_in_the_five_steps_of_the_page(
    bench: Bench, tmp_path: Path
) -> None:
    assert len(steps()) == 5
    ours, theirs = Host(bench, SERVER, tmp_path), Host(bench, CLIENT, tmp_path)
    files(tmp_path, "old")
    for each, options in ((ours, "-l :20203"), (theirs, "-s 192.0.2.1")):
        (each.etc / "office.conf").write_text(f"OPTIONS={options}\n")
        (each.etc / "office.psk").write_bytes((tmp_path / "old").read_bytes())
        (each.etc / "office.psk").chmod(0o600)
        each.restart()

    def works(which: str = "") -> None:
        for end in (ours.end, theirs.end):
            assert end is not None
            end.says("authenticated")
        bench.answers()
        assert f"{which}; other clients wait" in ours.end.log(), ours.end.log()

    works()
    ours.run(steps()[0])
    ours.restart()
    works(f", key {ours.etc}/office.psk")  # the client reconnects, with its old key
    copy_through_the_tunnel(bench, ours.etc / "office.new", theirs.etc / "office.new")
    sums = [each.run(steps()[1]).split()[0] for each in (ours, theirs)]
    assert sums[0] == sums[1]
    theirs.run(steps()[2])
    theirs.restart()
    ours.end.says("authenticated", 2)
    works(f", key {ours.etc}/office.new")
    ours.run(steps()[3])
    ours.restart()
    works("forward secrecy" if bench.wire == "x1" else "")
    theirs.restart()
    ours.end.says("authenticated", 2)
    bench.answers()
    theirs.run(steps()[4])
    for each in (ours, theirs):
        assert sorted(path.name for path in each.etc.iterdir()) == ["office.conf", "office.psk"]
    assert (ours.etc / "office.psk").read_bytes() == (theirs.etc / "office.psk").read_bytes()
    assert (ours.etc / "office.psk").read_bytes() != (tmp_path / "old").read_bytes()
