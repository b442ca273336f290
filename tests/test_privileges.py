"""Privileges of a running end: none, except for its open descriptors."""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from machine import IS_NOBODY_HERE, threads
from tunnel import CLIENT, PROGRAM, SERVER, SERVER_ADDRESS, Bench, End, Program, eventually

from ttun import privileges
from ttun.errors import UsageError
from ttun.lab import netns

pytestmark = pytest.mark.hosts


def has_nothing(pid: int, uid: int, gid: int) -> None:
    """Assert that all threads run as that user, without capabilities."""
    found = list(threads(pid))
    assert found
    for thread in found:
        assert thread["Uid"].split() == [str(uid)] * 4, thread["Name"]
        assert thread["Gid"].split() == [str(gid)] * 4, thread["Name"]
        for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert int(thread[kind], 16) == 0, (thread["Name"], kind)
        assert thread["NoNewPrivs"] == "1", thread["Name"]
        if uid != 0:  # /proc/PID belongs to root for a process that is not dumpable
            assert os.stat(f"/proc/{pid}/environ").st_uid == 0
            assert thread["Groups"].split() == [], thread["Name"]


def unprivileged() -> tuple[int, int]:
    """The user and group that an end switches to here."""
    if not IS_NOBODY_HERE:
        return 0, 0
    user = privileges.find_user(None)
    assert user is not None
    return user.uid, user.gid


@pytest.mark.parametrize("options", [(), ("-mptcp",)], ids=["tcp", "mptcp"])
def test_an_end_has_no_right_left_and_goes_on_redialling(
    bench: Bench, options: tuple[str, ...]
) -> None:
    server, client = bench.tunnel(*options)
    for round_ in (1, 2):
        bench.answers()
        for end in (server, client):
            assert len(list(threads(end.process.pid))) >= 6, "all threads of a session run"
            has_nothing(end.process.pid, *unprivileged())
            limits = Path(f"/proc/{end.process.pid}/limits").read_text()
            assert limits.split("core file size")[1].split()[:2] == ["0", "0"]
        if round_ == 1:
            server.kill()
            server = bench.server(*options)
            client.says("authenticated", times=2)
    assert bench.devices(CLIENT) == ["ttun0"]
    assert client.stop() == 0
    assert bench.devices(CLIENT) == []


# Starts a program in supplementary groups, perhaps without CAP_SETUID: linux/prctl.h and
# linux/capability.h.
IN_GROUPS = """
import ctypes, os, sys
os.setgroups([4242, 4343])
if sys.argv[1] == "no-setuid":
    assert ctypes.CDLL(None).prctl(24, 7, 0, 0, 0) == 0
os.execvp(sys.argv[2], sys.argv[2:])
"""


def in_groups(bench: Bench, how: str) -> Program:
    """A server started with other groups."""
    log = bench.directory / "groups.log"
    command = [sys.executable, "-c", IN_GROUPS, how, *PROGRAM, "server", "-k", "secret"]
    with log.open("w") as file:
        process = bench.pair.start(SERVER, command, stderr=file, environment=netns.environment())
    program = Program(process, log)
    program.says("no capabilities")
    return program


@pytest.mark.skipif(not IS_NOBODY_HERE, reason="no other user in this user namespace")
def test_supplementary_groups_are_left(plain: Bench) -> None:
    server = in_groups(plain, "usual")
    has_nothing(server.process.pid, *unprivileged())
    assert server.stop() == 0


@pytest.mark.skipif(not IS_NOBODY_HERE, reason="no other user in this user namespace")
def test_who_cannot_become_another_user_keeps_the_groups_too(plain: Bench) -> None:
    server = in_groups(plain, "no-setuid")
    assert "cannot switch to user nobody: CAP_SETUID" in server.log()
    has_nothing(server.process.pid, 0, 0)
    for thread in threads(server.process.pid):
        assert thread["Groups"].split() == ["4242", "4343"]
    assert server.stop() == 0


ALREADY = """
import os
from ttun import _codec, privileges
privileges._load_what_comes_later()  # that user may not be able to
os.setgroups([4242])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
privileges.drop(privileges.find_user("65534"), required=True)
print(os.getresuid(), os.getgroups())
"""


@pytest.mark.skipif(not IS_NOBODY_HERE, reason="no other user in this user namespace")
def test_who_is_that_user_already_needs_no_right_to_become_it() -> None:
    """It keeps the groups that it was started with."""
    done = subprocess.run(
        [sys.executable, "-c", ALREADY], env={**os.environ, **netns.environment()},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "(65534, 65534, 65534) [4242]\n"), done.stderr


@pytest.mark.skipif(not IS_NOBODY_HERE, reason="no other user in this user namespace")
def test_another_user_can_be_named(bench: Bench) -> None:
    entry = pwd.getpwnam("daemon")
    server = bench.server("--user", "daemon")
    server.says("dropped privileges: user daemon, no capabilities")
    has_nothing(server.process.pid, entry.pw_uid, entry.pw_gid)


@pytest.mark.skipif(not IS_NOBODY_HERE, reason="no other user in this user namespace")
def test_root_stays_root_if_told_to_but_loses_every_capability(bench: Bench) -> None:
    server = bench.server("--user", "root")
    server.says("dropped privileges: user root, no capabilities")
    has_nothing(server.process.pid, 0, 0)


@pytest.mark.parametrize("named", [True, False])
def test_a_user_namespace_without_nobody(tmp_path: Path, named: bool) -> None:
    """It keeps the user and logs that; an explicit --user is mandatory."""
    namespace = ["unshare", "--user", "--map-root-user", "--net"]
    if subprocess.run([*namespace, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("no user namespace can be made here: a chroot, or the kernel forbids it")
    command = [*namespace, *PROGRAM, "server", "-k", "secret"]
    log = tmp_path / "log"
    with log.open("w") as file:
        end = subprocess.Popen([*command, *(["--user", "nobody"] if named else [])], stderr=file)
    try:
        if named:
            assert end.wait(10) == 1
            assert log.read_text().endswith(
                "ttun: cannot switch to user nobody: not mapped in this user namespace\n"
            )
            return
        eventually(lambda: "dropped privileges: user root" in log.read_text(), "it goes on")
        assert "user nobody: not mapped in this user namespace; " in log.read_text()
        has_nothing(end.pid, 0, 0)
    finally:
        end.send_signal(signal.SIGTERM)
        assert end.wait(10) in (0, 1)


AUDIT = """
import os, sys
def audit(event, arguments):
    if event == "import" and os.geteuid() != 0:
        os.write(2, b"imported late: %s\\n" % str(arguments[0]).encode())
sys.addaudithook(audit)
"""


@pytest.mark.skipif(not IS_NOBODY_HERE, reason="no other user in this user namespace")
def test_nothing_is_imported_once_the_user_has_changed(bench: Bench) -> None:
    """The program may be in a directory that only root can read."""
    (bench.directory / "sitecustomize.py").write_text(AUDIT)
    path = f"{bench.directory}:{netns.environment()['PYTHONPATH']}"

    def start(*arguments: str) -> End:
        return bench.start(SERVER, *arguments, environment={"PYTHONPATH": path})

    server = start("server", "-k", "secret")
    server.says("listening")
    client = start("client", "-k", "secret", "-s", "localhost")
    client.says("authenticated")
    server.kill()
    client.says("cannot connect")
    server = start("server", "-k", "secret")
    client.says("authenticated", times=2)
    with bench.on(CLIENT, lambda: __import__("socket").create_connection((SERVER_ADDRESS, 20203))):
        pass  # a stranger, so that a failed handshake is logged
    client.stop()
    server.says("disconnected")
    server.stop()
    for end in bench.ends:
        assert "no capabilities" in end.log()
        assert "imported late" not in end.log()
        assert "Traceback" not in end.log()
    assert os.geteuid() == 0, "else nothing was looked at"


def test_a_user_is_a_name_or_a_number() -> None:
    nobody = pwd.getpwnam("nobody")
    assert privileges.find_user(str(nobody.pw_uid)) == privileges.find_user("nobody")
    assert privileges.find_user("987654") == ("987654", 987654, 987654)
    assert privileges.find_user(str((1 << 32) - 2)) is not None
    # One more means "unchanged" to setresuid().
    for wrong in ("no.such.user", str((1 << 32) - 1), str(1 << 32), str(1 << 80), "-1", ""):
        with pytest.raises(UsageError, match="no such user"):
            privileges.find_user(wrong)


def test_the_usual_user_is_ttun_where_it_exists_else_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    users = {"ttun": ("ttun", "x", 998, 997), "nobody": ("nobody", "x", 65534, 65534)}
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(pwd, "getpwnam", lambda name: users[name])
    assert privileges.find_user(None) == ("ttun", 998, 997)
    del users["ttun"]
    assert privileges.find_user(None) == ("nobody", 65534, 65534)
    users.clear()
    assert privileges.find_user(None) == ("nobody", 65534, 65534), "the kernel's overflow user"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert privileges.find_user(None) is None


@pytest.mark.skipif(os.geteuid() != 0 or not IS_NOBODY_HERE, reason="becomes another user")
def test_only_another_user_can_be_become() -> None:
    root, nobody = privileges.find_user("0"), privileges.find_user("nobody")
    assert root is not None and nobody is not None
    assert privileges.may_become(nobody) and not privileges.may_become(root)
    assert privileges.can_be(nobody) and privileges.can_be(root)
    with privileges.acting_as(nobody):
        assert os.geteuid() == nobody.uid
        assert not privileges.may_become(privileges.User("another", 1234, 1234))
    assert (os.geteuid(), os.getegid()) == (0, 0)


@pytest.mark.skipif(os.geteuid() != 0 or not IS_NOBODY_HERE, reason="becomes another user")
def test_who_may_not_change_the_user_cannot_become_another() -> None:
    program = """if True:
        import os
        from ttun import privileges
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        print(privileges.may_become(privileges.User("another", 1234, 1234)))
    """
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert said.stdout == b"False\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has capabilities to lose")
def test_what_a_container_left_out_is_no_end_of_what_is_dropped() -> None:
    """The bounding set has a hole: the capabilities behind it go too."""
    program = """if True:
        from pathlib import Path
        from ttun import privileges
        privileges.drop(None, required=True)
        print(*[x for x in Path("/proc/self/status").read_text().splitlines() if "CapBnd" in x])
    """
    command = ["setpriv", "--bounding-set", "-dac_override", sys.executable, "-c", program]
    said = subprocess.run(command, capture_output=True, check=True)
    assert int(said.stdout.split()[1], 16) == 0


def test_a_container_that_forbids_limits_is_no_trouble() -> None:
    """Python reports EPERM of setrlimit(2) as a ValueError."""
    program = """if True:
        import ctypes, resource
        from ttun import privileges
        def forbidden(*_):
            raise ValueError("not allowed to raise maximum limit")
        resource.setrlimit = forbidden
        privileges.forbid_dumps()
        print(ctypes.CDLL(None).prctl(3))  # PR_GET_DUMPABLE
    """
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert said.stdout == b"0\n"


def test_dumps_are_forbidden_after_the_user_has_changed_too() -> None:
    """The kernel decides anew then, by fs.suid_dumpable."""
    program = """if True:
        import ctypes
        from ttun import privileges
        prctl = ctypes.CDLL(None).prctl
        privileges._become = lambda _: prctl(4, 1)  # PR_SET_DUMPABLE
        privileges.drop(privileges.User("somebody", 1234, 1234), required=True)
        print(prctl(3))  # PR_GET_DUMPABLE
    """
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert said.stdout == b"0\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has capabilities to lose")
def test_a_capability_that_is_permitted_and_not_effective_is_none() -> None:
    program = """if True:
        from ttun import privileges
        from ttun._codec import ffi, lib
        data = bytearray(24)
        lib.capget(privileges.HEADER, ffi.from_buffer(data))
        data[:4] = bytes(4)  # effective
        assert lib.capset(privileges.HEADER, ffi.from_buffer(data)) == 0
        print(any(map(privileges.has, range(32))))
    """
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert said.stdout == b"False\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has capabilities to lose")
@pytest.mark.parametrize("lost", [None, "net_admin", "sys_admin", "chown", "setfcap"])
def test_the_capabilities_are_those_that_the_kernel_says(lost: str | None) -> None:
    program = """if True:
        from pathlib import Path
        from ttun import privileges
        lines = Path("/proc/thread-self/status").read_text().splitlines()
        effective = int(next(line for line in lines if line.startswith("CapEff"))[7:], 16)
        for capability in range(32):
            assert privileges.has(capability) == bool(effective >> capability & 1), capability
        print(privileges.has(privileges.NET_ADMIN), privileges.has(privileges.SYS_ADMIN))
    """
    drop = [] if lost is None else ["setpriv", "--bounding-set", f"-{lost}"]
    said = subprocess.run([*drop, sys.executable, "-c", program], capture_output=True, check=True)
    has_net, has_sys = said.stdout.decode().split()
    assert lost != "net_admin" or has_net == "False"
    assert lost != "sys_admin" or has_sys == "False"


@pytest.mark.skipif(os.geteuid() != 0 or not IS_NOBODY_HERE, reason="becomes another user")
@pytest.mark.parametrize(("uid", "gid"), [(65534, 0), (0, 65534), (65534, 65534), (1234, 1234)])
def test_who_has_the_user_or_the_group_alone_has_to_change_the_other(uid: int, gid: int) -> None:
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
            privileges._become(privileges.User("nobody", 65534, 65534))
            os._exit(os.getresgid() == os.getresuid() == (65534,) * 3)
        except OSError:
            os._exit(2)
        finally:
            os._exit(3)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == (1 if uid in (0, gid) and uid != 1234 else 2)
