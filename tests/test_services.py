"""What ``make install`` installs: a program that runs, and units that systemd and procd take."""

from __future__ import annotations

import fcntl
import os
import pwd
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from machine import opened, threads
from tunnel import CLIENT, PROGRAM, ROOT, SERVER, Bench, Program, eventually

from ttun import privileges
from ttun.lab import netns

SHELLS = [["dash"], ["busybox", "ash"], ["bash", "--posix"]]
UNITS = [f"ttun-{kind}@.service" for kind in ("server", "client", "tox")]
UID = 65534


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``make install`` into a directory."""
    if not (ROOT / ".venv" / ".built").exists():
        pytest.skip("not built with make")
    prefix = tmp_path_factory.mktemp("prefix")
    with (ROOT / "Makefile").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # another worker's would take away what this one builds
        done = subprocess.run(
            ["make", "install", f"PREFIX={prefix}"],
            cwd=ROOT, capture_output=True, text=True, check=False, umask=0o077,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return prefix


def test_what_root_installs_can_be_read_by_the_user_that_runs_it(installed: Path) -> None:
    """Whatever umask root has."""
    closed = [
        str(path)
        for path in installed.rglob("*")
        if path.stat().st_mode & 0o004 == 0 or (path.is_dir() and path.stat().st_mode & 0o001 == 0)
    ]
    assert closed == []


def test_the_installed_program_needs_nothing_else(installed: Path) -> None:
    program = installed / "bin" / "ttun"

    def says(*arguments: str) -> str:
        return subprocess.run(
            [program, *arguments], cwd="/", env={}, capture_output=True, text=True, check=False
        ).stdout

    assert re.fullmatch(r"[0-9a-f]{64}\n", says("genkey"))
    assert says("doctor").startswith("ok    packages"), "the codec and its packages load"


def test_installing_leaves_nothing_in_the_tree_that_make_clean_may_not_remove(
    installed: Path,
) -> None:
    left = [*ROOT.glob("build/*.linux-*"), *ROOT.glob("ttun*.egg-info")]
    assert left == [], "what sudo make install builds is root's"


def test_nothing_is_left_to_fill_in_and_uninstall_leaves_nothing(
    installed: Path, tmp_path: Path
) -> None:
    program = installed / "lib" / "ttun"
    files = [p for p in installed.rglob("*") if p.is_file() and program not in p.parents]
    names = {path.name for path in files}
    assert names == {"ttun", "ttun.1", "_ttun", "ttun.fish", "ttun.conf", *UNITS}
    for path in files:
        assert not re.search(r"@[A-Z]+@", path.read_text()), path
        assert path.stat().st_mode & stat.S_IROTH, path
    copy = tmp_path / "copy"
    shutil.copytree(installed, copy)
    make = ["make", "uninstall", f"PREFIX={copy}"]
    subprocess.run(make, cwd=ROOT, capture_output=True, check=True)
    assert [path for path in copy.rglob("*") if path.is_file()] == []


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
@pytest.mark.parametrize("unit", UNITS)
def test_systemd_finds_nothing_wrong_and_the_units_are_confined(installed: Path, unit: str) -> None:
    instance = installed / unit.replace("@.", "@office.")
    shutil.copy(installed / "lib" / "systemd" / "system" / unit, instance)
    man = f"--man={'yes' if shutil.which('man') else 'no'}"  # whether it looks up our man page
    found = subprocess.run(
        ["systemd-analyze", "verify", man, instance], capture_output=True, text=True, check=False,
        env={**os.environ, "MANPATH": str(installed / "share" / "man")},
    )  # fmt: skip
    assert (found.returncode, found.stderr) == (0, "")
    score = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=30", str(instance)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert score.returncode == 0, "3.0 at most: " + score.stdout[-200:]


@pytest.mark.skipif(not shutil.which("systemd-sysusers"), reason="systemd is not installed")
def test_the_user_is_made(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    subprocess.run(
        ["systemd-sysusers", f"--root={tmp_path}", installed / "lib" / "sysusers.d" / "ttun.conf"],
        capture_output=True, check=True,
    )  # fmt: skip
    assert re.search(r"^ttun:", (tmp_path / "etc" / "passwd").read_text(), re.M)


@pytest.mark.hosts
@pytest.mark.parametrize("directory", ["ttun/ttun-{}@office", "ttun"])
def test_both_ends_run_with_the_one_right_that_their_units_give_and_give_it_up(
    bench: Bench, directory: str
) -> None:
    """As another user, with CAP_NET_ADMIN alone, and the key where systemd puts it.

    The key's file shows a group's permission, as it does where systemd gives the service access by
    an access control list. Capabilities belong to a thread: every one of them is looked at, with a
    session and without. directory: what systemd makes of RuntimeDirectory=, as the units have it
    and as earlier ones had.
    """
    for unit in UNITS[:2]:
        text = (ROOT / "packaging" / "systemd" / unit).read_text()
        assert "AmbientCapabilities=CAP_NET_ADMIN\nCapabilityBoundingSet=CAP_NET_ADMIN\n" in text
        assert "\nRuntimeDirectory=ttun/%N\n" in text
    script = f"""
        set -e
        mount -t tmpfs none /dev/net && mknod -m 666 /dev/net/tun c 10 200
        mkdir -p "$RUNTIME_DIRECTORY"; chown {UID}:{UID} "$RUNTIME_DIRECTORY"
        mount -t tmpfs none /mnt
        {opened(ROOT, sys.base_prefix, sys.prefix)}
        printf secret > /mnt/psk; chown 0:{UID} /mnt/psk; chmod 440 /mnt/psk
        exec setpriv --reuid {UID} --regid {UID} --clear-groups --no-new-privs \\
            --inh-caps=-all,+net_admin --ambient-caps=-all,+net_admin \\
            --bounding-set=-all,+net_admin "$@"
    """
    works = ["unshare", "--mount", "sh", "-c", script, "sh"]
    shutil.rmtree("/run/ttun", ignore_errors=True)
    for command, why_not in (
        (["true"], "no device node can be made here"),
        ([*PROGRAM, "--version"], f"the user {UID} may not enter this directory"),
    ):
        trial = {**os.environ, "RUNTIME_DIRECTORY": "/run/ttun/trial"}
        done = subprocess.run([*works, *command], capture_output=True, check=False, env=trial)
        if done.returncode != 0:
            pytest.skip(why_not)
    shutil.rmtree("/run/ttun")

    def start(host: str, *arguments: str) -> Program:
        log = bench.directory / f"{host}.log"
        place = Path("/run", directory.format(host))
        with log.open("w") as file:
            process = bench.pair.start(
                host, [*works, *PROGRAM, *arguments, "--psk-file", "/mnt/psk", *bench.options],
                stderr=file,
                environment=netns.environment(
                    CREDENTIALS_DIRECTORY="/mnt", RUNTIME_DIRECTORY=str(place)
                ),
            )  # fmt: skip
        program = Program(process, log)
        bench.ends.append(program)  # so that it is ended with the test
        return program

    def has_nothing_left(end: Program) -> None:
        for task in threads(end.process.pid):
            assert task["Uid"].split() == [str(UID)] * 4, task["Name"]
            for kind in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
                assert int(task[kind], 16) == 0, (task["Name"], kind)
            # Without CAP_SETPCAP the bounding set stays, and no_new_privs makes it nothing.
            assert int(task["CapBnd"], 16) in (0, 1 << privileges.NET_ADMIN), task["Name"]
            assert task["NoNewPrivs"] == "1", task["Name"]

    server = start(SERVER, "server")
    server.says("listening on")
    server.says(f"dropped privileges: user {pwd.getpwuid(UID).pw_name}, no capabilities")
    eventually(lambda: len(list(threads(server.process.pid))) > 3, "its threads run")
    has_nothing_left(server)
    client = start(CLIENT, "client", "-s", "192.0.2.1")
    client.says("authenticated")
    bench.answers()
    for end in (server, client):
        pid = end.process.pid
        eventually(lambda pid=pid: len(list(threads(pid))) >= 6, "all threads of a session run")
        has_nothing_left(end)
        assert "no status" not in end.log()
    for end in (server, client):
        shown = bench.run(SERVER, *PROGRAM, "show", "ttun0")
        role = "server" if end is server else "client"
        assert f"ttun0: {role}, user {pwd.getpwuid(UID).pw_name}\n" in shown, (
            "root sees whose word that is"
        )
        assert end.stop() == 0
    assert [*Path("/run/ttun").rglob("*.sock")] == []
    shutil.rmtree("/run/ttun")


def test_a_credential_that_all_can_read_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from ttun.commands import key
    from ttun.errors import TtunError

    file = tmp_path / "psk"
    file.write_text("secret")
    file.chmod(0o440)
    with pytest.raises(TtunError, match="readable by other users"):
        key.read_file(file)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert key.read_file(file) == b"secret"
    file.chmod(0o444)
    with pytest.raises(TtunError, match="readable by other users"):
        key.read_file(file)


PROCD = """
config_load() { echo "load $1"; }
config_foreach() { "$1" office; "$1" off; }
config_get_bool() { if [ "$2" = off ]; then eval "$1=0"; else eval "$1=$4"; fi; }
config_get() { case "$3" in
    role) eval "$1=client" ;; options) eval "$1='-s vpn.example.net --dev ttun7'" ;; esac; }
procd_open_instance() { echo "open $1"; }
procd_set_param() { echo "set $*"; }
procd_close_instance() { echo close; }
procd_add_reload_trigger() { echo "trigger $1"; }
. "$0"; start_service; service_triggers; echo "at the start $START, at the end $STOP"
"""


@pytest.mark.parametrize("shell", SHELLS)
def test_what_the_init_script_asks_of_procd(shell: list[str]) -> None:
    """procd is not in Debian: its shell functions are stood in for."""
    if not shutil.which(shell[0]):
        pytest.skip(f"{shell[0]} is not installed")
    done = subprocess.run(
        [*shell, "-c", PROCD, str(ROOT / "packaging" / "openwrt" / "ttun.init")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "load ttun", "open office",
        "set command /etc/init.d/ttun run_tunnel office /usr/bin/ttun client --psk-file "
        "/etc/ttun/office.psk -s vpn.example.net --dev ttun7",
        "set file /etc/ttun/office.psk",
        "set respawn 3600 5 0", "set term_timeout 15", "set env TTUN_LOG=syslog",
        "set stdout 1", "set stderr 1", "close", "trigger ttun",
        "at the start 90, at the end 10",  # the network: 20 and 90
    ]  # fmt: skip


RUN = """
ubus() { echo "ubus $*"; }
. "$0"; RUNNING=run.; run_tunnel office "$@"
"""
INIT = str(ROOT / "packaging" / "openwrt" / "ttun.init")
SLOW = "trap 'sleep 0.5; echo clean; exit 0' TERM; echo up; while :; do sleep 0.1; done"


@pytest.mark.parametrize("shell", SHELLS)
def test_bad_usage_is_not_retried_by_procd_and_signals_reach_the_tunnel(
    shell: list[str], tmp_path: Path
) -> None:
    """The instance is deleted, which stops the respawning; after any other code it stays."""
    if not shutil.which(shell[0]):
        pytest.skip(f"{shell[0]} is not installed")
    for code, says in ((0, ""), (1, ""), (2, DELETED)):
        done = subprocess.run(
            [*shell, "-c", RUN, INIT, "sh", "-c", f"exit {code}"],
            capture_output=True, text=True, check=False, timeout=30, cwd=tmp_path,
        )  # fmt: skip
        assert (done.returncode, done.stdout, done.stderr) == (code, says, "")
    command = [*shell, "-c", RUN, INIT, "sh", "-c", SLOW]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.terminate()
        assert process.communicate(timeout=20)[0] == "clean\n"
        assert process.returncode == 0, "it has waited for the tunnel to end in order"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shell", SHELLS)
def test_a_signal_before_the_tunnel_starts_spares_whoever_has_an_old_ones_number(
    shell: list[str], tmp_path: Path
) -> None:
    if not shutil.which(shell[0]):
        pytest.skip(f"{shell[0]} is not installed")
    with subprocess.Popen(["sleep", "100"]) as other:
        (tmp_path / "run.office.pid").write_text(f"{other.pid}\n")
        # The signal comes while the script looks whether that is its tunnel.
        script = f"grep() {{ kill -TERM $$; return 1; }}\n{RUN}"
        command = [*shell, "-c", script, INIT, "sh", "-c", SLOW]
        done = subprocess.run(command, capture_output=True, check=False, timeout=30, cwd=tmp_path)
        code = other.poll()
        other.kill()
    assert code is None
    assert b"not found" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shell", SHELLS[1:])
def test_other_commands_of_the_init_script_do_not_wait_for_a_tunnel(
    shell: list[str], tmp_path: Path
) -> None:
    """rc.common locks them against each other, on descriptor 1000, for as long as a script runs."""
    if not (shutil.which(shell[0]) and shutil.which("flock")):
        pytest.skip(f"{shell[0]} or flock is not installed")
    command = [*shell, "-c", f"exec 1000> lock; flock 1000; {RUN}", INIT, "sh", "-c", SLOW]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        stop = subprocess.run(["flock", "-w", "5", tmp_path / "lock", "true"], check=False)
        process.terminate()
        process.communicate(timeout=20)
        assert stop.returncode == 0


@pytest.mark.parametrize("shell", SHELLS)
def test_what_a_killed_run_of_the_init_script_left_ends_before_the_next_one(
    shell: list[str], tmp_path: Path
) -> None:
    """procd watches the script alone: else its tunnel would keep the device for ever."""
    if not shutil.which(shell[0]):
        pytest.skip(f"{shell[0]} is not installed")
    command = [*shell, "-c", RUN, INIT, "sh", "-c", SLOW, "sh", "/etc/ttun/office.psk"]
    with (tmp_path / "log").open("w") as log:

        def run() -> subprocess.Popen[bytes]:
            return subprocess.Popen(command, stdout=log, cwd=tmp_path)

        def says(text: str) -> None:
            eventually(lambda: (tmp_path / "log").read_text() == text, text)

        first = run()
        says("up\n")
        eventually((tmp_path / "run.office.pid").read_text, "its number")
        first.kill()
        first.wait()
        second = run()
        says("up\nclean\nup\n")
        second.terminate()
        assert second.wait(20) == 0
        says("up\nclean\nup\nclean\n")


DELETED = 'ubus call service delete {"name":"ttun","instance":"office"}\n'


@pytest.mark.hosts
def test_what_a_unit_runs_with_a_typo_ends_with_the_code_that_is_not_retried(plain: Bench) -> None:
    for unit in UNITS:
        text = (ROOT / "packaging" / "systemd" / unit).read_text()
        assert "\nRestart=always\n" in text and "\nRestartPreventExitStatus=2\n" in text
    for command in (
        "server --lisen :1",
        "client -s",
        "client -k k -s 192.0.2.1 -mtu 1",
        "tox --no",
    ):
        assert plain.start(SERVER, *command.split()).ended(30) == 2, command
