"""The command for the client, with key and address, that a server shows on a terminal."""

from __future__ import annotations

import os
import pty
import re

import pytest
from tunnel import CLIENT, PROGRAM, SERVER, Bench

from ttun.commands import run

pytestmark = pytest.mark.hosts


def test_a_server_without_a_key_makes_one_and_shows_the_clients_command(bench: Bench) -> None:
    """On a terminal: /etc is an empty directory of the test's own, seen by this program alone."""
    etc = bench.directory / "etc"
    etc.mkdir()
    script = f'mount --bind {etc} /etc && exec "$@"'
    own_etc = ["unshare", "--mount", "sh", "-c", script, "sh"]
    terminal, inside = pty.openpty()
    with (bench.directory / "log").open("w") as log:
        command = [*own_etc, *PROGRAM, "server", "-l", ":20204"]
        server = bench.pair.start(SERVER, command, stdout=inside, stderr=log)
    os.close(inside)
    try:
        shown = b""
        while b"-s 192.0.2.1:20204" not in shown:
            shown += os.read(terminal, 1000)
        key = re.search(rb"sudo ./ttun.py client -k ([0-9a-f]{64}) -s", shown)[1].decode()
        kept = etc / "ttun" / "psk"
        assert kept.read_text() == key + "\n"
        assert kept.stat().st_mode & 0o777 == 0o600
        assert key not in (bench.directory / "log").read_text()
        client = bench.start(CLIENT, "client", "-s", "192.0.2.1:20204", "--psk-file", str(kept))
        client.says("authenticated")
    finally:
        server.terminate()
        server.wait(5)
        os.close(terminal)


def test_the_command_for_the_client_names_an_address_where_the_server_listens(
    plain: Bench,
) -> None:
    def shown(listen: str) -> str:
        return plain.on(SERVER, lambda: run._our_address(listen, 9))

    assert shown(":7") == shown("0.0.0.0:7") == "192.0.2.1:7"
    assert shown("[::]:7") == "[2001:db8::1]:7", "it takes IPv6 alone"
    assert shown("192.0.2.77:0") == "192.0.2.77:9", "the port that the kernel chose"
