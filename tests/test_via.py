"""Tunnels through commands: real ones carry them whole, bad ones harm nothing and leave nothing."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from carried import (
    MARK,
    PORT,
    SOCAT,
    TO_SERVER,
    carries,
    client,
    lines,
    needs_socat,
    serve,
    start,
    stdio,
)
from kept import keeper_of
from machine import running
from tunnel import CLIENT, ROOT, SERVER, SERVER_ADDRESS, Bench, eventually

from ttun.client import Backoff
from ttun.commands import via
from ttun.errors import UsageError
from ttun.flag import Flag
from ttun.process.keeper import Keeper

pytestmark = [pytest.mark.hosts, needs_socat]
OTHERS = int(Path("/proc/self/uid_map").read_text().split()[2]) > 4321
PAGE = (ROOT / "docs" / "through-anything.md").read_text()
needs_openssl = pytest.mark.skipif(not shutil.which("openssl"), reason="apt install openssl")
each_wire = pytest.mark.parametrize("bench", ["x1", "v1"], indirect=True)


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that all users may enter."""
    with tempfile.TemporaryDirectory(prefix="ttun-", dir="/tmp") as name:
        os.chmod(name, 0o755)
        yield Path(name)


@each_wire
@pytest.mark.parametrize("how", ["", ",pipes", ",nofork"], ids=["socket", "pipes", "tcp"])
def test_data_goes_through_a_command_whole(bench: Bench, how: str) -> None:
    server = serve(bench, how)
    end = client(bench, SOCAT, "-s", TO_SERVER)
    end.says("authenticated")
    assert "over command; handshaking" in end.log()
    eventually(lambda: end.status()["transport"] == "command", "its status says so")
    carries(bench)
    assert "over stdio; handshaking" in server.log()
    assert end.stop() == 0
    server.says("exit code 0")
    assert not running(MARK)


def on_page(begin: str, place: Path) -> list[str]:
    """A command of the page, with this test's files, address and port in it, as words."""
    (line,) = re.findall(rf"^    (?:sudo )?({begin} .*)", PAGE, re.MULTILINE)
    for there, here in (
        ("/etc/ttun/tls.pem", f"{place}/tls.pem"),
        ("=tls.", f"={place}/tls."),
        (" tls.", f" {place}/tls."),
        (":443", f":{PORT}"),
        ("s vpn.example.net", f"s {SERVER_ADDRESS}"),
    ):
        line = line.replace(there, here)
    return shlex.split(line)


@each_wire
@needs_openssl
def test_tls_as_the_page_has_it(bench: Bench, place: Path) -> None:
    subprocess.run(on_page("openssl req", place), check=True, capture_output=True)
    bench.server("-l", "127.0.0.1:20203")
    start(bench, SERVER, "socat", *on_page("socat", place))
    words = on_page("ttun client .* --via 'openssl", place)
    end = client(bench, words[-1], *words[4:-2])
    end.says("authenticated")
    carries(bench)


@needs_openssl
def test_openssl_at_both_ends_with_nothing_else_there(plain: Bench, place: Path) -> None:
    subprocess.run(on_page("openssl req", place), check=True, capture_output=True)
    script = plain.directory / "tls.sh"
    files = f"-cert {place}/tls.pem -key {place}/tls.key"
    script.write_text(
        f"#!/bin/sh\nexec openssl s_server -quiet -naccept 1 -accept {PORT} {files}\n"
    )
    script.chmod(0o755)
    start(plain, SERVER, "socat", "socat", f"EXEC:{script}", f"EXEC:{stdio(plain)}")
    listening = f"ss -Htln sport = {PORT}"
    eventually(lambda: plain.run(SERVER, *listening.split()), "s_server listens")
    tls = "openssl s_client -quiet -verify_quiet -connect %h:%p"
    end = client(plain, tls, "-s", TO_SERVER)
    end.says("authenticated")
    carries(plain)


@pytest.mark.slow
def test_a_serial_line_carries_a_tunnel_and_another_after_it(plain: Bench, place: Path) -> None:
    """A pair of pseudo-terminals: like a line it has no end of a connection, and no listener."""
    ends = [f"PTY,link={place}/{name},raw,echo=0,mode=666" for name in ("here", "there")]
    start(plain, CLIENT, "line", "socat", *ends)
    eventually(lambda: (place / "there").exists() and (place / "here").exists(), "there is a line")
    loop = f"while :; do socat FILE:{place}/there,raw,echo=0 EXEC:{stdio(plain)}; done"
    start(plain, SERVER, "loop", "sh", "-c", loop)
    time.sleep(12)  # the server waits for longer than for a handshake
    end = client(plain, f"socat - FILE:{place}/here,raw,echo=0")
    end.says("authenticated")
    carries(plain, 2 << 20)
    assert end.stop() == 0
    end = client(plain, f"socat - FILE:{place}/here,raw,echo=0")
    end.says("authenticated", seconds=200)
    plain.answers()


def test_a_command_that_ends_at_once_is_run_again_less_and_less(plain: Bench) -> None:
    end = client(plain, "echo no such place >&2; exit 9")
    end.says("reconnecting in", times=4, seconds=60)
    assert "--via: no such place" in end.log()
    end.says("--via: exit code 9")
    waits = [float(line.split()[-2]) for line in lines(end, "reconnecting in")]
    assert waits[0] < waits[1] < waits[2] < waits[3]
    assert waits[3] > Backoff.UNANSWERED
    assert end.stop() == 0


def test_a_command_that_cannot_be_found_is_a_line(plain: Bench) -> None:
    end = client(plain, "no-such-program-here")
    end.says("reconnecting in")
    assert lines(end, "--via: .*no-such-program-here: .*(not found|denied)")
    end.says("--via: exit code 127")
    assert end.stop() == 0


@pytest.mark.slow
def test_a_command_that_says_nothing_is_ended_after_a_minute(plain: Bench, nap: str) -> None:
    end = client(plain, f"sleep {nap}")
    eventually(lambda: running(nap), "it runs")
    end.says("timed out after 60 s", seconds=75)
    eventually(lambda: not running(nap), "it was ended")
    assert end.stop() == 0


def test_a_password_takes_longer_than_a_usual_handshake_may(plain: Bench) -> None:
    serve(plain)
    end = client(plain, f"sleep 12; exec {SOCAT}", "-s", TO_SERVER)
    end.says("authenticated", seconds=40)
    plain.answers()


def test_a_flood_on_stderr_fills_nothing_and_holds_nothing_up(plain: Bench) -> None:
    serve(plain)
    end = client(plain, f"yes much ado >&2 & exec {SOCAT}", "-s", TO_SERVER)
    end.says("authenticated")
    carries(plain)
    before = end.usage()[2]
    time.sleep(3)
    assert end.usage()[2] < before + 4096  # KiB
    assert len(lines(end, "much ado")) < 100
    assert end.stop() == 0
    assert lines(end, r"--via: and \d+ more lines")
    assert not running(MARK)


def test_what_a_terminal_obeys_is_escaped_and_long_lines_are_cut(plain: Bench) -> None:
    end = client(plain, r"printf 'a\033[31mb\r\n%%05000d\nc\377' 7 >&2")
    end.says("reconnecting in")
    assert "--via: a\\x1b[31mb\n" in end.log()
    assert f"--via: {400 * '0'}\n" in end.log()
    end.says("--via: c\\xff\n")


def test_a_killed_command_is_run_again(plain: Bench) -> None:
    serve(plain)
    end = client(plain, SOCAT, "-s", TO_SERVER)
    end.says("authenticated")
    for pid in running(MARK):
        os.kill(pid, signal.SIGKILL)
    end.says("authenticated", times=2)
    assert "the peer closed the connection" in end.log()
    carries(plain)


@pytest.mark.parametrize("when", ["session", "pause"])
def test_without_its_keeper_it_ends_with_its_connection(plain: Bench, when: str) -> None:
    """Nobody could run the command again; a service manager can start the client again."""
    if when == "session":
        serve(plain)
    end = client(plain, SOCAT, "-s", TO_SERVER)
    end.says("authenticated" if when == "session" else "reconnecting in")
    os.kill(keeper_of(end.process.pid), signal.SIGKILL)
    if when == "session":
        carries(plain, 1 << 20)
        for pid in running(MARK):
            os.kill(pid, signal.SIGKILL)
    assert end.ended(30) == 1
    last = end.log().splitlines()[-1]
    assert last == "ttun: cannot start --via: the keeper process ended (restart ttun)"
    assert not running(MARK)


@pytest.mark.slow
def test_a_peer_that_vanishes_behind_a_command_is_noticed(plain: Bench) -> None:
    """The command takes what it is given, and no kernel says that the peer does not."""
    serve(plain)
    end = client(plain, SOCAT, "-s", TO_SERVER)
    end.says("authenticated")
    with plain.link_down(CLIENT):
        end.says("peer timed out: last received 6", seconds=90)
    end.says("authenticated", times=2, seconds=90)


@pytest.mark.skipif(not OTHERS, reason="there is no other user in this namespace")
def test_under_sudo_it_runs_as_the_user_who_called(plain: Bench) -> None:
    agent = {"SUDO_UID": "1234", "SUDO_GID": "4321", "SSH_AUTH_SOCK": "/agent"}
    end = plain.start(
        CLIENT, "client", "-k", "secret", "--via", "exec >&2; id -u; id -g; echo $SSH_AUTH_SOCK",
        environment=agent,
    )  # fmt: skip
    end.says("reconnecting in")
    for line in ("1234", "4321", "/agent"):
        assert f"--via: {line}\n" in end.log()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_of_a_command_survives_the_client(plain: Bench, nap: str, number: int) -> None:
    """Not even what ignores SIGTERM, and what it has started."""
    serve(plain)
    stubborn = f"trap '' TERM; sleep {nap} & {SOCAT}; sleep {nap}"
    end = client(plain, stubborn, "-s", TO_SERVER)
    end.says("authenticated")
    assert running(nap)
    end.process.send_signal(number)
    assert end.ended() == (0 if number == signal.SIGTERM else -number)
    eventually(lambda: not running(nap), "all of it is gone", 3)


def test_it_runs_unprivileged_and_without_secrets(plain: Bench) -> None:
    end = plain.start(
        CLIENT, "client", "--via", "exec >&2; id -u; grep -e Cap -e NoNew /proc/self/status; env",
        environment={
            "TTUN_PSK": "a secret of sixteen bytes",
            "TTUN_PROXY": "http://me:a secret@192.0.2.9:1",  # which --via ignores
        },
    )  # fmt: skip
    end.says("reconnecting in")
    assert "a secret" not in end.log()
    assert lines(end, "--via: (65534|0)$")
    assert "--via: 0\n" not in end.log() or "cannot switch to user" in end.log()
    assert {line[-16:] for line in lines(end, "Cap(Eff|Prm|Inh|Amb)")} == {16 * "0"}
    assert lines(end, "NoNewPrivs.*1$")


@pytest.mark.skipif(not shutil.which("setsid"), reason="apt install util-linux")
def test_a_command_that_leaves_its_group_ends_with_its_standard_input(
    plain: Bench, nap: str
) -> None:
    """After a fork and setsid nobody finds it: it has to read the end."""
    serve(plain)
    end = client(plain, f"setsid -f {SOCAT}; exec sleep {nap}", "-s", TO_SERVER)
    for times in (1, 2):
        end.says("authenticated", times)
        plain.answers()
        for pid in running(nap):
            os.kill(pid, signal.SIGKILL)
        for pid in running(MARK)[:1] if times == 1 else []:
            os.kill(pid, signal.SIGKILL)
    plain.answers()
    assert end.stop() == 0
    eventually(lambda: not running(MARK) and not running(nap), "nothing is left")


@pytest.mark.parametrize("command", ["true", ":", "exec >&-; exit 0", "exec <&- >&-; sleep 1"])
def test_a_command_that_has_nothing_to_say_is_run_again(plain: Bench, command: str) -> None:
    end = client(plain, command)
    end.says("before the server answered", times=2, seconds=60)
    assert end.log().count("reconnecting in") >= 1
    assert end.stop() == 0


@pytest.mark.slow
def test_a_command_that_closes_its_output_alone_is_given_up(plain: Bench, nap: str) -> None:
    """It still has the connection, as its input: only the silence tells."""
    end = client(plain, f"exec >&-; exec sleep {nap}")
    eventually(lambda: running(nap), "it runs")
    end.says("timed out after 60 s", seconds=75)
    eventually(lambda: not running(nap), "it was ended")
    assert end.stop() == 0


def test_a_command_is_told_host_and_port(plain: Bench) -> None:
    end = client(plain, "echo '%h %p 100%%' >&2", "-s", "[2001:db8::1]:9")
    end.says("--via: 2001:db8::1 9 100%\n")


def test_without_a_thread_a_dial_fails_and_leaves_no_command(
    nap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(thread: threading.Thread) -> None:
        eventually(lambda: running(nap), "the command runs")
        raise RuntimeError("can't start new thread")

    keeper = Keeper()
    dialer = via.Dialer(None, f"sleep {nap}", None, keeper)
    keeper.start({})
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(threading.Thread, "start", start)
        dialer.candidates(Flag())[0].dial(Flag())
    eventually(lambda: not running(nap), "it was ended")
    with dialer.candidates(Flag())[0].dial(Flag()):
        eventually(lambda: running(nap), "the next one runs")
    eventually(lambda: not running(nap), "it ended with its connection")
    dialer.close()
    keeper.close()


def test_a_dial_whose_keeper_does_not_answer_ends_with_the_client() -> None:
    keeper, stop = Keeper(), Flag()
    dialer = via.Dialer(None, "true", None, keeper)
    keeper.start({})
    assert keeper._process is not None
    os.kill(keeper._process.pid, signal.SIGSTOP)
    timer = threading.Timer(0.3, stop.set)
    timer.start()
    began = time.monotonic()
    try:
        with pytest.raises(InterruptedError):
            dialer.candidates(stop)[0].dial(stop)
        assert time.monotonic() - began < 5
    finally:
        os.kill(keeper._process.pid, signal.SIGCONT)
        keeper.close()


@pytest.mark.parametrize(
    ("command", "server"),
    [
        ("%h", None),
        ("%p", None),
        ("%d", "h"),
        ("50%", "h"),
        ("x", "h;id"),
        ("x", "-h"),
        ("x", "$h"),
    ],
)
def test_what_cannot_be_meant_is_refused(command: str, server: str | None) -> None:
    with pytest.raises(UsageError, match="--via"):
        via.Dialer(server, command, None, Keeper())
