"""Wrong set-ups: for each, a line of the log that names the cause."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from tunnel import PROGRAM, SERVER, Bench

ONCE = pytest.mark.parametrize("bench", ["x1"], indirect=True)


def told(log: str, *expected: str) -> None:
    """Print the lines that tell, one of each kind, and require them."""
    for text in expected:
        lines = [line for line in log.splitlines() if re.search(text, line)]
        assert lines, f"{text!r} in:\n{log}"
        print(f"TOLD  {lines[0]}")


@pytest.mark.hosts
@pytest.mark.parametrize("bench", ["x1", "v1"], indirect=True)
def test_another_key(bench: Bench) -> None:
    server, client = bench.server(), bench.client(key="other")
    client.says("reconnecting", 2)
    told(client.log(), r"closed during the handshake \(probably a different pre-shared key")
    told(server.log(), r"authentication failed \(different pre-shared key or cipher\?\)")


@pytest.mark.hosts
@ONCE
@pytest.mark.parametrize("cause", ["another key", "another client"])
def test_a_server_that_is_silent(bench: Bench, cause: str) -> None:
    bench.server(*(["--wire", "x1"] if cause == "another key" else []))
    if cause == "another client":
        bench.client().says("authenticated")
    client = bench.client("--dev", "second", key="other" if cause == "another key" else "secret")
    client.says("timed out", seconds=60)
    told(
        client.log(),
        r"timed out after 1\d s \(no answer: different pre-shared key, or the server has another",
    )


@pytest.mark.hosts
@ONCE
def test_no_ttun_server_there(bench: Bench) -> None:
    program = """if True:
        import socket
        s = socket.create_server(("", 20203)); print("ready", flush=True)
        while True: s.accept()[0].close()
    """
    bench.helper(SERVER, "python3", "-c", program)
    client = bench.client()
    client.says("handshake with")
    told(client.log(), r"before the server answered \(does a ttun server listen there\?\)")


@pytest.mark.hosts
@ONCE
def test_another_cipher(bench: Bench) -> None:
    server, client = bench.server("-m", "aes-256-gcm"), bench.client("-m", "chacha20-poly1305")
    for end in (server, client):
        end.says("no common cipher: ours ")
        told(end.log(), r"no common cipher: ours .*, the peer's .* \(use the same -m on both ends")
    client.stop()
    server.stop()
    server = bench.server("--wire", "v1", "-m", "aes-256-gcm")
    client = bench.client("--wire", "v1")
    client.says("reconnecting")
    told(client.log(), "probably a different pre-shared key, or with v1 a different cipher")


@pytest.mark.hosts
@ONCE
def test_another_mtu(bench: Bench) -> None:
    server, client = bench.server("-mtu", "1400"), bench.client()
    told(client.says("MTU differs"), "MTU differs: 1280 here, 1400 at the peer")
    told(server.says("MTU differs"), "MTU differs: 1400 here, 1280 at the peer")
    bench.answers()


@pytest.mark.hosts
@ONCE
def test_addresses_that_another_device_has(bench: Bench) -> None:
    bench.server()
    second = bench.server("-l", "20204")
    told(second.log(), r"10.1.1.0/30 is also routed through ttun0, so traffic may be misrouted")
    told(second.log(), r"fc11::/126 is also routed through ttun0")
    third = bench.server("-l", ":20205", "--local4", "10.9.0.1", "--local6", "fd09::1/126")
    assert "also routed" not in third.log()


@pytest.mark.hosts
@ONCE
def test_the_address_of_the_other_end(bench: Bench) -> None:
    server, client = bench.server("--local4", "10.1.1.2"), bench.client("--local6", "fc11::1")
    for end, address, role, family in (
        (server, "10.1.1.2", "client", 4),
        (client, "fc11::1", "server", 6),
    ):
        told(
            end.says("default address"),
            rf"{address} is the default address of the {role} \(each end needs its own: "
            rf"--local{family}\)",
        )
        assert end.log().count("default address") == 1
    end = bench.start(SERVER, "server", "-k", "x", "--local4", "10.9.0.1", "--peer4", "10.9.0.1")
    assert end.ended() == 2
    told(end.log(), "invalid tunnel address: both ends have the same; see ttun server -h")
    swapped = ("--local4", "10.1.1.2", "--peer4", "10.1.1.1", "-l", "20209")
    assert "default address" not in bench.server(*swapped).log()


@pytest.mark.hosts
@ONCE
@pytest.mark.parametrize("option", ["-l=20203", "-m=none", "--dev=lo", "--user=nobody-here"])
def test_a_server_that_cannot_start_writes_no_key(
    bench: Bench, tmp_path: Path, option: str
) -> None:
    """A port that is taken, and everything else that its options may have wrong."""
    bench.server()
    script = 'mount --bind "$0" /etc && exec "$@"'
    (tmp_path / "etc").mkdir()
    for name in ("passwd", "group", "nsswitch.conf", "hosts", "ld.so.cache"):
        with contextlib.suppress(FileNotFoundError):
            shutil.copy(Path("/etc", name), tmp_path / "etc")
    command = ["unshare", "--mount", "sh", "-c", script, tmp_path / "etc", *PROGRAM]

    def start(*options: str) -> subprocess.CompletedProcess[str]:
        whole = bench.pair.command(SERVER, ["timeout", "8", *map(str, command), *options])
        return subprocess.run(whole, capture_output=True, text=True, check=False)

    done = start("server", option)
    assert done.returncode in (1, 2), done.stderr
    if option == "-l=20203":
        told(done.stderr, r"^ttun: cannot listen on :20203: port in use \(stop the other program")
    assert not (tmp_path / "etc" / "ttun").exists()
    if option == "-l=20203":
        done = start("server", "-l", "0")
        assert "wrote a new key to /etc/ttun/psk" in done.stderr, done.stderr
        assert len((tmp_path / "etc" / "ttun" / "psk").read_text()) == 65


@pytest.mark.hosts
@ONCE
def test_a_server_is_named_once(bench: Bench) -> None:
    client = bench.client()
    client.says("cannot connect to")
    told(client.log(), r"cannot connect to 192\.0\.2\.1:20203: Connection refused$")
    other = bench.client("--dev", "other", to="nowhere.invalid")
    line = re.findall("cannot connect to .*", other.says("cannot connect to"))[0]
    assert line.count("nowhere.invalid") == 1, line
