"""--monitor-group: a group may query a tunnel that root started, or a unit; others may not."""

from __future__ import annotations

import json
import os
import stat
import subprocess

import pytest
from machine import IS_NOBODY_HERE
from tunnel import PROGRAM, SERVER, Bench, eventually

from ttun import privileges
from ttun.errors import UsageError

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(not IS_NOBODY_HERE, reason="no other user in this namespace"),
]
ADM, DAEMON = 4, 1  # a group, and a user that is not in it
ASK = """if True:
    import os, socket, sys
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(sys.argv[1])
        print(sock.makefile().readline())
"""


def asks(bench: Bench, path: object, *groups: int) -> subprocess.CompletedProcess[str]:
    """Have a user in these groups ask a tunnel."""
    having = f"--groups={','.join(map(str, groups))}" if groups else "--clear-groups"
    user = ["setpriv", f"--reuid={DAEMON}", f"--regid={DAEMON}", having]
    return subprocess.run(
        bench.pair.command(SERVER, [*user, "/usr/bin/python3", "-I", "-c", ASK, str(path)]),
        cwd="/", capture_output=True, text=True, check=False, timeout=30,
    )  # fmt: skip


@pytest.mark.parametrize("user", [[], ["--user", "root"]], ids=["nobody", "root"])
def test_the_group_may_ask_and_others_may_not(plain: Bench, user: list[str]) -> None:
    os.umask(0o022)
    server = plain.server("--monitor-group", "adm", *user)
    path = server.socket()
    state = path.stat()
    assert (stat.S_IMODE(state.st_mode), state.st_gid) == (0o660, ADM)
    assert json.loads(asks(plain, path, ADM).stdout)["role"] == "server"
    assert "PermissionError" in asks(plain, path).stderr
    assert server.stop() == 0
    assert not path.exists()
    path = plain.server(*user).socket()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "PermissionError" in asks(plain, path, ADM).stderr, "without the option"


REFUSED = "only root and this user can use ttun show: --monitor-group: Operation not"


def test_a_service_whose_user_is_in_the_group_needs_no_root(plain: Bench) -> None:
    """As a unit does: a user of its own, CAP_NET_ADMIN; Group= or SupplementaryGroups=.

    The system calls of the units include no chown, which only Group= does without.
    """
    for groups, gid, more in (
        ("adm", DAEMON, ADM),
        ("adm-alone", ADM, ADM),
        ("daemon", DAEMON, DAEMON),
    ):
        place = f"/run/ttun/service-{groups}"
        os.makedirs(place)
        os.chown(place, DAEMON, DAEMON)
        setpriv = [
            "setpriv", f"--reuid={DAEMON}", f"--regid={gid}", f"--groups={more}",
            "--inh-caps=-all,+net_admin", "--ambient-caps=-all,+net_admin",
        ]  # fmt: skip
        log = plain.directory / f"{groups}.log"
        options = ["-k", "secret", "-l", ":0", "--monitor-group", "adm"]
        command = [*setpriv, *PROGRAM, "server", *options]
        with log.open("w") as file:
            process = plain.pair.start(
                SERVER, command, stderr=file, environment={"RUNTIME_DIRECTORY": place}
            )
        try:
            found = eventually(
                lambda place=place, process=process: (
                    process.poll() is not None or os.listdir(place)
                ),
                "a socket",
            )
            if found is True:
                pytest.skip("that user may not enter this directory: " + log.read_text()[-200:])
            path = f"{place}/{found[0]}"
            if ADM in (gid, more):
                assert json.loads(asks(plain, path, ADM).stdout)["role"] == "server"
                assert REFUSED not in log.read_text()
            else:
                eventually(lambda log=log: REFUSED in log.read_text(), "why not")
        finally:
            process.terminate()
            process.wait(10)


def test_a_group_that_nobody_has_is_bad_usage() -> None:
    with pytest.raises(UsageError, match="no such group: 'no such'"):
        privileges.find_group("no such")
