"""The command line: what it takes, and the one line that each mistake gets."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tunnel import CLIENT, PROGRAM, ROOT, SCRIPT, SERVER, Bench, eventually, run_program

import ttun
from ttun import cli, sodium
from ttun.cipher import CIPHERS
from ttun.cli import build_parser, main
from ttun.commands.parser import join_values
from ttun.errors import TtunError, reason


def run(*arguments: str, prefix: list[str] | None = None, **env: str) -> tuple[int, str, str]:
    """Run the program to its end: exit code, stdout, stderr."""
    if prefix or env:
        done = subprocess.run(
            [*(prefix or []), *PROGRAM, *arguments], env={**os.environ, **env},
            capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
    else:
        done = run_program(*arguments, timeout=30)
    return done.returncode, done.stdout, done.stderr


def parsed(*arguments: str) -> dict[str, object]:
    parser = build_parser()
    return vars(parser.parse_args(join_values(arguments, parser)))


USAGE = {
    "": "the following arguments are required: COMMAND",
    "dance": "unknown command (choose from server, client",
    "client -k x": "required: -s",
    "client -s host:1 -k": "-k/--psk: expected one argument",
    "server -k -- -l :5": "-k/--psk: expected one argument",
    "client -k x -s host:port": "the port must be a number from 1 to 65535",
    "client -k x -s :20203": "the host is missing",
    "client -k x -s 2001:db8::1": "put IPv6 addresses in brackets",
    "server -k x -l 20203:": "the port must be a number",
    "server -k x -l :65536": "the port must be a number",
    "server -k x -m rot13": "unknown cipher 'rot13': choose chacha20-poly1305 or aes-256-gcm or",
    "server -k x --wire v2": "unknown wire 'v2': choose auto, v1, x1",
    "server -k x -m aegis-256 --wire v1": "protocol v1 does not support aegis-256",
    "server -k x -m aegis-256 --mtu 65504": "MTU 65504 is too large for aegis-256",
    "client -k x -s h --rekey 0": "--rekey 0: must be above 0 and at most 120 seconds",
    "server -k x -mtu 575": "MTU 575 is out of range (576 to 65519)",
    "server -k x -mtu 65520": "MTU 65520 is out of range (576 to 65519)",
    "server -k x -mtu many": "'many' is not a number",
    "server -k x -mptcp=maybe": "-mptcp/--mptcp: expected true or false",
    "server -k x extra": "unexpected argument (not shown: it may be a key)",
    "server -k=": "the key in -k is empty",
    "server -k=--": "the key in -k is empty",
    "server -k x --user no.such.user": "no such user: 'no.such.user'",
    "genkey now": "unexpected argument (not shown: it may be a key)",
}


@pytest.mark.parametrize("line", USAGE)
def test_bad_usage_is_one_line_and_exit_code_2(line: str) -> None:
    code, out, err = run(*line.split())
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("ttun")
    assert USAGE[line] in err
    assert re.search(r"; see ttun.* -h$", err.strip()), "it says where help is"


def test_a_client_without_a_key_is_told_where_to_put_it() -> None:
    if Path("/etc/ttun/psk").exists():
        pytest.skip("this machine has a key of its own")
    code, _, err = run("client", "-s", "192.0.2.1")
    assert code == 2
    for place in ("-k", "--psk-file", "TTUN_PSK", "/etc/ttun/psk"):
        assert place in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("option", ["-psk-file", "--psk-file"])
def test_a_key_file_that_others_can_read_is_refused(tmp_path: Path, option: str) -> None:
    file = tmp_path / "key"
    file.write_text("secret\n")
    file.chmod(0o644)
    code, _, err = run("server", option, str(file))
    assert code == 1
    assert err == f"ttun: the key file {file} is readable by other users (chmod 600 {file})\n"


def test_without_net_admin_it_says_which_right_is_missing() -> None:
    code, _, err = run("server", "-k", "x", prefix=["setpriv", "--bounding-set", "-net_admin"])
    assert code == 1
    assert "a TUN device requires root or CAP_NET_ADMIN" in err.splitlines()[-1]


@pytest.mark.hosts
def test_without_the_device_node_it_says_how_to_get_it() -> None:
    hide = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /dev/net && exec "$@"', "sh"]
    code, _, err = run("server", "-k", "x", prefix=hide)
    assert code == 1
    assert "/dev/net/tun not found (modprobe tun;" in err.splitlines()[-1]
    assert "Traceback" not in err


@pytest.mark.hosts
def test_a_port_that_is_taken_is_a_line(bench: Bench) -> None:
    bench.server()
    second = bench.start(SERVER, "server", "-k", "x")
    assert second.ended() == 1
    assert second.log().splitlines()[-1] == (
        "ttun: cannot listen on :20203: port in use (stop the other program or choose another port)"
    )
    assert bench.devices(SERVER) == ["ttun0"], "its own device is gone again"


def test_aes_on_a_processor_without_it_names_the_other_cipher(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sodium, "HAS_AES", False)
    with pytest.raises(TtunError, match=r"lacks \(use -m chacha20-poly1305 on both ends\)"):
        ttun.Server(b"key", cipher="aes-256-gcm")
    ttun.Server(b"key", cipher="chacha20-poly1305")


def test_another_system_is_told_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert main(["genkey"]) == 1
    assert "ttun runs on Linux only" in capsys.readouterr().err


def test_the_help_names_every_cipher() -> None:
    """It is written out there: help is to be had without the extension that the table needs."""
    text = " ".join(run("server", "-h")[1].split())
    assert all(name in text for name in CIPHERS)


def test_options_of_the_original_and_their_long_forms() -> None:
    tail = ["-m", "aes-256-gcm", "-mtu", "1400", "-mptcp=false"]
    short = parsed("client", "-k", "K", "-s", "h:1", *tail)
    tail = ["--cipher", "aes-256-gcm", "--mtu", "1400", "--mptcp=false"]
    long = parsed("client", "--psk=K", "--server", "h:1", *tail)
    assert short == long
    assert (short["mtu"], short["mptcp"], short["psk"]) == (1400, False, "K")
    assert parsed("server")["mptcp"] is None
    assert parsed("server", "-mptcp")["mptcp"] is True
    assert parsed("server", "-mptcp", "-l", ":1")["mptcp"] is True


@pytest.mark.parametrize("key", ["-k", "--psk", "-", "-l", "=", "a=b", "-mtu", "--x"])
def test_a_key_may_look_like_an_option(key: str) -> None:
    assert parsed("server", "-k", key, "-l", ":5")["psk"] == key
    assert parsed("server", "-k", key, "-l", ":5")["listen"] == [":5"]


def test_version_and_help() -> None:
    assert run("--version") == (0, f"ttun {ttun.__version__}\n", "")
    for command in ([], ["server"], ["client"], ["demo"], ["genkey"]):
        code, out, err = run(*command, "-h")
        assert (code, err) == (0, "")
        assert out.startswith("usage: ttun")


def test_genkey_prints_a_fresh_key() -> None:
    first, second = run("genkey"), run("genkey")
    assert re.fullmatch(r"[0-9a-f]{64}\n", first[1])
    assert first != second


def test_a_key_that_cannot_be_printed_is_an_error() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*PROGRAM, "genkey"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    assert done.stderr == "ttun: cannot write the output: No space left on device\n"


def test_a_file_that_cannot_be_read_is_not_taken_for_the_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = "/proc/self/no such file"
    monkeypatch.setitem(cli.COMMANDS, "genkey", lambda _: len(Path(missing).read_text()))
    assert main(["genkey"]) == 1
    assert capsys.readouterr().err == f"ttun: {missing}: No such file or directory\n"


def test_closed_standard_streams_are_no_trouble(tmp_path: Path) -> None:
    close = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]
    assert run("genkey", prefix=close) == (0, "", "")
    assert run("server", "-m", "none", "-k", "x", prefix=close) == (2, "", "")


@pytest.mark.hosts
def test_ttun_py_finds_its_venv_from_anywhere(bench: Bench) -> None:
    """Through a symbolic link, from /, and with the empty environment of sudo."""
    link = bench.directory / "tunnel"
    link.symlink_to(SCRIPT)
    python = SCRIPT.parent / ".venv" / "bin" / "python3"
    if not python.exists():
        pytest.skip("not built with make")
    outside = Path(sys.base_prefix) / "bin" / "python3"
    done = subprocess.run(
        [outside, link, "genkey"], cwd="/", env={}, capture_output=True, text=True, check=True
    )
    assert len(done.stdout) == 65


@pytest.mark.hosts
@pytest.mark.parametrize(
    "option", [("-k", "{}"), ("--psk", "{}"), ("-k={}",), ("--psk={}",)], ids=lambda o: o[0][:5]
)
def test_a_key_does_not_stay_in_the_process_list(bench: Bench, option: tuple[str, ...]) -> None:
    key = "the key of this very test"
    server = bench.start(
        SERVER, "server", *(part.format(key) for part in option), "-l", ":5", environment={}
    )
    server.says("listening")
    line = Path(f"/proc/{server.process.pid}/cmdline").read_bytes()
    assert key.encode() not in line
    assert len(key) * b"*" + b"\0-l\0:5\0" in line
    assert b"server\0" in line


@pytest.mark.hosts
@pytest.mark.parametrize("bench", ["x1"], indirect=True)
@pytest.mark.parametrize("name", ["TTUN_PSK", "TTUN_PROXY"])
def test_a_secret_does_not_stay_in_the_environment_that_proc_shows(bench: Bench, name: str) -> None:
    secret = "http://user:of-this-very-test@127.0.0.1:9"
    environment = {"TTUN_PSK": "the key of another", name: secret}
    client = bench.start(CLIENT, "client", "-s", "127.0.0.1:9", environment=environment)
    client.says("tun ttun0 up")
    shown = Path(f"/proc/{client.process.pid}/environ").read_bytes()
    assert b"%b=%b\0" % (name.encode(), len(secret) * b"*") in shown
    assert secret.encode() not in shown


@pytest.mark.hosts
def test_a_key_of_bytes_that_are_no_text_does_not_stay_either(bench: Bench) -> None:
    script = "exec \"$@\" -k $(printf '\\377\\376%s' 0123456789abcdef)"
    with (bench.directory / "log").open("w") as log:
        server = bench.pair.start(
            SERVER, ["sh", "-c", script, "sh", *PROGRAM, "server"], stderr=log
        )
    try:
        eventually(lambda: "listening" in (bench.directory / "log").read_text(), "it listens")
        line = Path(f"/proc/{server.pid}/cmdline").read_bytes()
        assert line.endswith(b"-k\0" + 18 * b"*" + b"\0")
    finally:
        server.terminate()
        assert server.wait(5) == 0


@pytest.mark.hosts
def test_a_short_key_is_worth_a_line(bench: Bench) -> None:
    server = bench.server(key="fifteen bytes..")
    assert "weak key: 15 bytes" in server.log()
    assert "(use ttun genkey)" in server.log()
    client = bench.client(key="sixteen bytes...")
    client.says("tun ttun0 up")
    assert "genkey" not in client.log()


@pytest.mark.hosts
def test_a_log_that_cannot_be_written_is_no_end(bench: Bench) -> None:
    full = bench.pair.start(
        SERVER,
        [*PROGRAM, "server", "-k", "secret"],
        stderr=open("/dev/full", "w"),  # noqa: SIM115
    )
    try:
        client = bench.client()
        client.says("authenticated")
        bench.answers()
        client.stop()
        bench.client().says("authenticated")
        bench.answers()
    finally:
        full.terminate()
        assert full.wait(5) == 0


def test_the_interface_for_others_is_documented_and_works() -> None:
    for name in ttun.__all__:
        assert getattr(ttun, name) is not None
    assert ">>> server.start()" in ttun.Server.__doc__
    assert ">>> client.start()" in ttun.Client.__doc__
    server = ttun.Server(b"key", listen="127.0.0.1:0")
    assert server.status().device is None
    assert server.status().role == "server"
    with pytest.raises(AttributeError, match="no attribute 'Tunnel'"):
        ttun.Tunnel  # noqa: B018


@pytest.mark.hosts
def test_callbacks_and_status(bench: Bench) -> None:
    """Embedded in a program of somebody else's."""
    program = """if True:
        import sys, time, ttun
        events = []
        server = ttun.Server(b"secret", on_connected=lambda peer: events.append(peer),
                             on_disconnected=lambda peer, why: events.append((peer, why)))
        server.start()
        print("ready", server.port, flush=True)
        while not events: time.sleep(0.01)
        status = server.status()
        assert status.peer == events[0] and status.device == "ttun0", status
        assert (status.transport, status.sessions) == ("tcp", 1), status
        assert (status.wire, status.cipher) == (sys.argv[1], sys.argv[2]), status
        if status.wire == "x1":
            while not server.status().round_trip: time.sleep(0.01)
            assert 0 < server.status().round_trip < 10
        while len(events) < 2: time.sleep(0.01)
        assert events[1] == (events[0], "the peer closed the connection"), events
        assert server.status().peer is None
        assert not server.wait(0.01)
        server.stop()
        assert server.wait()
        print("done", server.status().counters.downlink_packets, flush=True)
    """
    host = bench.pair.start(
        SERVER,
        [sys.executable, "-c", program, bench.wire, bench.cipher],
        stdout=subprocess.PIPE,
        environment={"PYTHONPATH": str(SCRIPT.parent)},
    )  # fmt: skip
    bench.helpers.append(host)
    assert host.stdout is not None
    assert host.stdout.readline() == "ready 20203\n"
    client = bench.client()
    bench.answers()
    client.stop()
    done = host.stdout.readline().split()
    assert done[0] == "done"
    assert int(done[1]) >= 1
    eventually(lambda: host.poll() == 0, "it ended")


def test_without_the_codec_there_is_help_and_a_line_that_says_what_to_do(tmp_path: Path) -> None:
    """As before make, and where a wheel of another platform was unpacked."""
    shutil.copytree(
        ROOT / "ttun", tmp_path / "ttun", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "ttun", *arguments], cwd=tmp_path,
            env={name: v for name, v in os.environ.items() if name != "PYTHONPATH"},
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip

    for arguments in (["-h"], ["--version"], ["server", "-h"], ["genkey"]):
        assert run(*arguments).returncode == 0, arguments
    for arguments in (["server", "-k", "x"], ["doctor"], ["show"], ["tox", "-i", "x"]):
        done = run(*arguments)
        assert (done.returncode, done.stderr) == (
            1, "ttun: the codec is not built (run make in the source directory)\n",
        ), arguments  # fmt: skip


def test_a_bug_is_not_taken_for_a_shortage() -> None:
    """Both are a RuntimeError. «deque mutated during iteration; retrying in 1 s» looked usual."""
    assert reason(RuntimeError("can't start new thread")) == "can't start new thread"
    assert reason(RuntimeError("a bug")) == "internal error: a bug"
