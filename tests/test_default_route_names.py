"""The whole default route of a client that finds its server by a name: whom it asks, and where."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import resolved
from carried import needs_socat
from machine import IS_NOBODY_HERE
from name_server import NameServer, resolv_conf
from outside import (
    DEFAULT,
    FAR,
    NAME,
    NAME_SERVER,
    OTHER_FAR,
    Capture,
    connected,
    hosts,
    others_sending,
)
from tunnel import CLIENT, Bench, End

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(not IS_NOBODY_HERE, reason="no other user in this user namespace"),
]


@pytest.fixture
def stub(far: Bench, tmp_path: Path) -> Iterator[NameServer]:
    """A name server on the client's host that asks nobody while it is silent."""
    made = NameServer(far, CLIENT, "127.0.0.53")
    made.address = FAR
    with resolv_conf(tmp_path, "127.0.0.53"):
        yield made
    made.close()


def by_name(far: Bench) -> tuple[End, End]:
    """A server, and a client that has found it by its name."""
    server = far.server("-l", f"{FAR}:20203")
    client = far.client(*DEFAULT, to=NAME)
    connected(far, client)
    return server, client


def follows(far: Bench, client: End, server: End, upstream: NameServer) -> None:
    """The name gets another address, and the client finds the server there."""
    upstream.address = OTHER_FAR
    server.stop()
    far.server("-l", f"{OTHER_FAR}:20203")
    connected(far, client, 2)
    assert "last addresses" not in client.log()


def test_a_local_name_server_is_passed_over_for_its_upstream(far: Bench, stub: NameServer) -> None:
    """Its own queries would go into the tunnel: here it is silent from then on."""
    upstream = NameServer(far)
    upstream.address = FAR
    place = Path("/run/systemd/resolve/resolv.conf")
    place.parent.mkdir(parents=True)
    try:
        text = f"# 192.0.2.77 is dead\nnameserver 192.0.2.77\nnameserver {NAME_SERVER}\n"
        place.write_text(text)
        server, client = by_name(far)
        assert upstream.asked
        stub.silent = True
        follows(far, client, server, upstream)
    finally:
        upstream.close()


def test_a_local_name_server_that_asks_behind_the_tunnel_does_not_hold_the_start_up(
    far: Bench, stub: NameServer
) -> None:
    """As on a router whose LAN resolves at the server: dnsmasq is silent before the tunnel."""
    stub.silent = True
    upstream = NameServer(far)
    upstream.address = FAR
    place = Path("/run/systemd/resolve/resolv.conf")
    place.parent.mkdir(parents=True)
    try:
        place.write_text(f"nameserver {NAME_SERVER}\n")
        _, client = by_name(far)
        assert "cannot resolve" not in client.log()
        assert not stub.asked
    finally:
        upstream.close()


def test_a_local_name_server_without_upstream_is_a_line_and_last_addresses_are_dialled(
    far: Bench, stub: NameServer
) -> None:
    server = far.server()
    client = far.client(*DEFAULT, to=NAME)
    client.says("capabilities")
    stub.silent = True
    connected(far, client)
    for times in (2, 3):
        server.stop()
        server = far.server()
        connected(far, client, times)
    said = (
        "the name server 127.0.0.53 sends its queries through the tunnel: until that is connected, "
        f"the last addresses of {NAME} are dialled"
    )
    assert client.log().count(said) == 1


def test_a_name_that_does_not_resolve_yet_leaves_nobody_outside(far: Bench, tmp_path: Path) -> None:
    asked = NameServer(far)
    asked.address = None
    try:
        with resolv_conf(tmp_path, NAME_SERVER), Capture(far) as capture, others_sending(far):
            far.server()
            client = far.client(*DEFAULT, to=NAME)
            client.says("capabilities")
            begin = time.monotonic()
            client.says("cannot connect to", seconds=60)
            assert capture.leaked(begin) == []
            asked.address = FAR
            connected(far, client)
            assert capture.leaked(begin) == []
    finally:
        asked.close()


def test_a_name_that_only_a_local_name_server_knows_is_waited_for(
    far: Bench, stub: NameServer
) -> None:
    """Behind the rules that would ask in vain."""
    stub.address = None
    far.server()
    client = far.client(*DEFAULT, to=NAME)
    client.says("cannot resolve", times=2, seconds=60)
    assert hosts(far).rules() == [] and far.devices(CLIENT) == []
    stub.address = FAR
    connected(far, client)


REAL = {  # a real server, the file in which it has its upstream servers, its own address
    "dnsmasq": (shutil.which("dnsmasq"), "/run/dnsmasq/resolv.conf", "127.0.0.1"),
    "resolved": (resolved.PROGRAM, "/run/systemd/resolve/resolv.conf", "127.0.0.53"),
}


@pytest.fixture(params=REAL)
def real_stub(request: pytest.FixtureRequest, far: Bench, tmp_path: Path) -> Iterator[None]:
    """dnsmasq or systemd-resolved on the client's host, which asks the name server outside."""
    program, upstream, address = REAL[request.param]
    if not program:
        pytest.skip(f"no {request.param} here")
    directory = Path(upstream).parent
    directory.mkdir(parents=True)
    command = [program]
    stack = contextlib.ExitStack()
    if request.param == "dnsmasq":
        Path(upstream).write_text(f"nameserver {NAME_SERVER}\n")
        command += ["--keep-in-foreground", f"--listen-address={address}", "--bind-interfaces",
                    "--conf-file=/dev/null", f"--resolv-file={upstream}", "--pid-file",
                    "--cache-size=0", "--user=root"]  # fmt: skip
    else:
        stack.enter_context(resolved.user(tmp_path))
        entry = pwd.getpwnam(resolved.USER)
        os.chown(directory, entry.pw_uid, entry.pw_gid)
        extra = Path("/run/systemd/resolved.conf.d/test.conf")
        extra.parent.mkdir()
        extra.write_text(f"[Resolve]\nDNS={NAME_SERVER}\nFallbackDNS=\nCache=no\nDNSSEC=no\n")
    process = far.pair.start(CLIENT, command, stderr=subprocess.DEVNULL)
    try:
        with stack, resolv_conf(tmp_path, address):
            yield
    finally:
        process.kill()
        process.wait()


def test_a_real_local_name_server_is_passed_over_too(far: Bench, real_stub: None) -> None:
    upstream = NameServer(far)
    upstream.address = FAR
    try:
        server, client = by_name(far)
        follows(far, client, server, upstream)
    finally:
        upstream.close()


def test_without_a_name_server_in_resolv_conf_the_one_on_this_machine_is_asked(
    far: Bench, tmp_path: Path
) -> None:
    """As the C library does it; until that knows the name no rule is made."""
    with resolv_conf(tmp_path, "", "# nothing: "):
        server = far.server()
        client = far.client(*DEFAULT, to=NAME)
        client.says("cannot resolve", times=2, seconds=60)
        assert hosts(far).rules() == []
        made = NameServer(far, CLIENT, "127.0.0.1")
        made.address = FAR
        try:
            connected(far, client)
            made.silent = True
            server.stop()
            far.server()
            client.says("authenticated", 2, seconds=60)
        finally:
            made.close()
        assert "the name server 127.0.0.1 sends its queries through the tunnel" in client.log()


@needs_socat
def test_a_command_that_has_to_ask_a_local_name_server_is_warned_of(
    far: Bench, tmp_path: Path
) -> None:
    """By address it connects; a name server elsewhere is no reason to warn."""
    far.server()
    command = ("client", "-k", "secret", *DEFAULT, "--via", f"socat - TCP:{FAR}:20203")
    said = "--via cannot look names up while there is no session: the name server 127.0.0.53"
    for server, warns in (("127.0.0.53", True), (NAME_SERVER, False)):
        with resolv_conf(tmp_path, server):
            client = far.start(CLIENT, *command)
            connected(far, client)
            assert (said in client.log()) == warns
            assert client.stop() == 0
