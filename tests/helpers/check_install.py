"""Check that the installed ttun works. Needs no pytest, source or root.

    python tests/helpers/check_install.py

Checks the test vectors of protocol v1 (known_answers.py), a key exchange, and the program itself,
on a fresh installation for another processor or libc; see packaging/check_wheels.py.
"""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sys
import sysconfig
from pathlib import Path

from known_answers import SESSIONS, frames, plaintext

import ttun
from ttun import handshake, sodium
from ttun.cipher import CIPHERS, TO_CLIENT, TO_SERVER, CipherState

DIRECTIONS = {"client to server": TO_SERVER, "server to client": TO_CLIENT}


def known_answers(session: dict) -> int:
    """Seal and open the frames of a session; return their number."""
    sk = bytes.fromhex(session["SK"])
    k = handshake.psk_key(bytes.fromhex(session["psk"]))
    nonces = bytes.fromhex(session["client_nonce"]), bytes.fromhex(session["server_nonce"])
    assert handshake.session_key(k, *nonces) == sk, "session key"
    checked = 0
    for direction, code in DIRECTIONS.items():
        cipher = CIPHERS[session["cipher"]]
        sealing, opening = CipherState(cipher, code, sk), CipherState(cipher, code, sk)
        for frame in frames(session, direction):
            sealed = sealing.seal(plaintext(frame))
            assert hashlib.sha256(sealed).hexdigest() == frame["frame_sha256"], frame["counter"]
            assert opening.open(sealed[2:]) == plaintext(frame), frame["counter"]
            checked += 1
    return checked


def main() -> None:
    checked = 0
    for session in SESSIONS:
        if session["cipher"] == "aes-256-gcm" and not sodium.HAS_AES:
            print("no AES here: its known answers are left out")
            continue
        checked += known_answers(session)
    assert checked, "no session could be checked"
    ours, theirs = sodium.KeyPair(), sodium.KeyPair()
    assert ours.shared(theirs.public) == theirs.shared(ours.public), "X25519"
    program = Path(sys.executable).with_name("ttun")
    key = subprocess.run([program, "genkey"], capture_output=True, text=True, check=True).stdout
    assert len(key) == 65, key
    here = f"{platform.machine()}, Python {platform.python_version()}"
    musl = "musl" in (sysconfig.get_config_var("SOABI") or "")
    libc = "musl" if musl else " ".join(platform.libc_ver()) or "another libc"
    print(f"ttun {ttun.__version__} on {here}, {libc}: {checked} known answers right")


if __name__ == "__main__":
    main()
