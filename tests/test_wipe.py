"""A session leaves neither keys nor packets in freed memory.

It runs in a separate program, with a library that inspects each freed block: freed.c.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tunnel import ROOT

SECRETS = ["uplink key", "downlink key", "next uplink key", "next downlink key", "packet sent",
           "packet received", "nothing wiped"]  # fmt: skip

# Patterns are in the environment with all bits inverted: there they are not to be found.
# Short bytes of Python's are in arenas of its own, which are not freed one by one.
SCRIPT = """
import ctypes, os, socket, sys, threading, time
from ttun._codec import ffi, lib
from ttun.cipher import CIPHERS, CipherState

*keys, sent, received, unwiped = (
    bytes(255 - byte for byte in bytes.fromhex(text))
    for text in os.environ["TTUN_TEST_FREED"].split(",")
)
cipher = CIPHERS["chacha20-poly1305"]
states = [CipherState(cipher, number % 2, key) for number, key in enumerate(keys)]
inside, outside = socket.socketpair(type=socket.SOCK_DGRAM)
inside.setblocking(False)
with socket.create_server(("127.0.0.1", 0)) as listener:
    ours = socket.create_connection(listener.getsockname())
    theirs, _ = listener.accept()
if sys.argv[1] == "queued":  # the connection is slow, so the packet waits in the queue
    ours.setsockopt(socket.SOL_SOCKET, 47, 20_000)  # SO_MAX_PACING_RATE, bytes per second
uplink, downlink, *following = [state.c for state in states]
arguments = inside.fileno(), ours.fileno(), 0, 0, uplink, downlink, 1, 2, 1 << 20
session = lib.ttun_session_new(*arguments)
assert lib.ttun_session_rekey(session, *following)
names = "uplink_seal", "uplink_send", "downlink_receive", "downlink_open"
bodies = [getattr(lib, f"ttun_{name}") for name in names]
threads = [threading.Thread(target=body, args=(session,)) for body in bodies]
for thread in threads:
    thread.start()
if sys.argv[1] == "queued":
    for _ in range(60):
        outside.send(bytes(1200))
        time.sleep(0.01)
outside.send(sent)
time.sleep(0.1)
theirs.sendall(CipherState(cipher, 1, keys[1]).seal(received))
directions = lib.TTUN_COUNT_UPLINK_PACKETS, lib.TTUN_COUNT_DOWNLINK_PACKETS
counted, end = [0], time.monotonic() + (20 if sys.argv[1] == "sent" else 1)
while not all(counted) and time.monotonic() < end:
    counted = [lib.ttun_session_counter(session, which) for which in directions]
    time.sleep(0.01)
lib.ttun_session_stop(session)
for thread in threads:
    thread.join()
lib.ttun_session_free(session)
print(*counted)

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
block = ctypes.c_void_p(libc.malloc(1000))
ctypes.memmove(block, unwiped, len(unwiped))
libc.free(block)
"""


@pytest.mark.parametrize("last", ["sent", "queued"])
@pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="a sanitizer has its own free()")
def test_a_session_leaves_neither_keys_nor_packets_in_memory(tmp_path: Path, last: str) -> None:
    library = tmp_path / "freed.so"
    source = ROOT / "tests/helpers/freed.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-O2", source, "-o", library], check=True)
    patterns = ",".join(os.urandom(32).hex() for _ in SECRETS)
    environment = {"LD_PRELOAD": str(library), "TTUN_TEST_FREED": patterns, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, last],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    if last == "sent":
        assert done.stdout.split() == ["1", "1"], "a packet went each way"
    found = [SECRETS[int(number)] for number in re.findall(r"freed with pattern (\d)", done.stderr)]
    assert found == ["nothing wiped"], "else what was freed is not looked at"
