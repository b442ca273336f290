"""``ttun show`` against sockets whose owner is hostile: it ends, and shows the true tunnels."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import random
import re
import socket
import time
from typing import Any

import pytest
from impostor import Place, line, made
from tunnel import eventually, libc

from ttun.commands import answer, prometheus, query, runtime, show
from ttun.commands.answer import Malformed, parse
from ttun.errors import printable

TEXTS = ("device", "peer", "transport", "cipher", "endpoint", "last_failure",
         "local4", "local6", "peer4", "peer6")  # fmt: skip
HIDDEN = "".join(chr(c) for c in (*range(32), *range(127, 160), 0x200F, 0x202E, 0x2028, 0xFEFF))


MALFORMED = {
    "nothing": b"\n",
    "a list": b"[1]\n",
    "an empty object": b"{}\n",
    "null": b"null\n",
    "a string": b'"device"\n',
    "no JSON": b"hello\n",
    "half of it": line()[:100],
    "no UTF-8": line().replace(b"ttun0", b"ttun\xff"),
    "UTF-16": line().decode().encode("utf-16"),
    "nested": b"[" * 60000 + b"\n",
    "nested objects": b'{"a":' * 12000 + b"\n",
    "NaN": line(round_trip=float("nan")),
    "infinity": line(silent_for=float("inf")),
    "1e999": line(connected_for=5.5).replace(b"5.5", b"1e999"),
    "a number of 4,000 digits": line(sessions=77).replace(b"77", b"7" * 4000),
    "a number of 60,000 digits": line(sessions=77).replace(b"77", b"7" * 60000),
    "more than 64 bits": line(sessions=1 << 64),
    "a negative count": line(sessions=-1),
    "a negative time": line(connected_for=-0.5),
    "a time for ever": line(connected_for=1e300),
    "True for a count": line(sessions=True),
    "a count in words": line(sessions="1"),
    "half a session": line(sessions=1.5),
    "no device": json.dumps({k: v for k, v in made().items() if k != "device"}).encode(),
    "a device in a list": line(device=["ttun0"]),
    "a long device": line(device="x" * 1000),
    "a role of its own": line(role="server\x1b[2J"),
    "an unhashable role": line(role={}),
    "a wire of its own": line(wire="x2"),
    "a peer without a wire": line(wire=None),
    "a peer without a time": line(connected_for=None),
    "a peer in a list": line(peer=[]),
    "a lack in words": line(missing="a route"),
    "lacks that are numbers": line(missing=[1]),
    "no totals": line(totals={}),
    "totals in a list": line(totals=[]),
    "a total in words": line(totals={**made()["totals"], "uplink_bytes": "many"}),
    "a process in words": line(pid="1"),
    "a namespace below zero": line(netns=-1),
    "another format": line(format=2),
    "an address in a list": line(peer4=["10.1.1.1"]),
    "a failure of 600 characters": line(last_failure="x" * 600),
    "a failure in the future": line(last_failure_ago=-1),
    "failures in words": line(failed_attempts="3"),
    "an MTU below zero": line(mtu=-1),
    "an endpoint that is a number": line(endpoint=20203),
    "70,000 bytes": b" " * 70000 + line(),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_what_is_no_answer_is_skipped_with_a_line_and_the_others_are_shown(
    place: Place, what: str
) -> None:
    place.answer("a.sock", MALFORMED[what])
    place.answer("b.sock", line(device="ttun7"))
    out, err = place.show()
    assert out.startswith("ttun7: server\n") and out.count("peer:") == 1
    assert err.startswith(f"ttun: skipped {place.directory}/a.sock: ") and err.count("\n") == 1


def test_fields_are_those_that_a_tunnel_sends() -> None:
    assert list(answer.FIELDS) == list(made())
    assert parse(line()) == made()
    assert parse(line(more="than that")) == made()
    assert parse(line(silent_for=None))["silent_for"] is None, "a session that is just ending"
    earlier = {name: value for name, value in made().items() if name not in answer.NEW}
    assert parse(json.dumps(earlier).encode()) == made(**{**dict.fromkeys(answer.NEW), "format": 1})


def test_random_answers_are_one_or_malformed() -> None:
    rng = random.Random(1)
    values = [None, True, -1, 0, 1 << 63, 1 << 70, 1.5, 1e400, "", "x" * 300, [], {}, [[]], HIDDEN]
    for _ in range(3000):
        names = rng.sample(list(answer.FIELDS), rng.randrange(1, 4))
        changed = made(**{name: rng.choice(values) for name in names})
        for name in rng.sample(list(answer.FIELDS), rng.randrange(3)):
            if rng.random() < 0.1:
                del changed[name]
        with contextlib.suppress(Malformed):
            tunnel = {**parse(json.dumps(changed).encode()), "uid": 0}
            shown(tunnel)
    for _ in range(3000):
        bytes_ = bytearray(line())
        for _ in range(rng.randrange(1, 5)):
            bytes_[rng.randrange(len(bytes_))] = rng.randrange(256)
        with contextlib.suppress(Malformed):
            shown({**parse(bytes(bytes_)), "uid": 0})


def shown(tunnel: dict[str, Any]) -> None:
    """Show a tunnel in every form: nothing in it moves a cursor, and Prometheus can read it."""
    assert all(text.isprintable() for text in show.describe_all([tunnel])[0])
    labels = prometheus.labels([tunnel], show._elsewhere([tunnel]))
    for text in prometheus.lines([tunnel], labels):
        assert text.startswith("# ") or SERIES.fullmatch(text), text
        assert text.isprintable()


# The text format: prometheus.io/docs/instrumenting/exposition_formats
LABEL = r'[a-z]+="((?:[^"\\\n]|\\\\|\\"|\\n)*)"'
SERIES = re.compile(rf"ttun_\w+\{{{LABEL}(?:,{LABEL})*\}} [0-9.e+-]+")


def test_nothing_that_a_terminal_obeys_reaches_it(place: Place) -> None:
    evil = f"\x1b]0;pwned\x07{HIDDEN}"
    changes = {**{name: evil for name in TEXTS}, "last_failure_ago": 1}
    place.answer("a\x1b[2J\n\u202e.sock", b"nonsense")
    place.answer("b.sock", line(**changes, missing=[evil]))
    for options in ((), ("--json",), ("--prometheus",), (evil,)):
        code, out, err = place.run(*(o.replace("\0", "") for o in options))
        assert code == (1 if options == (evil,) else 0)
        for text in (*out.split("\n"), *err.split("\n")):
            assert text.isprintable(), text
        assert r"a\x1b[2J\n\u202e.sock: malformed answer" in err
        if options == ("--json",):
            assert json.loads(out)[0]["device"] == evil
        elif code == 0:
            assert r"\x1b]0;pwned" in out


def test_an_answer_cannot_forge_series(place: Place) -> None:
    forged = 'x",role="client"} 7\nttun_connected{device="ttun0",role="server"} 1\n#\\'
    place.answer("a.sock", line(device=forged))
    out, _ = place.show("--prometheus")
    for text in out.splitlines():
        assert text.startswith("# ") or SERIES.fullmatch(text), text
    (series,) = [text for text in out.splitlines() if text.startswith("ttun_connected")]
    device = re.match(rf"ttun_connected\{{{LABEL}", series)
    assert device is not None
    value = re.sub(r"\\(.)", lambda m: "\n" if m[1] == "n" else m[1], device[1])
    assert value == forged, "what Prometheus reads is what was said"


def test_series_are_unique_whatever_is_said(place: Place) -> None:
    for number in range(4):
        place.answer(f"{number}.sock", line())
    out, err = place.show("--prometheus")
    series = [text.split("} ")[0] for text in out.splitlines() if not text.startswith("#")]
    assert len(series) == len(set(series)) > 0
    assert err.count(f"skipped process {os.getpid()}: ") == 2, "the others are told apart by it"


def test_the_kernel_says_which_process_answers(place: Place) -> None:
    place.answer("a.sock", line(pid=1))
    (tunnel,) = json.loads(place.show("--json")[0])
    assert (tunnel["pid"], tunnel["uid"]) == (os.getpid(), os.geteuid())


def drip(asking: socket.socket) -> None:
    while True:
        asking.sendall(b" ")
        time.sleep(0.5)


def test_one_deadline_holds_for_all(place: Place) -> None:
    for number in range(30):
        place.answer(f"a{number}.sock", drip)
        place.listen(f"b{number}.sock")
        full = place.listen(f"c{number}.sock", backlog=0)
        with contextlib.suppress(BlockingIOError):
            while True:
                waiting = socket.socket(socket.AF_UNIX)
                place.listeners.append(waiting)
                waiting.setblocking(False)
                waiting.connect(full.getsockname())
    place.answer("z.sock", line(device="ttun7"))
    start = time.monotonic()
    out, err = place.show()
    print(f"{time.monotonic() - start:.1f} s")
    assert out.startswith("ttun7: server\n")
    assert err.count("no answer within 2 s") == 10 and "ttun: and 80 more" in err


def test_an_answer_without_end_is_not_kept(place: Place) -> None:
    def flood(asking: socket.socket) -> None:
        while True:
            asking.sendall(b" " * 65536)

    for number in range(5):
        place.answer(f"{number}.sock", flood)
    place.answer("z.sock", line(device="ttun7"))
    out, err = place.show()
    assert out.startswith("ttun7: server\n")
    assert err.count("answer larger than 65536 bytes") == 5


def test_the_line_is_the_answer_whether_the_socket_is_closed_or_not(place: Place) -> None:
    place.answer("a.sock", lambda asking: (asking.sendall(line()), place.over.wait()))
    assert place.show() == (place.show()[0], "")


def test_one_full_directory_does_not_hide_another(place: Place) -> None:
    for number in range(700):
        place.listen(f"{number}.sock", inner="hostile")
    for number in range(10000):
        (place.directory / "hostile" / f"{number}-file.sock").touch()
    place.answer("ttun7.1.sock", line(device="ttun7"), inner="true")

    def found() -> str:
        """It has two seconds for all of them, which a busy machine may need for other things."""
        _, out, err = place.run()
        return err if out.startswith("ttun7: server\n") else ""

    err = eventually(found, "the other one", 120)
    assert err.count("\n") <= 12 and "more than 1024 entries" in err


def test_neither_many_directories_nor_many_sockets_hide_another(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pause stands for a directory with many entries, and for a busy machine."""
    looked, connected = runtime.entries, runtime.connect
    monkeypatch.setattr(runtime, "entries", lambda *each: time.sleep(0.05) or looked(*each))
    monkeypatch.setattr(runtime, "connect", lambda *each: time.sleep(0.01) or connected(*each))
    for number in range(100):
        (place.directory / str(number)).mkdir()
        for other in range(10):
            (place.directory / str(number) / f"{other}.sock").touch()
    place.answer("ttun7.1.sock", line(device="ttun7"))
    answers = query.ask([place.directory])
    assert [tunnel["device"] for tunnel in answers.tunnels] == ["ttun7"]
    assert f"directories in {place.directory}: too many entries" in answers.skipped[0]


def test_an_answer_is_read_while_a_full_directory_takes_all_the_time(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a slow machine: the time is over before each socket was connected to."""
    for number in range(200):
        place.listen(f"{number}.sock", inner="hostile")
    place.answer("ttun7.1.sock", line(device="ttun7"), inner="true")
    connect = runtime.connect

    def slow(sock: socket.socket, directory: int, name: str) -> int:
        time.sleep(0.05)
        return connect(sock, directory, name)

    monkeypatch.setattr(runtime, "connect", slow)
    found = query.ask([place.directory], 5)
    assert [tunnel["device"] for tunnel in found.tunnels] == ["ttun7"]


def test_what_is_no_socket_is_not_opened_and_no_link_is_followed(place: Place) -> None:
    other = place.directory.parent / "other"
    listener = place.listen(str(other))
    listener.setblocking(False)
    (place.directory / "link.sock").symlink_to(other)
    (place.directory / "loop.sock").symlink_to("loop.sock")
    (place.directory / "file.sock").write_bytes(line())
    os.mkfifo(place.directory / "fifo.sock")
    (place.directory / "directory.sock").mkdir()
    (place.directory / "outside").symlink_to(place.directory.parent)
    (place.directory / os.fsdecode(b"\xff\n.sock")).touch()
    datagrams = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    datagrams.bind(str(place.directory / "datagrams.sock"))
    place.listeners.append(datagrams)
    place.answer("z.sock", line(device="ttun7"))
    out, err = place.show()
    assert out.startswith("ttun7: server\n")
    for name in ("link", "loop", "file", "fifo", r"\xff\n"):
        assert f"skipped {place.directory}/{name}.sock: not a socket\n" in err
    assert "datagrams.sock: Protocol wrong type for socket\n" in err
    assert err.count("\n") == 6
    with pytest.raises(BlockingIOError):
        listener.accept()


def test_a_directory_that_is_a_link_is_not_followed(place: Place) -> None:
    place.answer("z.sock", line())
    moved = place.directory.rename(place.directory.with_name("moved"))
    place.directory.symlink_to(moved)
    code, out, err = place.run()
    assert (code, out) == (1, "")
    assert f"skipped {place.directory}: Not a directory\n" in err


def test_few_descriptors_are_enough_for_many_sockets(place: Place) -> None:
    for number in range(100):
        place.answer(f"{number}.sock", line(device=f"ttun{number}"))
    out, err = place.show(limits="--nofile=16")
    assert (out.count("peer:"), err) == (100, "")


@pytest.mark.hosts
@pytest.mark.parametrize("inner", ["inner", pytest.param("", marks=pytest.mark.slow)])
def test_a_file_system_of_the_owner_does_not_hold_root(place: Place, inner: str) -> None:
    """FUSE, and a daemon that answers nothing: every system call that asks it waits for ever."""
    target = place.directory / inner
    target.mkdir(exist_ok=True)
    place.answer("z.sock", line(device="ttun7"), inner="true") if inner else None
    try:
        daemon = os.open("/dev/fuse", os.O_RDWR)
    except OSError:
        pytest.skip("no FUSE here")
    options = f"fd={daemon},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
    if libc.mount(b"ttun", os.fsencode(target), b"fuse", 0, options) != 0:
        pytest.skip(f"no FUSE here: {errno.errorcode[ctypes.get_errno()]}")
    try:
        code, out, err = place.run(seconds=100)
        if inner:
            assert (code, out[:6]) == (0, "ttun7:")
            assert f"skipped {target}: something is mounted there\n" in err
        else:
            assert (code, out) == (1, "")
            assert (
                err.startswith("ttun: cannot query the tunnels in /run/ttun and ")
                and err.count("\n") == 1
            )
    finally:
        os.close(daemon)
        libc.umount2(os.fsencode(target), 2)  # MNT_DETACH


def test_printable_text_stays_as_it_is() -> None:
    for text in ("ttun0", "\u0442\u0443\u043d", "[2001:db8::1%eth0]:20203", "a\\b", ""):
        assert printable(text) == text
    assert printable("a\x9b31m\ud800b\u00a0") == r"a\x9b31m\ud800b\xa0"
