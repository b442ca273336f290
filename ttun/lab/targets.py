"""Benchmark targets: ttun itself, and competitors that are measured in the same run.

A target knows how to start both its ends on two hosts. Traffic goes to the tunnel address of the
server's end.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ttun.errors import TtunError, UsageError
from ttun.lab import netns
from ttun.lab.netns import CLIENT, SERVER, Hosts

Ends = list["subprocess.Popen[str]"]
TUNNEL = "10.1.1.1"


@dataclass(frozen=True)
class Target:
    """Something to measure. start: None for the bare link between the hosts."""

    name: str
    address: str
    start: Callable[[Hosts], Ends] | None


BARE_LINK = Target("no tunnel", netns.IPV4[SERVER], None)


def ttun(*options: str) -> Target:
    """Return ttun with some options on both ends."""

    def start(pair: Hosts) -> Ends:
        environment = netns.environment_of_ends()
        server = netns.python("ttun", "server", *options)
        client = netns.python("ttun", "client", "-s", netns.IPV4[SERVER], *options)
        return [
            _quietly(pair, host, command, environment)
            for host, command in ((SERVER, server), (CLIENT, client))
        ]

    return Target(" ".join(["ttun", *options]), TUNNEL, start)


def competitor(text: str) -> Target:
    """Return what --against names: openvpn, wireguard-go, or 'SERVER COMMAND :: CLIENT COMMAND'.

    In a command, {peer} stands for the server's address. NAME= in front sets the name in tables.
    Raises UsageError for anything else, TtunError for a program that is not installed.
    """
    named = re.match(r"([\w.+-]+)=", text)
    if named:
        return replace(competitor(text[named.end() :]), name=named[1])
    if text == "openvpn":
        _need("openvpn", "openssl")
        return Target("openvpn (tcp, aes-256-gcm)", TUNNEL, _start_openvpn)
    if text.rpartition("/")[2] == "wireguard-go":
        _need(text, "wg")
        return Target(text, TUNNEL, lambda pair: _start_wireguard(pair, text))
    server, separator, client = text.partition("::")
    if not separator:
        raise UsageError(
            f"--against {text!r} is not openvpn, wireguard-go or "
            "'SERVER COMMAND :: CLIENT COMMAND', with an optional NAME= in front"
        )
    try:
        commands = [shlex.split(end.format(peer=netns.IPV4[SERVER])) for end in (server, client)]
    except (ValueError, LookupError, AttributeError) as error:  # of shlex and of str.format
        raise UsageError(f"--against {text!r}: {error} (write a brace as {{{{)") from None
    if not all(commands):
        raise UsageError(f"--against {text!r}: a command is missing on one side of '::'")
    _need(*(command[0] for command in commands))

    def start(pair: Hosts) -> Ends:
        ends = [_quietly(pair, SERVER, commands[0])]
        time.sleep(1)
        return [*ends, _quietly(pair, CLIENT, commands[1])]

    return Target(Path(commands[0][0]).name, TUNNEL, start)


def _need(*programs: str) -> None:
    for program in programs:
        if not shutil.which(program):
            raise TtunError(f"--against: {program} is not installed")


def _quietly(
    pair: Hosts, host: str, command: list[str], environment: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    nowhere = subprocess.DEVNULL
    return pair.start(host, command, environment=environment, stdout=nowhere, stderr=nowhere)


def _start_openvpn(pair: Hosts) -> Ends:
    """Start OpenVPN over TCP, with new certificates that name each other."""
    ends = []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        prints = {host: _certificate(directory, host) for host in (SERVER, CLIENT)}
        for host, other, more in (
            (SERVER, CLIENT, f"proto tcp-server\nlocal {netns.IPV4[SERVER]}\ntls-server\ndh none"),
            (CLIENT, SERVER, f"proto tcp-client\nremote {netns.IPV4[SERVER]}\nnobind\ntls-client"),
        ):
            mine, theirs = (TUNNEL, "10.1.1.2")[:: 1 if host == SERVER else -1]
            config = directory / f"{host}.conf"
            config.write_text(
                f"{more}\ndev tun\nifconfig {mine} {theirs}\ntun-mtu 1280\ntcp-nodelay\n"
                f"cert {directory}/{host}.crt\nkey {directory}/{host}.key\n"
                f"peer-fingerprint {prints[other]}\ndata-ciphers AES-256-GCM\n"
            )
            ends.append(_quietly(pair, host, ["openvpn", "--config", str(config)]))
            time.sleep(1)  # by then it has read its files
    return ends


def _certificate(directory: Path, name: str) -> str:
    """Make a certificate and a key, and return the certificate's fingerprint."""
    files = ["-keyout", f"{directory}/{name}.key", "-out", f"{directory}/{name}.crt"]
    _run("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-subj", f"/CN={name}", "-days", "2", *files)  # fmt: skip
    fingerprint = _run("openssl", "x509", "-in", files[-1], "-noout", "-fingerprint", "-sha256")
    return fingerprint.strip().partition("=")[2]


def _start_wireguard(pair: Hosts, program: str) -> Ends:
    ends, keys = [], {host: _run("wg", "genkey").strip() for host in (SERVER, CLIENT)}
    public = {host: _run("wg", "pubkey", given=keys[host]).strip() for host in keys}
    for host, other, address in ((SERVER, CLIENT, TUNNEL), (CLIENT, SERVER, "10.1.1.2")):
        # Names its control socket, in a directory that all hosts of this machine share.
        device = f"wg-{os.getpid()}{host[0]}"
        ends.append(_quietly(pair, host, [program, "-f", device]))
        config = f"[Interface]\nListenPort = 51820\nPrivateKey = {keys[host]}\n[Peer]\n"
        config += f"PublicKey = {public[other]}\nAllowedIPs = 0.0.0.0/0\n"
        config += f"Endpoint = {netns.IPV4[other]}:51820\n"
        time.sleep(1)
        _run(*pair.command(host, ["wg", "setconf", device, "/dev/stdin"]), given=config)
        for command in (f"address add {address}/30 dev {device}", f"link set {device} up"):
            netns.ip("-n", pair.names[host], *command.split())
    return ends


def _run(*command: str, given: str | None = None) -> str:
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise TtunError(f"{command[0]} failed: {said[-1]}")
    return done.stdout
