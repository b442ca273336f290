"""``ttun server`` and ``ttun client``: run an endpoint until a signal or its end.

1. Find the key; make the endpoint from the options.
2. As root: open the device, the port and the status socket. From here on signals stop it in order.
3. Start the keeper if something needs it: for the default route before its rules are made. Drop
   privileges; then start the threads, the log's first.
4. Wait for a signal or the endpoint's end, and send keep-alives to the service manager.
5. Stop the status socket, the endpoint, the hooks, then the keeper.
"""

from __future__ import annotations

import argparse
import functools
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttun import congestion, privileges, proxy, tcp
from ttun.client import Client, dialer, is_tox
from ttun.commands import key, notify, show, status, stdio, via
from ttun.commands.hooks import Hooks
from ttun.errors import TtunError, UsageError
from ttun.network import default_route, name_servers
from ttun.process import log_writer
from ttun.process.keeper import Keeper
from ttun.process.signals import ENDING, ENDING_LATER, Signals
from ttun.server import DEFAULT_LISTEN, Server
from ttun.settings import CLIENT, DEFAULT, MAX_KEY_LIFE, SERVER, Addresses, Limits, parse_network

if TYPE_CHECKING:
    from ttun.endpoint import Endpoint
    from ttun.transport import Dialer, Listener

log = logging.getLogger("ttun")


def server(options: argparse.Namespace) -> int:
    """``ttun server``."""
    if DEFAULT in options.route:
        raise UsageError(f"--route {DEFAULT} is for the client")
    if options.stdio:
        _refuse(options, "with --stdio", "tox", "takeover", "mptcp")
    if options.tox:
        _refuse(options, "with --tox", "listen", "mptcp", "congestion_control")
    else:
        _refuse(options, "without --tox", "tox_dir", "tox_nodes")
    keys = key.find_all(options.psk, options.psk_file)
    if options.stdio and not keys:
        raise _no_key()
    addresses: Sequence[str] = options.listen or [DEFAULT_LISTEN]
    listen: Sequence[str] | Listener = addresses
    where = ""
    if options.stdio:
        listen = stdio.Listener()
    elif options.tox:
        from ttun.tox import transport

        nodes = Path(options.tox_nodes) if options.tox_nodes else None
        listen = transport.Listener(Path(options.tox_dir), nodes)
        where = listen.name
        log.info("on the client: ttun client -s %s", where)
    made = not keys
    end = Server(
        keys or key.generate().encode(),
        listen=listen,
        takeover=options.takeover,
        **_tunnel_options(options, SERVER),
    )
    if len(keys) > 1:
        end.key_names = options.psk_file

    def make_key() -> None:
        keys.append(key.create())
        log.info("wrote a new key to %s", key.DEFAULT_FILE)
        end.use_keys(keys)
        places = [where] if where else [_our_address(each, end.port) for each in addresses]
        _show_client_command(keys[0], " -s ".join(dict.fromkeys(places)))

    if isinstance(listen, stdio.Listener):
        listen.over = end.stop
    return _run(end, keys, options, Keeper(), make_key if made else None)


def client(options: argparse.Namespace) -> int:
    """``ttun client``."""
    psk = key.find(options.psk, options.psk_file[-1] if options.psk_file else None)
    if psk is None:
        raise _no_key()
    if len(options.psk_file) > 1:
        log.warning("a client has one key: only the last --psk-file is used")
    keeper = Keeper()
    nodes = Path(options.tox_nodes) if options.tox_nodes else None
    servers: list[Dialer] = []
    given = options.server or []
    tox = options.via is None and [*map(is_tox, given)]
    if not tox or not any(tox):
        _refuse(options, "without -s tox:ID", "tox_nodes")
    elif all(tox):
        _refuse(options, "with -s tox:ID", "mptcp", "congestion_control")
    if options.wire == "v1":
        _refuse(options, "with --wire v1", "rekey")
    if options.via is not None:
        _refuse(options, "with --via", "proxy", "bind", "mptcp", "congestion_control")
        if len(given) > 1 or any(map(is_tox, given)):
            raise UsageError("--via takes one -s, which is no tox:ID")
        server = given[0] if given else None
        servers.append(via.Dialer(server, options.via, options.user, keeper))
    elif given:
        through = os.environ.get(proxy.VARIABLE) or None if options.proxy is None else options.proxy
        for each in dict.fromkeys(given):
            args = each, options.mptcp, options.congestion_control, nodes
            servers.append(dialer(*args, through=through, bind=options.bind))
    else:
        raise UsageError("the following arguments are required: -s/--server")
    limits = Limits(seconds=options.rekey)
    user = privileges.find_user(options.user)
    whole = DEFAULT in options.route
    users = [user.uid if user else os.geteuid()]
    outside = "packets of all programs of user %s stay outside the tunnel (%s)"
    if whole and user is not None and user.name in ("nobody", "root"):
        log.warning(outside, user.name, "a user of ttun's own: useradd --system ttun")
    caller = keeper.via.user if keeper.via else None
    if caller is not None and caller != user:
        users.append(caller.uid)
        if whole:
            why = "--via runs as who called sudo: start ttun as root without sudo"
            log.warning(outside, caller.name, why)
    if whole and keeper.via is not None and (local := name_servers.local()):
        log.warning(
            "--via cannot look names up while there is no session: the name server %s sends its "
            "queries through the tunnel (use addresses)",
            local,
        )
    end = Client(
        psk,
        server=servers,
        limits=limits,
        default_route=whole,
        users=users,
        **_tunnel_options(options, CLIENT),
    )
    return _run(end, [psk], options, keeper)


def _refuse(options: argparse.Namespace, why: str, *names: str) -> None:
    """Raise UsageError for an option that has no effect. why: "with --other", for the message."""
    usual = (None, False, congestion.AUTO, str(key.DEFAULT_FILE.parent), MAX_KEY_LIFE)
    for name in names:
        if getattr(options, name) not in usual:
            raise UsageError(f"--{name.replace('_', '-')} has no effect {why} (leave it out)")


def _no_key() -> UsageError:
    return UsageError(
        f"no key (give the server's key with -k or --psk-file, in {key.VARIABLE}, "
        f"or in {key.DEFAULT_FILE}, mode 0600)"
    )


def _tunnel_options(options: argparse.Namespace, usual: Addresses) -> dict[str, Any]:
    """Return the options of both ends as keywords of Server and Client."""
    names = ("cipher", "mtu", "mptcp", "offload", "wire", "buffers", "congestion_control")
    given = (options.local4, options.local6, options.peer4, options.peer6)
    addresses = Addresses.parse(usual, *given)
    role, others = ("client", CLIENT) if usual is SERVER else ("server", SERVER)
    for mine, theirs, peer in (
        (addresses.ipv4, others.ipv4, addresses.peer4),
        (addresses.ipv6, others.ipv6, addresses.peer6),
    ):
        if peer is None and mine.ip == theirs.ip:
            log.warning(
                "%s is the default address of the %s (each end needs its own: --local%d)",
                mine.ip, role, mine.version,
            )  # fmt: skip
    return {
        **{name: getattr(options, name) for name in names},
        "device": options.dev,
        "addresses": addresses,
        "routes": [parse_network(text) for text in options.route if text != DEFAULT],
    }


def _show_client_command(psk: bytes, where: str) -> None:
    """Print the client's command line with the key, if stdout is a terminal and not a log."""
    if not sys.stdout.isatty():
        return
    # As this one was started.
    program = "./ttun.py" if Path(sys.argv[0]).name == "ttun.py" else "ttun"
    print(f"\non the client:\n\n    sudo {program} client -k {psk.decode()} -s {where}\n")


def _our_address(listen: str, port: int) -> str:
    """Return the address that a client can use, as far as this machine knows it.

    port: the one that the kernel chose, if listen has 0.
    """
    address = tcp.parse_address(listen, listening=True)
    address = address._replace(port=address.port or port)
    if address.host not in ("", "0.0.0.0", "::"):
        return str(address)
    there, family = "192.0.2.1", socket.AF_INET
    if address.host == "::":  # which takes IPv6 alone
        there, family = "2001:db8::1", socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((there, 9))  # sends nothing, only selects the local address
            host = str(probe.getsockname()[0])
        except OSError:
            host = "THIS-HOST"
    return str(address._replace(host=host))


def _hooks(options: argparse.Namespace, keeper: Keeper) -> Hooks | Keeper:
    """Return what runs --up and --down: the keeper for --hook-user, else this process."""
    if not (options.up or options.down):
        _refuse(options, "without --up or --down", "hook_user")
    if options.hook_user is None:
        return Hooks(options.up, options.down)
    user = privileges.find_user(options.hook_user)
    assert user is not None
    if not privileges.can_be(user):
        raise TtunError(
            f"cannot run --up and --down as {user.name}: no privileges for that here (start ttun "
            "as root; under systemd see docs/hooks.md)"
        )
    keeper.hooks = functools.partial(Hooks, options.up, options.down, user)
    return keeper


def _run(
    endpoint: Endpoint,
    keys: list[bytes],
    options: argparse.Namespace,
    keeper: Keeper,
    when_open: Callable[[], None] | None = None,
) -> int:
    """Run an endpoint until SIGTERM, SIGINT, SIGHUP or its own end.

    when_open: called once it is open, still with privileges.
    """
    privileges.forbid_dumps()
    manager = notify.Manager()
    user = privileges.find_user(options.user)
    group = privileges.find_group(options.monitor_group)
    hooks = _hooks(options, keeper)
    whole = DEFAULT in options.route

    def connected(_: str) -> None:
        if keeper.via is not None:
            keeper.background()
        hooks.up(endpoint.facts())

    def keep(device: str) -> status.StatusSocket:
        """Make the status socket, and start what tidies up after kill -9."""
        made = status.StatusSocket(device, user, group)
        keeper.start(endpoint.facts(), made.entry())
        return made

    kept: list[status.StatusSocket] = []

    def opened(device: str) -> None:
        keeper.hold(device)
        if whole:  # what comes next stays, unless something removes it
            signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # until Signals() none ends it
            index, users = endpoint.hold_device()
            keeper.at_end.append(functools.partial(default_route.remove, index))
            keeper.rules = functools.partial(default_route.RuleKeeper, users)
            endpoint.rules_are_kept = True
            kept.append(keep(device))

    endpoint.on_device = opened
    endpoint.on_connected = connected
    endpoint.on_disconnected = lambda _, why: hooks.down({**endpoint.facts(), "reason": why})
    for each in keys:
        key.warn_if_short(each)
    endpoint.open()
    if when_open is not None:
        try:
            when_open()
        except BaseException:
            endpoint.stop()
            raise
    # From here on there is something to clean up.
    signals = Signals(*ENDING, *ENDING_LATER, signal.SIGUSR1)
    try:
        socket_of_status = kept.pop() if kept else keep(str(endpoint.status().device))
    except TtunError:
        endpoint.stop()
        raise
    # Before there are threads. As another user its own connection would go into the tunnel.
    privileges.drop(user, required=whole or options.user is not None)
    log_writer.start()
    if isinstance(hooks, Hooks):
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
    keeper.close()
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
