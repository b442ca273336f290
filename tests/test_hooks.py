"""--up and --down: they run with the facts, in pairs, hold nothing up, and leave nothing behind."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from machine import running
from tunnel import CLIENT, ROOT, SERVER, TUNNEL4, Bench, eventually

from ttun.commands import hooks
from ttun.commands.hooks import Hooks

END_TO_END = pytest.mark.parametrize("bench", ["x1"], indirect=True)


@pytest.fixture(autouse=True)
def says(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "ttun")
    return caplog


def facts(peer: str, **more: str) -> dict[str, str | None]:
    return {"peer": peer, **more}


@pytest.mark.hosts
@END_TO_END
def test_they_run_with_the_facts_as_the_user_that_is_left(bench: Bench, said: Path) -> None:
    what = f'echo "$TTUN_ROLE $TTUN_DEVICE $TTUN_PEER $TTUN_WIRE $TTUN_LOCAL4" >> {said}'
    leaving = f'echo "down: $TTUN_REASON; key: $TTUN_PSK" >> {said}; exit 3'
    server = bench.start(
        SERVER, "server", "--up", what, "--down", leaving, environment={"TTUN_PSK": "secret"}
    )
    server.says("listening on")
    client = bench.client()
    client.says("authenticated")
    lines = eventually(lambda: said.exists() and said.read_text().splitlines(), "the hook ran")
    assert lines[0].startswith("server ttun0 192.0.2.2:")
    assert lines[0].endswith(" x1 10.1.1.1/30")
    client.stop()
    eventually(lambda: "down: the peer closed" in said.read_text(), "the other hook ran")
    assert said.read_text().endswith("key: \n")
    assert "exit code 3" in server.says("exit code")
    assert os.stat(said).st_uid != 0 or "cannot switch to user" in server.log()


@pytest.mark.hosts
@END_TO_END
@pytest.mark.parametrize("keeper", [[], ["--hook-user", "root"]], ids=["", "keeper"])
def test_an_address_that_the_tunnel_does_not_have_is_empty(
    bench: Bench, said: Path, keeper: list[str]
) -> None:
    up = f'echo "4: $TTUN_LOCAL4, 6: $TTUN_LOCAL6." > {said}'
    server = bench.server("-mtu", "1000", "--up", up, *keeper)
    bench.client("-mtu", "1000").says("authenticated")
    eventually(lambda: said.exists() and said.read_text() == "4: 10.1.1.1/30, 6: .\n", "the facts")
    assert server.stop() == 0


@pytest.mark.hosts
@END_TO_END
def test_a_slow_one_holds_up_neither_packets_nor_the_end(bench: Bench) -> None:
    server = bench.server("--up", "sleep 50")
    bench.client().says("authenticated")
    bench.answers()
    assert bench.ping(CLIENT, TUNNEL4[SERVER], 5) == 5
    server.process.terminate()
    assert server.ended(10) == 0


@pytest.mark.hosts
@END_TO_END
def test_the_end_while_up_runs_ends_that_and_runs_down(bench: Bench, said: Path, nap: str) -> None:
    server = bench.server("--up", f"sleep {nap}; true", "--down", f"echo $TTUN_PEER > {said}")
    bench.client().says("authenticated")
    eventually(lambda: running(nap), "--up runs")
    server.process.terminate()
    assert server.ended(20) == 0
    assert said.read_text().startswith("192.0.2.2:")
    assert "--up: ttun is stopping: terminated all its processes after" in server.log()
    assert running(nap) == []


def test_a_time_out_ends_all_processes_of_a_command_also_those_that_ignore_sigterm(
    monkeypatch: pytest.MonkeyPatch, says: pytest.LogCaptureFixture, nap: str
) -> None:
    monkeypatch.setattr(hooks, "TIMEOUT", 1.0)
    made = Hooks(f"trap '' TERM; sleep {nap} & (sleep {nap}; true) & wait", None)
    made.start()
    made.up(facts("first"))
    eventually(lambda: len(running(nap)) >= 2, "it runs")
    eventually(lambda: running(nap) == [], "all of it has ended")
    made.down(facts("first"))
    made.close()
    assert "--up: timed out: terminated all its processes after 1 s" in says.text


def test_a_process_that_proc_hides_is_killed_too(said: Path, nap: str) -> None:
    # hidepid=2, as ProtectProc=invisible of the units, hides a program that its user cannot read.
    # It hides nothing from group 0.
    mount = 'mount -t proc -o hidepid=2 none /proc && exec "$@"'
    hidden = ["unshare", "--mount", "sh", "-c", mount, "sh", "setpriv",
              "--regid", "65534", "--clear-groups",
              "--bounding-set", "-all", "--inh-caps", "-all"]  # fmt: skip
    if subprocess.run([*hidden, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("cannot mount /proc here")
    program = said.with_name("sleep")
    shutil.copy(shutil.which("sleep") or "", program)
    program.chmod(0o111)
    code = """if True:
        import sys
        from ttun.process.process_group import ProcessGroup, end
        group = ProcessGroup(sys.argv[1], {}, print)
        sys.stdin.readline()
        end([group])"""
    command = f"trap '' TERM; exec {program} {nap}"
    process = subprocess.Popen(
        [*hidden, sys.executable, "-c", code, command], stdin=subprocess.PIPE, cwd=ROOT
    )
    eventually(lambda: running(nap), "it runs")
    process.communicate(b"\n", timeout=20)
    assert running(nap) == []


def test_what_a_command_leaves_in_the_background_lives_as_long_as_the_program(
    said: Path, nap: str
) -> None:
    made = Hooks(f"sleep {nap} & echo up > {said}", f"echo down >> {said}")
    made.start()
    made.up(facts("first"))
    eventually(lambda: said.exists() and running(nap), "--up ran")
    made.down(facts("first"))
    eventually(lambda: said.read_text() == "up\ndown\n", "--down ran beside it")
    assert len(running(nap)) == 1
    made.close()
    assert running(nap) == []


def test_sessions_while_a_command_runs_stay_pairs_and_what_is_left_out_is_counted(
    said: Path, says: pytest.LogCaptureFixture
) -> None:
    made = Hooks(f"echo up $TTUN_PEER >> {said}; sleep 0.5", f"echo down $TTUN_PEER >> {said}")
    made.start()
    for number in range(1000):
        made.up(facts(str(number)))
        made.down(facts(str(number)))
    made.up(facts("last"))  # it is still there at the end
    eventually(lambda: said.exists() and "up last" in said.read_text(), "the last one's turn", 60)
    made.close()
    lines = said.read_text().splitlines()
    assert lines[0::2] == [f"up {line.split()[1]}" for line in lines[1::2]]
    assert lines[1::2] == [f"down {line.split()[1]}" for line in lines[0::2]]
    left_out = sum(map(int, re.findall(r"for (\d+) sessions", says.text)))
    assert left_out + len(lines) / 2 == 1001


def test_the_end_leaves_out_what_waits_says_so_and_is_soon(
    said: Path, says: pytest.LogCaptureFixture, nap: str
) -> None:
    made = Hooks(f"echo up >> {said}; sleep {nap}", f"echo down >> {said}")
    made.start()
    for number in range(5):
        made.up(facts(str(number)))
        made.down(facts(str(number)))
    eventually(said.exists, "the first one runs")
    started = time.monotonic()
    made.close()
    assert time.monotonic() - started < hooks.AT_END
    assert said.read_text() == "up\ndown\n"
    assert "skipped --up and --down for 4 sessions" in says.text


def test_a_down_that_hangs_is_ended_with_the_program(
    says: pytest.LogCaptureFixture, nap: str
) -> None:
    made = Hooks(None, f"trap '' TERM; sleep {nap}; sleep {nap}")
    made.start()
    made.up(facts("first"))
    made.down(facts("first"))
    eventually(lambda: running(nap), "it hangs")
    started = time.monotonic()
    made.close()
    assert time.monotonic() - started < hooks.AT_END
    assert "--down: ttun is stopping: terminated all its processes" in says.text
    assert running(nap) == []


SCRIPT = """
import logging, os, resource, signal, sys, threading, time
from ttun.commands.hooks import Hooks
from ttun.process.signals import Signals
logging.basicConfig(format="%(message)s", level=logging.INFO)
said = sys.argv[1]
def wait(times):
    while not os.path.exists(said) or open(said, "rb").read().count(b"\\n") < times:
        time.sleep(0.02)
"""


def run(program: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own, to its end and that of what holds its stderr."""
    return subprocess.run(
        [sys.executable, "-c", SCRIPT + program, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip


def test_it_finds_the_signals_and_descriptors_of_a_normal_program(said: Path) -> None:
    program = """
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT, signal.SIGCHLD])
signals = Signals(signal.SIGTERM, signal.SIGINT)
leak = os.open("/dev/null", os.O_RDONLY)
os.set_inheritable(leak, True)
hooks = Hooks(f"grep Sig.../proc/self/status".replace("...", " ") + f" > {said}; "
    f"ls /proc/self/fd >> {said}; ps -o pid=,pgid=,sid= -p $$ >> {said}; echo >> {said}", None)
hooks.start()
hooks.up({"peer": "first"})
wait(9)
hooks.close()
"""
    run(program, said)
    text = said.read_text()
    assert re.search(r"SigBlk:\s+0+$", text, re.M)
    assert re.search(r"SigIgn:\s+0*[08]0{7}$", text, re.M)
    *descriptors, group, _ = text.split("SigCgt:")[1].splitlines()[1:]
    assert set(descriptors) == {"0", "1", "2", "3"}, "3 is that of ls"
    assert len(set(group.split())) == 1, "it leads a group and a session"


def test_no_secret_and_no_odd_byte_is_in_its_environment(said: Path) -> None:
    program = """
hooks = Hooks(f"env > {said}; echo >> {said}", None)
hooks.start()
hooks.up({"peer": "caf\\xe9\\n\\udcff\\ud800\\0", "cipher": None})
wait(2)
hooks.close()
"""
    secrets = {"TTUN_PSK": "secret-psk", "TUNTOX_SHARED_SECRET": "secret-tox"}
    for locale, proxy in (("C.UTF-8", "http://me:secret-proxy@gw:1"), ("C", "http://gw:1")):
        secrets["TTUN_PROXY"] = proxy
        said.unlink(missing_ok=True)
        ascii_only = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": locale}
        done = run(program, said, **ascii_only, **secrets)
        assert "Traceback" not in done.stderr
        text = said.read_text(encoding="utf-8")
        assert "secret-" not in text
        assert ("TTUN_PROXY=http://gw:1\n" in text) == (locale == "C"), "this one has no password"
        assert "TTUN_PEER=café\\n\\xff\\ud800\\x00\n" in text
        assert "TTUN_CIPHER=\n" in text


def test_nothing_that_it_starts_keeps_our_stderr(said: Path, nap: str) -> None:
    """Who reads the log up to its end does not wait for a program that has left us."""
    program = """
hooks = Hooks(f"setsid sh -c 'echo > {said}; exec sleep {sys.argv[2]}' &", None)
hooks.start()
hooks.up({"peer": "first"})
wait(1)
hooks.close()
"""
    started = time.monotonic()
    run(program, said, nap)
    assert time.monotonic() - started < 30
    found = eventually(lambda: running(nap), "it is a session of its own: that is let be")
    assert len(found) == 1


LACKS = {
    # name: how it begins, and how it is over
    "descriptors": (
        "resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir('/proc/self/fd')) - 1, most))",
        "resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))",
        "RLIMIT_NOFILE",
    ),
    "processes": (
        "os.setresuid(61234, 61234, 61234); resource.setrlimit(resource.RLIMIT_NPROC, (1, most))",
        "resource.setrlimit(resource.RLIMIT_NPROC, (most, most))",
        "RLIMIT_NPROC",
    ),
}


@pytest.mark.parametrize("lack", LACKS)
def test_a_lack_is_a_line_and_the_command_runs_once_it_is_over(said: Path, lack: str) -> None:
    if lack == "processes" and os.getuid() != 0:
        pytest.skip("only root can be another user")
    begin, end, name = LACKS[lack]
    program = f"""
import subprocess
subprocess.run(["true"])
most = resource.getrlimit(resource.{name})[1]
hooks = Hooks("echo up >> " + said, "echo down >> " + said)
hooks.start()
try:
    {begin}
except OSError:
    sys.exit(0)  # no such user in this user namespace
hooks.up({{"peer": "first"}})
hooks.down({{"peer": "first"}})
time.sleep(1.2)
print("early" if os.path.exists(said) else "not yet")
{end}
wait(2)
hooks.up({{"peer": "second"}})
hooks.down({{"peer": "second"}})
wait(4)
hooks.close()
print(open(said).read().split())
"""
    done = run(program, said)
    if not done.stdout:
        pytest.skip("no other user in this user namespace")
    assert done.stdout == "not yet\n['up', 'down', 'up', 'down']\n"
    assert "Traceback" not in done.stderr
    assert "cannot run --up: " in done.stderr
    assert "retrying in 0.5 s" in done.stderr


def test_no_thread_to_run_them_on_is_an_error_before_anything_starts(said: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can be another user")
    program = """
from ttun.errors import TtunError
try:
    os.setresuid(61234, 61234, 61234)
except OSError:
    sys.exit(0)
resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
Hooks(None, None).start()
try:
    Hooks("true", None).start()
except TtunError as error:
    print(error)
"""
    done = run(program, said)
    assert "can't start new thread" in done.stdout or not done.stdout


def test_without_dev_null_they_run_all_the_same(said: Path) -> None:
    """In a root directory of their own, with nothing in it but what a shell takes."""
    program = """
import subprocess
os.unlink(os.devnull)
hooks = Hooks(f"cat; echo stdout; echo stderr >&2; echo > {said}", None)
hooks.start()
hooks.up({"peer": "first"})
wait(1)
hooks.close()
"""
    command = [sys.executable, "-c", SCRIPT + program, said]
    script = 'mount -t tmpfs none /dev && : > /dev/null && exec "$@"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", *command],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    if "unshare failed" in done.stderr or "mount:" in done.stderr:
        pytest.skip("no mount can be made here")
    assert done.returncode == 0, done.stderr
    assert "--up: stdout\n--up: stderr\n" in done.stderr


def test_without_commands_there_is_no_thread() -> None:
    before = threading.active_count()
    made = Hooks(None, None)
    made.start()
    assert threading.active_count() == before, "none where there is nothing to run"
    made.up(facts("first"))
    made.down(facts("first"))
    made.close()
