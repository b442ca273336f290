"""``ttun server`` and ``ttun client``: run an endpoint until a signal or its end.

1. Find the key; make the endpoint from the options.
2. As root: open the device, the port and the status socket. From here on signals stop it in order.
3. Drop privileges; then start the threads, the log writer first.
4. Wait for a signal or the endpoint's end, and send keep-alives to the service manager.
5. Stop the status socket, the endpoint, then the hooks.
"""

from __future__ import annotations

import argparse
import logging
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttun import privileges, tcp
from ttun.client import Client, dialer
from ttun.commands import key, notify, show, status
from ttun.commands.hooks import Hooks
from ttun.errors import UsageError
from ttun.process import log_writer
from ttun.process.signals import ENDING, Signals
from ttun.server import Server
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
        privileges.check()  # before a key is made in vain
        psk = key.create()
        log.info("wrote a new key to %s", key.DEFAULT_FILE)
    listen: str | Listener = options.listen
    where = None if options.tox else _our_address(options.listen)
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
            f"no key (give the server's key with -k or --psk-file, in {key.VARIABLE}, "
            f"or in {key.DEFAULT_FILE}, mode 0600)"
        )
    nodes = Path(options.tox_nodes) if options.tox_nodes else None
    server = dialer(options.server, options.mptcp, options.congestion_control, nodes)
    limits = Limits(seconds=options.rekey)
    end = Client(psk, server=server, limits=limits, **_tunnel_options(options, CLIENT))
    return _run(end, psk, options)


def _tunnel_options(options: argparse.Namespace, usual: Addresses) -> dict[str, Any]:
    """Return the options of both ends as keywords of Server and Client."""
    names = ("cipher", "mtu", "mptcp", "offload", "wire", "buffers", "congestion_control")
    given = (options.local4, options.local6, options.peer4, options.peer6)
    return {
        **{name: getattr(options, name) for name in names},
        "device": options.dev,
        "addresses": Addresses.parse(usual, *given),
        "routes": [parse_network(text) for text in options.route],
    }


def _show_client_command(psk: bytes, where: str) -> None:
    """Print the client's command line with the key, if stdout is a terminal and not a log."""
    if not sys.stdout.isatty():
        return
    program = (
        "./ttun.py" if Path(sys.argv[0]).name == "ttun.py" else "ttun"
    )  # as this one was started
    print(f"\non the client:\n\n    sudo {program} client -k {psk.decode()} -s {where}\n")


def _our_address(listen: str) -> str:
    """Return the address that a client can use, as far as this machine knows it."""
    address = tcp.parse_address(listen, listening=True)
    if address.host not in ("", "0.0.0.0", "::"):
        return str(address)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing, only selects the local address
            host = str(probe.getsockname()[0])
        except OSError:
            host = "THIS-HOST"
    return str(address._replace(host=host))


def _run(endpoint: Endpoint, psk: bytes, options: argparse.Namespace) -> int:
    """Run an endpoint until SIGTERM, SIGINT, SIGHUP or its own end."""
    privileges.forbid_dumps()
    manager = notify.Manager()
    user = privileges.find_user(options.user)
    group = privileges.find_group(options.monitor_group)
    hooks = Hooks(options.up, options.down)
    endpoint.on_connected = lambda _: hooks.up(endpoint.facts())
    endpoint.on_disconnected = lambda _, why: hooks.down({**endpoint.facts(), "reason": why})
    key.warn_if_short(psk)
    endpoint.open()
    signals = Signals(*ENDING, signal.SIGUSR1)  # from here on there is something to clean up
    device = str(endpoint.status().device)
    socket_of_status = status.StatusSocket(device, user, group)
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
    """Return a signal's number, or 0 when the endpoint has ended; send keep-alives until then."""
    while (received := signals.wait(answering.patience(manager.interval))) is None:
        answering.serve(endpoint.status)  # if no thread could be started before
        if endpoint.is_alive():
            manager.tell(manager.ALIVE)
    return received
