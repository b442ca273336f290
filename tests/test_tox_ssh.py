"""ssh through Tox as the README has it: a real sshd, as a ProxyCommand and through a forward.

sshd has keys of its own and knows one user's, all made for the test; it listens on the loopback of
the server's host alone.
"""

from __future__ import annotations

import hashlib
import random
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from toxlab import CLIENT, SERVER, Lab, Program
from tunnel import PROGRAM

SSHD = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/sbin")
OTHERS = int(Path("/proc/self/uid_map").read_text().split()[2]) > 1

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.tox,
    pytest.mark.slow,
    pytest.mark.together,
    pytest.mark.skipif(
        not (SSHD and shutil.which("ssh") and shutil.which("scp")),
        reason="apt install openssh-server openssh-client",
    ),
    pytest.mark.skipif(not OTHERS, reason="sshd needs root, not that of a user namespace"),
]

SECRET = "for ssh alone"
FORWARD = 2222
CONF = """\
ListenAddress 127.0.0.1
Port 22
HostKey {0}/host
AuthorizedKeysFile {0}/user.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
StrictModes no
UsePAM no
PidFile none
Subsystem sftp internal-sftp
"""


class Ssh:
    """A network with an sshd behind ``ttun tox``, and a client that forwards a port to it."""

    def __init__(self, lab: Lab, directory: Path) -> None:
        self.lab, self.directory = lab, directory
        for name in ("host", "user"):
            key = ("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / name))
            subprocess.run(key, check=True)
        (directory / "conf").write_text(CONF.format(directory))
        # sshd wants a directory in /run, which is the test's own where the namespace is.
        inside = f"mount -t tmpfs none /run && mkdir /run/sshd && exec {SSHD} -D -e -f "
        self.sshd = lab.start(SERVER, "sh", "-c", inside + shlex.quote(f"{directory}/conf"))
        self.server, self.server_id = lab.serve("-t", "0", "-s", SECRET)
        self.client = self.start_client(f"-L{FORWARD}:127.0.0.1:22")

    def start_client(self, *options: str) -> Program:
        return self.lab.tox(CLIENT, "-t", "0", "-s", SECRET, "-i", self.server_id, *options)

    def options(self) -> list[str]:
        """What ssh and scp have to be told, so that nothing of who runs the tests is used."""
        options = {
            "IdentityFile": self.directory / "user",
            "IdentitiesOnly": "yes",
            "UserKnownHostsFile": self.directory / "known",
            "StrictHostKeyChecking": "yes",
            "HostKeyAlias": "there",
            "BatchMode": "yes",
            "ConnectTimeout": 90,
        }
        return ["-F", "none", *(f"-o{name}={value}" for name, value in options.items())]


@pytest.fixture(scope="module")
def ssh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ssh]:
    directory = tmp_path_factory.mktemp("ssh")
    with Lab(directory) as lab:
        made = Ssh(lab, directory)
        (directory / "known").write_text(f"there {(directory / 'host.pub').read_text()}")
        made.sshd.says("Server listening on 127.0.0.1 port 22", seconds=20)
        made.client.says("connected over")
        yield made
        for program in (made.client, made.server):
            assert program.stop() == 0
            assert "Traceback" not in program.log()


def test_ssh_with_a_proxy_command(ssh: Ssh) -> None:
    words = [*PROGRAM, "tox", "-b", str(ssh.lab.nodes), "-s", SECRET, "-i", ssh.server_id]
    proxy = f"ProxyCommand={shlex.join(words)} -W localhost:22"
    said = ssh.lab.run(CLIENT, "ssh", *ssh.options(), "-o", proxy, "root@there", "echo $((6 * 7))")
    assert said == "42\n"


def test_ssh_through_a_forward(ssh: Ssh) -> None:
    to_there = ("-p", str(FORWARD), "root@localhost")
    said = ssh.lab.run(CLIENT, "ssh", *ssh.options(), *to_there, "echo $SSH_CONNECTION; exit 0")
    assert said.split()[0::2] == ["127.0.0.1", "127.0.0.1"]
    failed = subprocess.run(
        ssh.lab.command(CLIENT, "ssh", *ssh.options(), *to_there, "exit 9"), check=False
    )
    assert failed.returncode == 9


def test_scp_there_and_back(ssh: Ssh) -> None:
    names = [ssh.directory / name for name in ("file", "there", "back")]
    data = random.Random(3).randbytes(4 << 20)
    names[0].write_bytes(data)
    scp = ("scp", "-q", *ssh.options(), "-P", str(FORWARD))
    ssh.lab.run(CLIENT, *scp, str(names[0]), f"root@localhost:{names[1]}", timeout=200)
    ssh.lab.run(CLIENT, *scp, f"root@localhost:{names[1]}", str(names[2]), timeout=200)
    assert [hashlib.sha256(name.read_bytes()).digest() for name in names] == [
        hashlib.sha256(data).digest()
    ] * 3
