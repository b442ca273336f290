"""A real systemd-resolved with a system bus of its own, on the client's host.

Debian's package would take over the machine's /etc/resolv.conf. So unpack it instead:
apt-get download systemd-resolved; dpkg -x systemd-resolved_*.deb DIR;
TTUN_TEST_RESOLVED=DIR/lib/systemd/systemd-resolved. All mounts are in the tests' own namespace.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tunnel import CLIENT, Bench, eventually

USER = "systemd-resolve"
STUB = "127.0.0.53"
PLACE = "/usr/lib/systemd/systemd-resolved"
PROGRAM = next(filter(os.path.exists, [os.environ.get("TTUN_TEST_RESOLVED", ""), PLACE]), "")
BESIDE = (each / "usr/bin/resolvectl" for each in Path(PROGRAM).parents)
UNPACKED = next(filter(Path.exists, BESIDE), None)
BUS = """<busconfig><type>system</type>
<listen>unix:path=/run/dbus/system_bus_socket</listen><auth>EXTERNAL</auth>
<policy context="default"><allow user="*"/><allow own="*"/><allow send_destination="*"/>
<allow receive_sender="*"/></policy></busconfig>"""


def why_not() -> str:
    """What is missing; empty if nothing."""
    missing = [] if shutil.which("dbus-daemon") else ["dbus-daemon"]
    if not PROGRAM or not (shutil.which("resolvectl") or UNPACKED):
        missing.append("systemd-resolved (unpacked, see tests/helpers/resolved.py)")
    return ", ".join(missing)


@contextlib.contextmanager
def mounted(source: Path, target: str) -> Iterator[None]:
    subprocess.run(["mount", "--bind", source, target], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", target], check=True)


@contextlib.contextmanager
def user(directory: Path) -> Iterator[None]:
    """Have systemd's user on this machine."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(KeyError):
            pwd.getpwnam(USER)
            yield
            return
        for name, line in (("passwd", "x:4996:4996::/:/usr/sbin/nologin"), ("group", "x:4996:")):
            copy = directory / name
            copy.write_text(f"{Path('/etc', name).read_text()}{USER}:{line}\n")
            stack.enter_context(mounted(copy, f"/etc/{name}"))
        yield


@contextlib.contextmanager
def running(far: Bench, directory: Path) -> Iterator[None]:
    """systemd-resolved, and resolvectl where commands of --up find it."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(user(directory))
        if UNPACKED and not shutil.which("resolvectl"):
            stack.enter_context(mounted(UNPACKED.parent, "/usr/local/sbin"))
        place = Path("/run/systemd/resolve")
        for made in (place, Path("/run/dbus")):
            made.mkdir(parents=True, exist_ok=True)
            stack.callback(shutil.rmtree, made, ignore_errors=True)
        entry = pwd.getpwnam(USER)
        os.chown(place, entry.pw_uid, entry.pw_gid)
        settings = directory / "bus.conf"
        settings.write_text(BUS)
        bus = ["dbus-daemon", f"--config-file={settings}", "--nofork", "--nopidfile"]
        for command, socket in ((bus, "/run/dbus/system_bus_socket"), ([PROGRAM], None)):
            with (directory / f"{Path(command[0]).name}.log").open("w") as log:
                process = far.pair.start(
                    CLIENT, command, stderr=log, environment={"SYSTEMD_LOG_TARGET": "console"}
                )
            stack.callback(process.wait)
            stack.callback(process.kill)
            if socket:
                eventually(lambda socket=socket: os.path.exists(socket), "the bus")
        eventually((place / "resolv.conf").exists, "systemd-resolved")
        eventually(lambda: control(far, "status") is not None, "it answers")
        yield


def query(far: Bench, name: str) -> str:
    """What it finds as the IPv4 address of a name, asked afresh; empty if nothing."""
    shown = control(far, "query", "-4", "--cache=no", name) or ""
    return "".join(re.findall(rf"{re.escape(name)}: (\S+)", shown))


def state(far: Bench, name: str, directory: Path) -> str:
    """All there is to say when it finds nothing: its links, the answer to a query, and its log."""
    commands = [["status"], ["query", "-4", "--cache=no", name]]
    said = [
        subprocess.run(
            far.pair.command(CLIENT, ["resolvectl", *words]),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        ).stdout
        for words in commands
    ]
    log = (directory / "systemd-resolved.log").read_text()
    return "\n".join([*said, log, Path("/etc/resolv.conf").read_text()])


def control(far: Bench, *arguments: str) -> str | None:
    """What resolvectl prints; None where it fails."""
    with contextlib.suppress(subprocess.CalledProcessError):
        return far.run(CLIENT, "resolvectl", *arguments)
    return None
