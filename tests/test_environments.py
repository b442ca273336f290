"""Odd values in odd environments: each command ends with a code that it knows, and no traceback.

A table of places where a program may find itself, one of command lines that are tried in each of
them, and one of values that nobody expects. They run in a network namespace of their own, so what
comes up there meets nobody.
"""

from __future__ import annotations

import os
import signal
import subprocess

import pytest
from tunnel import PROGRAM

pytestmark = pytest.mark.hosts

KEY = 20 * "k"
ID = "1B9A5FD500A45D4719DA3EA9535A4913AC4763811D90F243A32458698BDEDD0121206484ECB5"
TIMEOUT = 60  # seconds
ASCII = "export LC_ALL=C PYTHONCOERCECLOCALE=0 PYTHONUTF8=0"
DEVICES = "mount -t tmpfs none /dev && mkdir /dev/net && mknod /dev/net/tun c 10 200"

PLACES = {  # shell commands that lead there
    "no /proc": "mount -t tmpfs none /proc",
    "no /dev/null": DEVICES,
    "no /dev/null, no input and output": f"{DEVICES}; exec <&- >&-",
    "no input": "exec <&-",
    "no output": "exec >&-",
    "no directory": "cd $(mktemp -d) && rmdir $PWD",
    "no environment": "unset HOME PATH USER LANG",
    "ASCII": ASCII,
    "ASCII, strictly": f"{ASCII} PYTHONIOENCODING=ascii:strict",
    "a full disk for the output": "exec >/dev/full",
    "6 descriptors": "ulimit -n 6",
    "9 descriptors": "ulimit -n 9",
    "12 descriptors": "ulimit -n 12",
    "60 MB": "ulimit -v 60000",
    "no file may grow": "ulimit -f 0",
    "nothing can be written": "mount -o bind / /mnt && mount -o remount,bind,ro /mnt && cd /mnt",
}

LINES = [  # none of them runs on and on: --up, a key and a name that does not resolve are all there
    f"server -k {KEY} -l nonsense.invalid:1 --up true",
    f"server -k{KEY} --user 65534 --route 2001:db8::/32 -mtu 1000",
    f"client -k {KEY} -s tox:nobody",
    "show",
    "show --prometheus",
    "doctor",
    "doctor 127.0.0.1:1",
    "genkey",
    f"tox -s {KEY} -L nonsense.invalid:1:h:1 -i {ID}",
    f"tox -z -f / -t 0 -s {KEY}",
    "--version",
    "client -h",
]


def run(
    line: list[str], place: str = "true", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the program somewhere, to its end."""
    # An empty /run: tests before this one may have left sockets of tunnels that were killed.
    script = f'mount -t tmpfs none /run; {place}; exec "$@"'
    command = ["unshare", "--net", "--mount", "sh", "-c", script, "sh", *PROGRAM, *line]
    return subprocess.run(
        ["timeout", "--signal=INT", str(TIMEOUT), *command],
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False,
    )  # fmt: skip


def check(done: subprocess.CompletedProcess[str]) -> None:
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert "internal error" not in done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert done.returncode in (0, 1, 2), done.stderr
    if done.returncode:
        errors = [each for each in done.stderr.splitlines() if each.startswith("ttun")]
        assert len(errors) <= 1, "one line"


@pytest.mark.parametrize("place", PLACES)
def test_no_traceback_in_an_odd_place(place: str) -> None:
    for line in LINES:
        check(run(line.split(), PLACES[place]))


def test_without_proc_a_tunnel_says_that_this_is_why_show_does_not_see_it() -> None:
    done = run(["server", "-k", KEY, "--stdio"], PLACES["no /proc"])
    assert "/run/ttun: /proc is not mounted" in done.stderr


USAGE = 2
BYTES = os.fsdecode(b"\xff\xfe")
VALUES = [  # a command line, its exit code, and what it says
    (["server", "-k", KEY, "--user", 5000 * "9"], USAGE, "no such user"),
    (["server", "-k", KEY, "--user", "٣"], USAGE, "no such user"),
    (["server", "-k", KEY, "--user", BYTES], USAGE, "no such user"),
    (["server", "-k", KEY, "--user", "a\nb"], USAGE, r"'a\nb'"),
    (["server", "-k", KEY, "--route", BYTES], USAGE, r"--route \xff\xfe: "),
    (["server", "-k", KEY, "--route", "a\nb\x1b[31m"], USAGE, r"--route a\nb\x1b[31m: "),
    (["server", "-k", KEY, "--route", "2001:db8::%1/64"], USAGE, "a zone is not allowed"),
    (["server", "-k", KEY, "--route", "10.0.0.0/" + 5000 * "9"], USAGE, "--route"),
    (["server", "-k", KEY, "--local4", BYTES], USAGE, "invalid tunnel address"),
    (["server", "-k", KEY, "--local6", "fd00::1%eth0"], USAGE, "a zone is not allowed"),
    (["server", "-k", KEY, "-m", BYTES], USAGE, "unknown cipher"),
    (["server", "-k", KEY, "--wire", "\u202e"], USAGE, "unknown wire"),
    (["server", "-k", KEY, "-mtu", 5000 * "9"], USAGE, "is not a number"),
    (["server", "-k", KEY, "--buffers", "%s"], USAGE, "buffers"),
    (["server", "--psk-file", "\x1b[31m"], 1, "key file not found"),
    (["server", "--psk-file", "/dev/\x1b[31m"], 1, r"/dev/\x1b[31m: No such file"),
    (["server", "--psk-file", BYTES], 1, "key file not found"),
    (["server", "--psk-file", "/"], 1, "Is a directory"),
    (["server", "--psk-file", ""], USAGE, "--psk-file: the file name is empty"),
    (["client", "-s", "h", "--psk-file="], USAGE, "--psk-file: the file name is empty"),
    (["server", "--psk-file", "/dev/zero"], 1, "is a device"),
    (["client", "-k", KEY, "-s", "h:1", "--rekey", "nan"], USAGE, "--rekey nan"),
    (["client", "-k", KEY, "-s", "tox:" + BYTES], USAGE, "Tox ID"),
    (["server", "-k", KEY, "--tox", "--tox-nodes", "/dev/zero"], 1, "larger than"),
    (["show", "a\x1b[2Jb"], 1, r"no tunnel is running on a\x1b[2Jb"),
    (["doctor", ""], USAGE, "the host is missing"),
    (["doctor", "é" + BYTES], 1, "server"),
    (["doctor", 70 * "x"], 1, "label"),
    (["demo", "--size", "-1"], USAGE, "--size -1"),
    (["demo", "--size", "99999999999"], USAGE, "--size"),
    (["bench", "tunnel", "--against", "'::'"], USAGE, "No closing quotation"),
    (["bench", "tunnel", "--against", "{}::{x}"], USAGE, "--against"),
    (["bench", "tunnel", "--against", "{peer.x}::y"], USAGE, "--against"),
    (["bench", "tunnel", "--seconds", "nan"], USAGE, "0.01 to 3600"),
    (["bench", "link", "--seconds", "nan"], USAGE, "0.01 to 3600"),
    (["bench", "link", "--rate", "0"], USAGE, "rate 0 is out of range"),
    (["bench", "link", "--rate", "50/10/5"], USAGE, "at most 2 numbers"),
    (["bench", "link", "--rate", BYTES], USAGE, "is not a number"),
    (["bench", "link", "--rtt", "inf"], USAGE, "rtt inf is out of range"),
    (["bench", "link", "--loss", "1,"], USAGE, "is not a number"),
    (["bench", "link", "--loss", "1,1"], USAGE, "given twice"),
    (["bench", "link", "--loss", "101"], USAGE, "loss 101 is out of range"),
    (["bench", "link", "--queue", "-1"], USAGE, "queue -1 is out of range"),
    (["bench", "link", "--emulator", "tbf"], USAGE, "auto, relay or netem"),
    (["bench", "link", "--against", "a=b"], USAGE, "--against"),
    (["bench", "link", "--congestion-control", "no-such"], 1, "congestion control no-such"),
    (["tox", "-i", ID, "-L", "1:h:" + 5000 * "9"], USAGE, "the port must be a number"),
    (["tox", "-i", ID, "-W", "h:" + 5000 * "9"], USAGE, "the port must be a number"),
    (["tox", "-u", 5000 * "9"], USAGE, "the port must be a number"),
    (["tox", "-f", "/dev/zero", "-t", "0"], 1, "larger than"),
    (["tox", "-b", "/dev/zero", "-t", "0"], 1, "larger than"),
    (["tox", "-L", BYTES + ":1:h:2", "-i", ID], 1, r"cannot listen on \xff\xfe:1"),
    (["tox", "-F", "/", "-t", "0"], 1, "Is a directory"),
]


@pytest.mark.parametrize(
    ("line", "code", "said"), VALUES, ids=lambda each: ascii(each)[:60].replace("/", "|")
)
def test_an_odd_value_is_one_line(line: list[str], code: int, said: str) -> None:
    for place in ("true", f"{ASCII} PYTHONIOENCODING=ascii:strict"):
        done = run(line, place)
        check(done)
        assert done.returncode == code
        assert said in done.stdout + done.stderr


VARIABLES = [
    ("WATCHDOG_USEC", 5000 * "9"),
    ("WATCHDOG_USEC", 20 * "9"),
    ("NOTIFY_SOCKET", 5000 * "x"),
    ("TTUN_PSK", BYTES),
    ("XDG_RUNTIME_DIR", BYTES),
    ("SUDO_UID", BYTES),
    ("HOME", ""),
]


@pytest.mark.parametrize(("name", "value"), VARIABLES, ids=lambda each: ascii(each)[:20])
def test_an_odd_variable_is_no_end(name: str, value: str) -> None:
    """It comes up, and is ended by a signal."""
    command = ["unshare", "--net", "--mount", *PROGRAM, "server", "-l", ":0"]
    with subprocess.Popen(
        [*command, *([] if name == "TTUN_PSK" else ["-k", KEY])],
        env={**os.environ, name: value}, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "no capabilities" in line:
                break
        process.send_signal(signal.SIGTERM)
        lines += process.stderr.read().splitlines()
        assert process.wait(TIMEOUT) == 0, lines
    assert not any("Traceback" in line or "internal error" in line for line in lines)


def test_a_name_beyond_ascii_is_looked_up_also_once_the_user_has_changed() -> None:
    """What Python takes for such a name may lie where that user cannot read it."""
    command = ["unshare", "--net", *PROGRAM, "client", "-k", KEY, "-s", "é.invalid"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "cannot connect to é.invalid" in line or "Traceback" in line:
                break
        process.terminate()
        process.communicate(timeout=TIMEOUT)
    assert "Traceback" not in "".join(lines)


def test_output_that_cannot_be_written_is_an_error_also_of_help() -> None:
    for line in ("-h", "--version", "genkey", "server -h", "tox -h"):
        done = run(line.split(), "exec >/dev/full")
        assert (done.returncode, done.stderr) == (
            1,
            "ttun: cannot write the output: No space left on device\n",
        )


def test_bad_usage_is_code_2_also_where_it_cannot_be_said() -> None:
    for line in ("server -x", "dance", "server -k x -m none", "tox -x"):
        assert run(line.split(), "exec 2>/dev/full").returncode == 2
        assert run(line.split(), "exec 2>&-").returncode == 2
