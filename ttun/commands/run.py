"""``ttun server`` and ``ttun client``: an endpoint, and what a program around it does.

1. Find the key; make the endpoint of what the command line says.
2. As root: open the device, the port and the status socket; from here on signals end it in order.
3. Drop privileges; then start threads, the log's writer first.
4. Wait for a signal or the endpoint's end, and tell the service manager that all is well.
5. Stop: the status socket, the endpoint, then the hooks.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttun import privileges, proxy, tcp
from ttun.client import Client, dialer
from ttun.commands import key, notify, show, status
from ttun.commands.hooks import Hooks
from ttun.errors import UsageError
from ttun.process import log_writer
from ttun.process.signals import ENDING, Signals
from ttun.server import DEFAULT_LISTEN, Server
from ttun.settings import CLIENT, SERVER, Addresses, Limits, parse_network

if TYPE_CHECKING:
    from ttun.endpoint import Endpoint
    from ttun.transport import Listener

log = logging.getLogger("ttun")


def server(options: argparse.Namespace) -> int:
    """``ttun server``."""
    psk = key.find(options.psk, options.psk_file)
    made = psk is None
    if psk is None:
        privileges.check()  # before a key is made that nobody can use
        psk = key.create()
        log.info("made a new key and kept it in %s", key.DEFAULT_FILE)
    addresses: Sequence[str] = options.listen or [DEFAULT_LISTEN]
    listen: Sequence[str] | Listener = addresses
    where = None if options.tox else " -s ".join(map(_our_address, addresses))
    if options.tox:
        from ttun.tox import transport

        nodes = Path(options.tox_nodes) if options.tox_nodes else None
        listen = transport.Listener(Path(options.tox_dir), nodes)
        where = listen.name
        log.info("on the client: ttun client -s %s", where)
    if made:
        _show_client_command(psk, str(where))
    end = Server(psk, listen=listen, takeover=options.takeover, **_tunnel_options(options, SERVER))
    return _run(end, psk, options)


def client(options: argparse.Namespace) -> int:
    """``ttun client``."""
    psk = key.find(options.psk, options.psk_file)
    if psk is None:
        raise UsageError(
            f"no key: put the server's with -k or --psk-file, in {key.VARIABLE}, "
            f"or into {key.DEFAULT_FILE} (chmod 600)"
        )
    nodes = Path(options.tox_nodes) if options.tox_nodes else None
    through = os.environ.get(proxy.VARIABLE) or None if options.proxy is None else options.proxy
    servers = [
        dialer(
            each,
            options.mptcp,
            options.congestion_control,
            nodes,
            through=through,
            bind=options.bind,
        )
        for each in dict.fromkeys(options.server)
    ]
    limits = Limits(seconds=options.rekey)
    end = Client(psk, server=servers, limits=limits, **_tunnel_options(options, CLIENT))
    return _run(end, psk, options)


def _tunnel_options(options: argparse.Namespace, usual: Addresses) -> dict[str, Any]:
    """Return what both ends can be told, as Server and Client take it."""
    names = ("cipher", "mtu", "mptcp", "offload", "wire", "buffers", "congestion_control")
    given = (options.local4, options.local6, options.peer4, options.peer6)
    return {
        **{name: getattr(options, name) for name in names},
        "device": options.dev,
        "addresses": Addresses.parse(usual, *given),
        "routes": [parse_network(text) for text in options.route],
    }


def _show_client_command(psk: bytes, where: str) -> None:
    """Print the other end's command line, but only where a person sees it and no log keeps it."""
    if not sys.stdout.isatty():
        return
    program = "./ttun.py" if Path(sys.argv[0]).name == "ttun.py" else "ttun"  # as started here
    print(f"\non the client:\n\n    sudo {program} client -k {psk.decode()} -s {where}\n")


def _our_address(listen: str) -> str:
    """Return where a client reaches us, as far as that is to be known here."""
    address = tcp.parse_address(listen, listening=True)
    if address.host not in ("", "0.0.0.0", "::"):
        return str(address)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: only asks which address would be used
            host = str(probe.getsockname()[0])
        except OSError:
            host = "THIS-HOST"
    return str(address._replace(host=host))


def _run(endpoint: Endpoint, psk: bytes, options: argparse.Namespace) -> int:
    """Run an endpoint until SIGTERM, SIGINT, SIGHUP or its own end."""
    privileges.forbid_dumps()
    manager = notify.Manager()
    user = privileges.find_user(options.user)
    hooks = Hooks(options.up, options.down)
    endpoint.on_connected = lambda _: hooks.up(endpoint.facts())
    endpoint.on_disconnected = lambda _, why: hooks.down({**endpoint.facts(), "reason": why})
    key.warn_if_short(psk)
    endpoint.open()
    signals = Signals(*ENDING, signal.SIGUSR1)  # from here on something is left to tidy up
    socket_of_status = status.StatusSocket(str(endpoint.status().device), user)
    privileges.drop(user, required=options.user is not None)  # before there are threads
    log_writer.start()
    hooks.start()
    endpoint.start()
    socket_of_status.serve(endpoint.status)
    endpoint.when_over(signals.wake)
    manager.tell(manager.READY)
    while (received := _wait(signals, endpoint, manager, socket_of_status)) == signal.SIGUSR1:
        lines = show.describe(status.as_dict(endpoint.status()))
        log.info("status: %s", "; ".join(line.strip() for line in lines))
    manager.tell(manager.STOPPING)
    socket_of_status.close()
    if received:
        log.info("%s: stopping", signal.Signals(received).name)
    endpoint.stop()
    hooks.close()
    endpoint.wait()
    return 0


def _wait(
    signals: Signals, endpoint: Endpoint, manager: notify.Manager, answering: status.StatusSocket
) -> int:
    """Return the number of a signal, or 0 when the endpoint is over; until then, signs of life."""
    while (received := signals.wait(answering.patience(manager.interval))) is None:
        answering.serve(endpoint.status)  # if there was no thread for it yet
        if endpoint.is_alive():
            manager.tell(manager.ALIVE)
    return received
