"""--hook-user: commands with privileges beside a tunnel that has none."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from kept import NO_ROOT, as_root, descriptors, is_gone, keeper_of, other_users, paths, runs_for_all
from machine import running, threads
from tunnel import CLIENT, PROGRAM, ROOT, SERVER, TUNNEL4, Bench, Program, children, eventually

from ttun import privileges
from ttun.lab import netns
from ttun.process import keeper as module
from ttun.process.signals import ENDING, ENDING_LATER

ENVIRONMENT = {"PATH", "TZ", "PWD", "OLDPWD", "SHLVL", "_"}  # all but two by some shell


END_TO_END = pytest.mark.parametrize("bench", ["x1"], indirect=True)


@pytest.mark.hosts
@END_TO_END
def test_hooks_of_root_run_as_root_with_a_fixed_environment(bench: Bench, said: Path) -> None:
    up = f"(id -u; env) > {said}; grep Cap /proc/self/status >> {said}"
    server = bench.start(
        SERVER, "server", "-k", "secret", "--hook-user", "root", "--up", up,
        "--down", f"echo down $TTUN_DEVICE, $TTUN_REASON >> {said}",
        environment={"TTUN_PSK": "a secret", "LD_PRELOAD": "", "ENV": "/evil"},
    )  # fmt: skip
    server.says("listening on")
    client = bench.client()
    client.says("authenticated")
    text = eventually(
        lambda: said.exists() and "CapAmb" in said.read_text() and said.read_text(), ""
    )
    first, *lines = text.splitlines()
    assert first == "0"
    variables = dict(line.split("=", 1) for line in lines if "=" in line)
    facts = {name: value for name, value in variables.items() if name.startswith("TTUN_")}
    assert set(variables) - set(facts) <= ENVIRONMENT
    assert variables["PATH"] == module.PATH
    assert facts.pop("TTUN_PEER").startswith("192.0.2.2:")
    assert facts == {
        "TTUN_ROLE": "server", "TTUN_DEVICE": "ttun0", "TTUN_TRANSPORT": "tcp", "TTUN_WIRE": "x1",
        "TTUN_CIPHER": bench.cipher, "TTUN_LOCAL4": "10.1.1.1/30", "TTUN_LOCAL6": "fc11::1/126",
    }  # fmt: skip
    assert int(re.search(r"CapEff:\s+(\w+)", text)[1], 16) != 0  # type: ignore[index]
    for thread in threads(server.process.pid):
        assert int(thread["CapPrm"], 16) == 0, "the program itself has none left"
    client.stop()
    eventually(lambda: "down ttun0, the peer closed" in said.read_text(), "--down ran")
    pid = keeper_of(server.process.pid)
    assert server.stop() == 0
    assert is_gone(pid)


@pytest.mark.hosts
@END_TO_END
def test_hooks_get_the_name_that_the_device_has_now(bench: Bench, said: Path) -> None:
    server = bench.server(
        "--hook-user", "root", "--up", f"echo up $TTUN_DEVICE >> {said}",
        "--down", f"echo down $TTUN_DEVICE >> {said}",
    )  # fmt: skip
    client = bench.client()
    eventually(lambda: said.exists() and "up ttun0\n" in said.read_text(), "--up ran")
    netns.ip("-n", bench.pair.names[SERVER], "link", "set", "ttun0", "name", "other0")
    client.stop()
    eventually(lambda: "down other0\n" in said.read_text(), "--down ran")
    server.stop()


@pytest.mark.hosts
@END_TO_END
def test_after_kill_9_the_keeper_runs_down_removes_the_status_socket_and_ends(
    bench: Bench, said: Path, nap: str
) -> None:
    """--down gets SIGTERM, as systemd sends it to what is left of a service."""
    server = bench.server(
        "--hook-user", "root", "--up", f"sleep {nap} & echo up > {said}",
        "--down", f"/bin/true; kill $$; echo down $TTUN_PEER >> {said}",
    )  # fmt: skip
    bench.client().says("authenticated")
    eventually(lambda: said.exists() and running(nap), "--up ran")
    pid = keeper_of(server.process.pid)
    path = server.socket()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGABRT):
        os.kill(pid, number)
    time.sleep(0.3)
    assert not is_gone(pid), "it ends with the program, not by signals"
    server.kill()
    eventually(lambda: is_gone(pid), "the keeper has ended")
    assert said.read_text().startswith("up\ndown 192.0.2.2:")
    assert running(nap) == []
    assert not path.exists()


@pytest.mark.hosts
@pytest.mark.parametrize("number", [*ENDING, *ENDING_LATER])
def test_a_signal_to_program_and_keeper_alike_runs_down(
    plain: Bench, said: Path, number: signal.Signals
) -> None:
    """As a terminal and ``systemctl kill`` send it."""
    server = plain.server("--hook-user", "root", "--up", "true", "--down", f"echo down >> {said}")
    client = plain.client()
    client.says("authenticated")
    server.status()
    pid = keeper_of(server.process.pid)
    os.kill(pid, number)
    os.kill(server.process.pid, number)
    assert server.ended() == 0
    assert is_gone(pid)
    assert said.read_text() == "down\n"
    assert f"{number.name}: stopping" in server.log() and "keeper" not in server.log()


@pytest.mark.hosts
@END_TO_END
def test_without_its_keeper_a_tunnel_goes_on_and_says_so_once(bench: Bench) -> None:
    server = bench.server("--hook-user", "root", "--up", "true", "--down", "true")
    server.status()
    os.kill(keeper_of(server.process.pid), signal.SIGKILL)
    client = bench.client()
    client.says("authenticated")
    bench.answers()
    assert bench.ping(CLIENT, TUNNEL4[SERVER], 3) == 3
    client.stop()
    bench.client().says("authenticated")
    server.says("authenticated", times=2)
    assert server.log().count("the keeper process ended") == 1
    assert server.stop() == 0


def memory(pid: int) -> bytes:
    """What is in a process's memory, as far as it can be written."""
    found = b""
    with open(f"/proc/{pid}/mem", "rb", 0) as file:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            if line.split()[1].startswith("rw"):
                start, end = (int(number, 16) for number in line.split()[0].split("-"))
                with contextlib.suppress(OSError):
                    file.seek(start)
                    found += file.read(end - start)
    return found


@pytest.mark.hosts
@END_TO_END
@pytest.mark.parametrize("how", ["-k", "TTUN_PSK"])
def test_no_key_is_in_the_memory_of_the_keeper(bench: Bench, how: str) -> None:
    key = "the-key-that-nobody-finds-there"
    given, environment = (["-k", key], {}) if how == "-k" else ([], {how: key})
    server = bench.start(
        SERVER, "server", *given, "--hook-user", "root", "--up", "true", environment=environment
    )
    server.says("listening on")
    pid = keeper_of(server.process.pid)
    assert key.encode() in memory(server.process.pid), "else it is not looked for in the right way"
    assert key.encode() not in memory(pid)
    for name in ("cmdline", "environ"):
        assert key.encode() not in Path(f"/proc/{pid}/{name}").read_bytes()


@pytest.mark.hosts
@END_TO_END
def test_a_keeper_has_few_descriptors_and_there_is_none_without_need(bench: Bench) -> None:
    plain = bench.server("--up", "true", "--hook-user", "root")
    plain.status()
    pid = keeper_of(plain.process.pid)
    log, stdin, control, directory = bench.ends[-1].path, "pipe:", "socket:", "/run/ttun"
    kinds = [str(log), stdin, control, directory]
    for name in descriptors(pid):
        assert any(name.startswith(kind) for kind in kinds), name
    assert Path(f"/proc/{pid}/limits").read_text().split("core file size")[1].split()[0] == "0"
    plain.stop()
    server = bench.server("--up", "true")
    server.status()
    assert children(server.process.pid) == {}
    server.stop()


@pytest.mark.hosts
@other_users
@END_TO_END
def test_hooks_can_be_those_of_another_user_with_its_groups(bench: Bench, said: Path) -> None:
    server = bench.server("--hook-user", "daemon", "--up", f"id -u > {said}; id -G >> {said}")
    bench.client().says("authenticated")
    entry = pwd.getpwnam("daemon")
    groups = os.getgrouplist("daemon", entry.pw_gid)
    eventually(lambda: said.exists() and said.read_text().count("\n") == 2, "it ran")
    number, *found = said.read_text().split()
    assert (int(number), set(map(int, found))) == (entry.pw_uid, set(groups))
    assert server.stop() == 0


@other_users
@as_root
def test_who_cannot_become_the_user_of_hooks_says_so_and_does_not_start() -> None:
    command = [*NO_ROOT, *PROGRAM, "server", "-k", "secret", "--hook-user", "root", "--up", "true"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "cannot run --up and --down as root: " in done.stderr


@pytest.mark.hosts
@other_users
@END_TO_END
@pytest.mark.parametrize("group", [65534, 4])
def test_hooks_of_a_user_with_one_capability_keep_that_one(
    bench: Bench, said: Path, group: int
) -> None:
    """What replaces root under a service manager that gives CAP_NET_ADMIN alone, and any group."""
    pythons = [each for each in (sys.executable, "/usr/bin/python3") if runs_for_all(each)]
    if not pythons:
        pytest.skip("no Python here that another user may start")
    log = bench.directory / "ambient.log"
    options = ["--hook-user", "65534", "--up", f"grep CapEff /proc/self/status > {said}"]
    as_user = [
        str(group) if NO_ROOT[at - 1] == "--regid" else each for at, each in enumerate(NO_ROOT)
    ]
    with log.open("w") as file:
        started = bench.pair.start(
            SERVER, [*as_user, pythons[0], "-m", "ttun", "server", "-k", "secret", *options],
            stderr=file, environment=paths(),
        )  # fmt: skip
    server = Program(started, log)
    try:
        server.says("listening on")
        bench.client().says("authenticated")
        eventually(lambda: said.exists() and said.read_text().endswith("\n"), "it ran")
        assert int(said.read_text().split()[1], 16) == 1 << privileges.NET_ADMIN
        environ = f"/proc/{keeper_of(started.pid)}/environ"
        assert os.stat(environ).st_uid == 0, "it is not dumpable"
    finally:
        assert server.stop() == 0


def recipe(title: str) -> list[str]:
    """The scripts of a section of docs/hooks.md."""
    page = (ROOT / "docs/hooks.md").read_text()
    section = page.split(f"### {title}", 1)[1].split("\n#", 1)[0]
    blocks = re.findall(r"(?m)(?:^    .*\n)+", section)
    return [textwrap.dedent(block) for block in blocks if block.lstrip().startswith("#!")]


@pytest.mark.hosts
@pytest.mark.nft
@END_TO_END
def test_the_scripts_of_the_page_do_what_it_says(bench: Bench) -> None:
    """Two pairs in one: nft rules and a route, there with the session and gone after it."""
    masquerade, route = recipe("Example: masquerade"), recipe("Example: a route")
    assert (len(masquerade), len(route)) == (2, 2)
    paths = []
    for number, text in enumerate([*masquerade, *route]):
        paths.append(bench.directory / f"script{number}")
        paths[-1].write_text(text)
        paths[-1].chmod(0o755)
    up, down = (f"{paths[n]} && {paths[n + 2]}" for n in (0, 1))
    server = bench.server("--hook-user", "root", "--up", up, "--down", down)

    def state() -> tuple[bool, bool]:
        rules = bench.run(SERVER, "nft", "list", "ruleset")
        routes = bench.run(SERVER, "ip", "route", "show", "198.51.100.0/24")
        return (
            'iifname "ttun0" masquerade' in rules,
            "dev ttun0" in routes and "metric 50" in routes,
        )

    assert state() == (False, False)
    client = bench.client()
    eventually(lambda: state() == (True, True), "--up ran")
    client.stop()
    eventually(lambda: state() == (False, False), "--down ran")
    bench.client()
    eventually(lambda: state() == (True, True), "--up ran again")
    server.kill()
    eventually(lambda: not state()[0], "--down ran after a kill")
    assert "exit code" not in server.log()


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
def test_the_units_of_the_page_are_ones_that_systemd_takes(tmp_path: Path) -> None:
    page = (ROOT / "docs/hooks.md").read_text()
    units = re.findall(r"`/etc/systemd/system/(\S+)`:\n\n((?:    .*\n)+)", page)
    assert [name.rpartition(".")[2] for name, _ in units] == ["path", "service"]
    for name, text in units:
        unit = textwrap.dedent(text).replace("/etc/ttun/session", "/bin/true")
        (tmp_path / name).write_text(unit)
    for name, _ in units:
        found = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", tmp_path / name],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (found.returncode, found.stderr) == (0, "")
