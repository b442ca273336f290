"""Secrets in the environment are not left where the kernel shows it, and still work."""

from __future__ import annotations

from pathlib import Path

import pytest
from tunnel import CLIENT, SERVER, Bench

from ttun.commands import key

SECRET = "a secret of twenty bytes"


@pytest.mark.hosts
def test_no_secret_stays_in_the_environment_that_the_kernel_shows(plain: Bench) -> None:
    variables = {name.decode(): SECRET for name in key.SECRETS if b"PROXY" not in name.upper()}
    proxies = {"ALL_PROXY": f"socks5://me:{SECRET}@192.0.2.9:1", "TTUN_OTHER": SECRET}
    server = plain.start(SERVER, "server", environment={**variables, **proxies})
    client = plain.start(CLIENT, "client", "-s", "192.0.2.1", environment={**variables, **proxies})
    client.says("authenticated")
    plain.answers()
    for end in (server, client):
        shown = Path(f"/proc/{end.process.pid}/environ").read_bytes()
        pairs = dict(each.split(b"=", 1) for each in shown.split(b"\0") if each)
        for name in [*variables, "ALL_PROXY"]:
            assert set(pairs[name.encode()]) == {ord("*")}
        assert pairs[b"TTUN_OTHER"] == SECRET.encode(), "others are as they were"
        assert end.stop() == 0
