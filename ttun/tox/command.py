"""``ttun tox``: run a server or a client until a signal stops it."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import resource
import select
import signal
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Callable

from ttun import privileges, tcp
from ttun.address import Address
from ttun.errors import TtunError
from ttun.process import log_writer, syslog
from ttun.process.signals import ENDING, Signals
from ttun.tox import daemon, identity, nodes, options, packet, rules, toxcore
from ttun.tox.client import ForwardingClient
from ttun.tox.forwarder import Forwarder
from ttun.tox.instance import Tox, open_tox
from ttun.tox.loop import Loop
from ttun.tox.options import Forward, Options
from ttun.tox.server import ForwardingServer
from ttun.version import __version__

log = logging.getLogger("ttun")

PING_TIMEOUT = 120.0  # seconds
DESCRIPTORS = 8192


def run(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> int:
    """Run a command line; return the exit code. Raises TtunError."""
    asked = options.read(parser, arguments, os.environ)
    privileges.forbid_dumps()
    contact, keys = None, None
    if asked.client:
        contact = identity.find_contact(asked.ids[0])
    elif asked.ids:
        keys = {identity.parse_key(text) for text in asked.ids}
    _allow_descriptors()
    _set_log_level(asked)
    toxcore.load()  # before going to the background, where an error would be invisible
    listeners = _listen(asked.forwards)
    known = nodes.load(asked.nodes, proxied=asked.proxy is not None)
    targets = rules.load(asked.rules) if asked.rules and not asked.client else None
    pid_file = daemon.open_pid_file(asked.pid_file) if asked.pid_file else None
    if asked.user is not None:
        privileges.drop(privileges.find_user(asked.user), required=True)
    tox = _open(asked)
    _settle(asked, pid_file)
    log_writer.start()
    loop = Loop(tox)
    forwarder: Forwarder
    if contact is not None:
        forwarder = ForwardingClient(loop, contact.address, asked.secret or contact.secret)
        for listener, target in listeners:
            forwarder.listen(listener, target)
    else:
        forwarder = ForwardingServer(loop, secret=asked.secret, keys=keys, rules=targets)
    forwarder.nodes = known
    end = _End(loop)
    if isinstance(forwarder, ForwardingClient) and asked.ping:
        _ping(forwarder, end)
    elif isinstance(forwarder, ForwardingClient) and asked.pipe:
        _pipe(forwarder, asked.pipe, end)
    loop.start(forwarder)
    return end.wait(forwarder.log_status)


def _open(asked: Options) -> Tox:
    """Open a Tox instance with the saved identity and log its ID."""
    keep = not asked.client or asked.keep_identity
    if asked.keep_identity:
        _make_directory(asked.directory)
    tox = open_tox(
        asked.directory if keep else None, asked.relay_port, asked.udp_ports, asked.proxy,
        server=not asked.client, verbose=asked.debug > 1,
    )  # fmt: skip
    log.info("ttun %s tox, toxcore %s", __version__, toxcore.version())
    text = tox.address().hex().upper()
    log.log(logging.DEBUG if asked.client else logging.INFO, "Using Tox ID: %s", text)
    if not asked.client and asked.secret is None and not asked.ids:
        log.warning("no shared secret: anyone with this Tox ID can use this server (set one: -s)")
    if asked.id_file is not None:
        try:
            asked.id_file.write_text(text + "\n", encoding="ascii")
        except OSError as error:
            raise TtunError(
                f"cannot write the Tox ID to {asked.id_file}: {error.strerror}"
            ) from None
    return tox


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        log.warning("cannot create %s: %s", directory, error.strerror)


def _allow_descriptors() -> None:
    """Raise the soft limit on descriptors, usually 1024: each connection uses one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _set_log_level(asked: Options) -> None:
    if asked.quiet:
        log.setLevel(logging.ERROR)
    elif asked.debug:
        log.setLevel(logging.DEBUG)
    elif asked.pipe:
        log.setLevel(logging.WARNING)


def _listen(forwards: Sequence[Forward]) -> list[tuple[socket.socket, tuple[str, int] | None]]:
    """Open all listening ports, before privileges are dropped."""
    listeners = []
    for forward in forwards:
        hosts = ["127.0.0.1", "::1"] if forward.bind is None else [forward.bind]
        for host in hosts:
            address = Address(host, forward.port)
            try:
                listener = tcp.listen(address, False)
            except TtunError:
                if host == "::1" and forward.bind is None:
                    continue  # no IPv6 on this host, and none requested
                raise
            listeners.append((listener, forward.target))
            shown = tcp.show(listener.getsockname())
            what = f"{forward.target[0]}:{forward.target[1]}" if forward.target else "SOCKS5"
            log.info("listening on %s for %s", shown, what)
            if not forward.port:
                break  # the kernel would choose a different port for the other address
    return listeners


def _settle(asked: Options, pid_file: int | None) -> None:
    """Go to the background and log to syslog, as requested.

    A fork does not keep threads, so none may have been started yet.
    """
    if asked.syslog and not (asked.daemonize and not os.path.exists(syslog.SYSLOG)):
        syslog.log_to_syslog()
    if asked.daemonize:
        daemon.to_background()
    if pid_file is not None:
        daemon.write_pid(pid_file)


class _End:
    """Waits for a signal, the end of the loop, or a call of is_over()."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._code = 0
        self._stopping = False
        self._signals = Signals(*ENDING, signal.SIGUSR1)

    def is_over(self, code: int, message: str | None = None) -> None:
        """End the program with this exit code, from any thread. Ignored once it is stopping."""
        if self._stopping or self._loop.error is not None:
            return
        self._code = code
        if message is not None:
            log.error("%s", message)
        self._signals.wake()

    def wait(self, on_question: Callable[[], None]) -> int:
        """Wait and return the exit code. SIGUSR1 calls on_question on the loop's thread."""

        def watch() -> None:
            self._loop.over.wait()
            self._signals.wake()

        threading.Thread(target=watch, name="ttun-over", daemon=True).start()
        while (received := self._signals.wait()) == signal.SIGUSR1:
            self._loop.call(on_question)
        self._stopping = True
        if received:
            log.info("%s: stopping", signal.Signals(received).name)
        self._loop.stop()
        if self._loop.error is not None:
            raise self._loop.error
        return self._code


def _ping(client: ForwardingClient, end: _End) -> None:
    """Ping the server once it is online, print the round trip and end."""
    timeout = threading.Timer(PING_TIMEOUT, end.is_over, (1, "no answer from the server"))
    timeout.daemon = True
    timeout.start()

    def answered(seconds: float) -> None:
        print(f"pong in {seconds * 1000:.1f} ms", flush=True)
        end.is_over(0)

    client.on_answer_to_ping = answered
    client.on_online = client.ping


def _pipe(client: ForwardingClient, target: Address, end: _End) -> None:
    """Connect stdin and stdout to a target until the target closes the connection."""
    ours, theirs = socket.socketpair()
    name = f"{target.host}:{target.port}"
    reset = threading.Event()

    def answer(reason: int | None) -> None:
        if reason is not None:
            end.is_over(1, f"{name}: {packet.describe(reason)}")
            return
        threading.Thread(target=send_stdin, daemon=True).start()
        threading.Thread(target=write_stdout, daemon=True).start()

    def send_stdin() -> None:
        while True:
            try:
                data = _read_stdin()
            except OSError as error:  # the target must not mistake this for end of file
                end.is_over(1, f"cannot read the input: {error.strerror}")
                return
            try:
                if not data:
                    ours.shutdown(socket.SHUT_WR)
                    return
                ours.sendall(data)
            except OSError as error:
                log.debug("stdin: %s", error)
                return

    def receive() -> bytes:
        with contextlib.suppress(ConnectionResetError):  # closed with input left unread
            return ours.recv(65536)
        return b""

    def write_stdout() -> None:
        try:
            while data := receive():
                while data:
                    try:
                        data = data[os.write(1, data) :]
                    except BlockingIOError:  # another process made stdout non-blocking
                        select.select([], [1], [])
        except OSError as error:
            end.is_over(1, f"cannot write the output: {error.strerror}")
            return
        if reset.is_set():
            end.is_over(1, f"{name}: the connection was reset")
        else:
            end.is_over(0)

    client.open(theirs, target.host, target.port, answer, reset.set)


def _read_stdin() -> bytes:
    """Return the next bytes, or none at end of file. Raises OSError."""
    while True:
        select.select([0], [], [])
        with contextlib.suppress(BlockingIOError):  # another reader of the same stdin was faster
            return os.read(0, 65536)
