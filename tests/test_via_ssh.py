"""docs/through-anything.md as it stands: one ssh login, sudo's line, a key for the tunnel alone.

sshd has keys and, where sudo is needed, users and sudoers of its own, in mounts that only it sees.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from carried import carries, start
from tunnel import CLIENT, PROGRAM, ROOT, SERVER, SERVER_ADDRESS, Bench, End, eventually

from ttun.privileges import NOBODY

SSHD = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/sbin")
OTHERS = int(Path("/proc/self/uid_map").read_text().split()[2]) > NOBODY
PAGE = (ROOT / "docs" / "through-anything.md").read_text()
pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(
        not (SSHD and shutil.which("ssh")), reason="apt install openssh-server openssh-client"
    ),
    pytest.mark.skipif(not OTHERS, reason="sshd needs root, not that of a user namespace"),
]
ME = 1234  # a user of the test's own
CONF = """\
ListenAddress {address}
HostKey {place}/host
AuthorizedKeysFile {place}/authorized
PermitRootLogin prohibit-password
PasswordAuthentication no
StrictModes no
UsePAM no
PidFile none
"""


def block(language: str) -> str:
    """What the page has in its block of a language."""
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.M | re.S)
    return str(found)


class There:
    """A host with an sshd, and what a client needs to log in."""

    def __init__(self, bench: Bench, place: Path) -> None:
        self.bench, self.place = bench, place
        place.chmod(0o755)
        for name in ("host", "user"):
            key = ("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(place / name))
            subprocess.run(key, check=True)
        os.chown(place / "user", NOBODY, NOBODY)
        (place / "known").write_text(f"there {(place / 'host.pub').read_text()}")
        (place / "psk").write_text("a secret of sixteen bytes")
        (place / "psk").chmod(0o600)
        self.public = (place / "user.pub").read_text()
        (place / "authorized").write_text(self.public)
        (place / "ttun").write_text(f'#!/bin/sh\nexec {shlex.join(PROGRAM)} "$@"\n')
        (place / "ttun").chmod(0o755)
        self.server = f"{place}/ttun server --psk-file {place}/psk --stdio"

    def serve(self, *mounts: tuple[str, str]) -> None:
        """Start sshd. mounts: files of the place, and where sshd and what it starts see them."""
        (self.place / "conf").write_text(CONF.format(address=SERVER_ADDRESS, place=self.place))
        script = "mount -t tmpfs none /run && mkdir /run/sshd && "
        for name, where in mounts:
            script += f"mount --bind {self.place}/{name} {where} && "
        script += f"exec {SSHD} -D -e -f {self.place}/conf"
        sshd = start(self.bench, SERVER, "sshd", "sh", "-c", script)
        sshd.says("Server listening on")

    def join(self, login: str, *command: str) -> End:
        options = {
            "IdentityFile": self.place / "user",
            "IdentitiesOnly": "yes",
            "UserKnownHostsFile": self.place / "known",
            "HostKeyAlias": "there",
            "BatchMode": "yes",
        }
        words = ["ssh", "-F", "none", *(f"-o{name}={value}" for name, value in options.items())]
        end = self.bench.start(
            CLIENT, "client", "--via", f"exec {shlex.join(words)} {login} {' '.join(command)}",
            *self.bench.options, environment={"TTUN_PSK": "a secret of sixteen bytes"},
        )  # fmt: skip
        end.says("authenticated")
        return end


@pytest.fixture
def there(bench: Bench) -> Iterator[There]:
    place = Path(tempfile.mkdtemp(prefix="ttun-", dir="/tmp"))  # where all users may look
    yield There(bench, place)
    shutil.rmtree(place)


@pytest.mark.parametrize("bench", ["x1", "v1"], indirect=True)
def test_one_ssh_login_joins_two_machines(there: There) -> None:
    there.serve()
    end = there.join(f"root@{SERVER_ADDRESS}", there.server)
    assert "--via: " in end.log()
    assert "listening on stdin and stdout" in end.log()
    carries(there.bench)
    assert end.stop() == 0
    eventually(lambda: not there.bench.devices(SERVER), "the server has ended too")


def with_sudo(there: There, pty: bool) -> None:
    """Give the host of sshd a user, and the page's line for sudo."""
    sudoers = block("sudoers").replace("/usr/local/bin/ttun", f"{there.place}/ttun")
    sudoers = sudoers.replace("/etc/ttun/psk", f"{there.place}/psk")
    assert sudoers.count(str(there.place)) == 3
    if pty:
        sudoers = f"Defaults use_pty\n{sudoers.splitlines()[0]}\n"
    for name, more in (
        ("passwd", f"me:x:{ME}:{ME}::/:/bin/sh"),
        ("group", f"me:x:{ME}:"),
        ("shadow", "me:*:19000:0:99999:7:::"),
    ):
        (there.place / name).write_text(f"{Path('/etc', name).read_text()}{more}\n")
    (there.place / "shadow").chmod(0o640)
    (there.place / "sudoers").write_text(sudoers)
    (there.place / "sudoers").chmod(0o440)
    subprocess.run(["visudo", "-cf", there.place / "sudoers"], check=True, capture_output=True)
    there.serve(*((name, f"/etc/{name}") for name in ("passwd", "group", "shadow", "sudoers")))


@pytest.mark.skipif(not shutil.which("sudo"), reason="apt install sudo")
@pytest.mark.parametrize("bench", ["x1"], indirect=True)
@pytest.mark.parametrize("pty", [False, True])
def test_sudo_allows_that_command_and_no_other(there: There, pty: bool) -> None:
    with_sudo(there, pty)
    end = there.join(f"me@{SERVER_ADDRESS}", "sudo", "-n", there.server)
    carries(there.bench)
    assert end.stop() == 0
    eventually(lambda: not there.bench.devices(SERVER), "the server has ended too")
    for other in (f"{there.server} --user root", "id", there.server.replace("--stdio", "-l :1")):
        refused = there.bench.start(
            CLIENT, "client", "--via", f"{end_command(there)} sudo -n {other}", "-k", "x"
        )
        refused.says("--via: sudo: ")
        assert refused.stop() == 0


def end_command(there: There) -> str:
    return (
        f"ssh -F none -oIdentityFile={there.place}/user -oUserKnownHostsFile={there.place}/known "
        f"-oHostKeyAlias=there -oBatchMode=yes me@{SERVER_ADDRESS}"
    )


@pytest.mark.parametrize("bench", ["x1"], indirect=True)
def test_a_key_may_be_for_the_tunnel_alone(there: There) -> None:
    line = block("conf").replace("sudo -n /usr/local/bin/ttun", f"{there.place}/ttun")
    line = line.replace("/etc/ttun/psk", f"{there.place}/psk")
    (there.place / "authorized").write_text(re.sub("ssh-ed25519 .*", there.public, line))
    there.serve()
    end = there.join(f"root@{SERVER_ADDRESS}")
    carries(there.bench)
    assert end.stop() == 0
    other = [*end_command(there).replace("me@", "root@").split(), "id"]
    said = subprocess.run(
        there.bench.pair.command(CLIENT, other),
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=20,
    )  # fmt: skip
    assert said.stdout == ""
    assert "listening on stdin and stdout" in said.stderr
