"""The recipe for systemd-resolved in docs/default-route.md, with the real one."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import resolved
from machine import IS_NOBODY_HERE
from name_server import NAME_SERVER, NameServer, resolv_conf
from outside import FAR, TTUN_USER, connected
from tunnel import CLIENT, ROOT, SERVER, Bench, End, eventually

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(not IS_NOBODY_HERE, reason="no other user in this user namespace"),
    pytest.mark.skipif(bool(resolved.why_not()), reason=resolved.why_not()),
]

PAGE = ROOT / "docs/default-route.md"
INSIDE, OUTSIDE = "198.51.100.10", "198.51.100.20"  # what each name server says


def test_the_recipe_of_the_page_sends_all_queries_through_the_tunnel_while_a_peer_is_there(
    far: Bench, tmp_path: Path
) -> None:
    key = tmp_path / "K"
    key.write_text("secret")
    key.chmod(0o600)
    server = far.server()
    near, beyond = NameServer(far), NameServer(far, SERVER, "10.1.1.1")
    near.address, beyond.address = OUTSIDE, INSIDE

    def found() -> str:
        return resolved.query(far, "inner.example")

    def start() -> End:
        text = PAGE.read_text().partition("systemd-resolved (`")[2].partition("\n\n")[2]
        words = shlex.split(text.partition("\n\n")[0].replace("\\\n", ""))
        assert words[:3] == ["sudo", "ttun", "client"]
        here = {"K": str(key), "vpn.example.net": FAR}
        words = [here.get(word, word) for word in words[2:]]
        return far.start(CLIENT, *words, "--user", str(TTUN_USER))

    try:
        with resolv_conf(tmp_path, resolved.STUB), resolved.running(far, tmp_path):
            assert resolved.control(far, "dns", "vclient", NAME_SERVER) is not None
            try:
                eventually(lambda: found() == OUTSIDE, "it finds a name without ttun")
            except AssertionError:  # nothing here that ttun could have broken
                said = resolved.state(far, "inner.example", tmp_path)
                pytest.skip(f"systemd-resolved finds nothing on this machine: {said}")
            client = start()
            connected(far, client)
            eventually(lambda: found() == INSIDE, "the name server behind the tunnel")
            asked = near.asked
            assert found() == INSIDE
            assert near.asked == asked, "no query went elsewhere"
            server.stop()
            eventually(lambda: "10.1.1.1" not in str(resolved.control(far, "dns")), "reverted")
            server = far.server()
            connected(far, client, 2)
            eventually(lambda: found() == INSIDE, "again")
            assert client.stop() == 0
            eventually(lambda: found() == OUTSIDE, "the one before")
            assert "exit code" not in client.log()
            client = start()
            connected(far, client)
            eventually(lambda: found() == INSIDE, "again")
            client.kill()
            eventually(lambda: found() == OUTSIDE, "the one before, after kill -9 too")
    finally:
        near.close()
        beyond.close()
