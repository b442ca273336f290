"""A program that was taken over and asks the keeper for what it likes: no harm comes of it."""

from __future__ import annotations

import array
import contextlib
import functools
import os
import random
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import kept
import pytest
from kept import descriptors, process
from tunnel import eventually

from ttun.commands.hooks import Hooks
from ttun.flag import Flag
from ttun.process import keeper as module
from ttun.process.keeper import Keeper, parse, via


@pytest.fixture
def keeper() -> Iterator[Keeper]:
    with kept.made() as made:
        yield made


def test_messages_are_checked_by_their_form() -> None:
    assert parse(b"up\0peer=[2001:db8::1%eth0]:20203\0wire=x1") == (
        "up", {"peer": "[2001:db8::1%eth0]:20203", "wire": "x1"}
    )  # fmt: skip
    assert parse("down\0reason=weg: größer".encode()) == ("down", {"reason": "weg: größer"})
    for good in (b"dial\0number=1\0host=fe80::1%eth0\0port=65535", b"dial\0number=1\0host=\0port="):
        parse(good)
    for wrong in (
        b"", b"\0", b"UP", b"run", b"up\0", b"up\0peer", b"up\0device=eth0", b"up\0local4=10.0.0.1",
        b"up\0peer=a;b", b"up\0peer=$(b)", b"up\0peer=`b`", b"up\0peer=a\nb", b"up\0peer=*",
        b"up\0peer=" + b"a" * 256, b"up\0peer=\xff", "up\0peer=é".encode(), b"up\0wire=x2",
        b"up\0wire=x1\0wire=x1", b"down\0reason=\x1b[31m", b"down\0reason=a\nb", b"up\0cipher=A",
        b"down\0reason=" + b"a" * 257, b"dial\0number=1\0host=-oProxyCommand=x", b"hangup\0port=1",
        b"dial\0number=1\0host=a b", b"dial\0number=1\0port=65536", b"dial\0number=1\0port=0",
        b"dial\0number=1\0port=-1", b"dial\0number=x", "dial\0number=1\0port=\u0661".encode(),
        b"dial\0number=1\0host=" + b"a" * 256, b"dial\0number=1\0host=a\n", bytes(5000),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"."):
            parse(wrong)


def mutated(chance: random.Random, message: bytes) -> bytes:
    data = bytearray(message)
    for _ in range(chance.randint(1, 4)):
        how, place = chance.randrange(5), chance.randrange(len(data) + 1)
        if how == 0:
            data[place:place] = chance.choice(ODD)
        elif how == 1:
            del data[place : place + chance.randint(1, 8)]
        elif how == 2 and data:
            data[place % len(data)] = chance.randrange(256)
        elif how == 3:
            data[place:place] = data[: chance.randint(0, 40)]
        else:
            data += b"\0" + chance.choice(FACTS)
    return bytes(data)


FACTS = [
    b"peer=192.0.2.1:20203", b"peer=[2001:db8::1]:20203", b"wire=x1", b"cipher=aegis-256",
    b"transport=tcp", b"reason=the peer closed the connection", b"device=eth0", b"local4=10.0.0.1",
    b"host=example.net", b"port=22", b"number=1", b"command=id", b"path=/bin/sh", b"user=root",
    b"up=id", b"hooks=id", b"LD_PRELOAD=/tmp/x", b"PATH=/tmp", b"__class__=x", b"=", b"",
]  # fmt: skip
SEEDS = [
    b"up\0peer=192.0.2.1:20203\0transport=tcp\0wire=x1\0cipher=aegis-256",
    b"down\0peer=192.0.2.1:20203\0wire=x1\0reason=the peer closed the connection",
    b"hangup", b"background", b"run\0command=id", b'{"do": "up", "command": "id"}', b"",
]  # fmt: skip
DIAL = b"dial\0number=7\0host=example.net\0port=22"
ODD = [
    b"\0",
    b"\n",
    b"\xff",
    b"=",
    b"%h",
    b"%p",
    b"'",
    b'"',
    b"\\",
    b"../..",
    b"-",
    b"\x1b[31m",
    bytes(99),
]


@pytest.mark.slow
def test_a_hundred_thousand_messages_of_a_program_taken_over_do_no_harm(
    keeper: Keeper, said: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """No command but the fixed ones runs, no descriptor and no memory is kept, and it answers."""
    evil = said.with_name("evil")
    for shell in (f"$(touch {evil})", f"`touch {evil}`", f";touch {evil};", f"'\n touch {evil} #"):
        ODD.append(shell.encode())
    ran = said.with_name("ran")
    keeper.hooks = functools.partial(
        Hooks, f"eval : $TTUN_PEER; echo up >> {said}", f"echo down $TTUN_DEVICE >> {said}"
    )
    keeper.via = via(f"echo '%h' >> {ran}; cat", None)
    keeper.start({"device": "ttun0", "role": "server"})
    pid, sock = process(keeper), keeper._socket
    assert sock is not None
    sock_of_dial, stderr = keeper.dial("first", "1", Flag())
    os.close(stderr)
    sock_of_dial.close()
    keeper.hang_up()
    time.sleep(0.5)
    before = sorted(descriptors(pid))
    chance = random.Random(int(os.environ.get("TTUN_TEST_SEED", "1")))
    memory_before, dials = 0, 0
    given = os.open("/dev/null", os.O_RDONLY)

    def drain() -> None:
        room = socket.CMSG_LEN(64)
        with contextlib.suppress(BlockingIOError):
            while True:
                _, came, _, _ = sock.recvmsg(4096, room, socket.MSG_DONTWAIT)
                for _, _, data in came:
                    for descriptor in array.array("i", data):
                        os.close(descriptor)

    for number in range(100_000):
        kind = chance.randrange(100)
        if kind == 0:
            message = mutated(chance, DIAL) if number % 10 else DIAL
            dials += 1
        elif kind < 30:
            message = chance.randbytes(chance.choice((0, 1, 10, 200, module.MOST, 9000)))
        elif kind < 40:
            message = chance.choice(SEEDS) + b"\0" + b"\0".join(chance.sample(FACTS, 3))
        else:
            message = mutated(chance, chance.choice(SEEDS))
        if kind % 10 == 5:
            socket.send_fds(sock, [message or b"x"], [given] * chance.randint(1, 5))
        else:
            sock.send(message)
        if number % 100 == 0:
            drain()
        if number == 20_000:
            memory_before = resident(pid)
    os.close(given)
    drain()
    keeper.hang_up()
    eventually(lambda: (drain(), sorted(descriptors(pid)) == before)[1], "it has no more open", 60)
    assert resident(pid) < memory_before + 4096, "KiB"
    assert dials > 500
    sock_of_dial, stderr = keeper.dial("last", "1", Flag())
    os.close(stderr)
    sock_of_dial.close()
    keeper.close()
    assert set(said.read_text().splitlines()) == {"up", "down ttun0"}
    assert "last" in ran.read_text().splitlines()
    for line in ran.read_text().splitlines():
        assert re.fullmatch(module.FORMS["host"], line), line
    assert not evil.exists()
    text = capfd.readouterr().err
    assert "Traceback" not in text
    assert "keeper: refused a request: " in text
    assert len(text) < 100_000, "it does not fill the log either"


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0])
