"""A point-to-point tunnel over one TCP connection: a TUN device on each side, AEAD frames.

``Server`` and ``Client`` are the main interface; the command line is built on them::

    import ttun

    with ttun.Server(b"secret", listen=":20203") as server:
        server.wait()

Settings documents their options; Addresses, Network and Limits are types of option values; Status
is the state of an endpoint. GivenSocket and GivenSockets run a tunnel over stream sockets that the
program provides. docs/library.md has complete examples. The logger "ttun" writes nothing until the
program adds a handler.
"""

import logging
from typing import TYPE_CHECKING, Any

from ttun.errors import TtunError, UsageError
from ttun.version import __version__

if TYPE_CHECKING:
    from ttun.client import Client
    from ttun.record import Status
    from ttun.server import Server
    from ttun.session import Counters
    from ttun.settings import Addresses, Limits, Network, Settings
    from ttun.transport import Arrival, Candidate, Dialer, GivenSocket, GivenSockets, Listener

__all__ = [
    "Addresses",
    "Arrival",
    "Candidate",
    "Client",
    "Counters",
    "Dialer",
    "GivenSocket",
    "GivenSockets",
    "Limits",
    "Listener",
    "Network",
    "Server",
    "Settings",
    "Status",
    "TtunError",
    "UsageError",
    "__version__",
]

logging.getLogger("ttun").addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    """Import modules that need the extension on first use, so that ``ttun -h`` works without."""
    if name not in __all__:
        raise AttributeError(f"module 'ttun' has no attribute {name!r}")
    from ttun import client, record, server, settings, transport

    modules = (client, server, record, settings, transport)
    return next(getattr(module, name) for module in modules if hasattr(module, name))


def __dir__() -> list[str]:
    """Return the public names."""
    return __all__
