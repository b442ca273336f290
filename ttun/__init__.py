"""A point-to-point tunnel over one TCP connection: a TUN device on each side, AEAD frames.

``Server`` and ``Client`` are the whole interface; the command line is built on them::

    import ttun

    with ttun.Server(b"secret", listen=":20203") as server:
        server.wait()

The rest is what they take and give: Settings say what the options mean, Addresses, Network and
Limits are values of some, Status is what an end tells of itself. GivenSocket and GivenSockets put a
tunnel into stream sockets of the program's own. docs/library.md has whole programs. Lines for a log
go to the logger "ttun", which writes nothing unless the program says where.
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
    """Import what needs the extension when it is asked for: ``ttun -h`` works without it."""
    if name not in __all__:
        raise AttributeError(f"module 'ttun' has no attribute {name!r}")
    from ttun import client, record, server, settings, transport

    rooms = (client, server, record, settings, transport)
    return next(getattr(room, name) for room in rooms if hasattr(room, name))


def __dir__() -> list[str]:
    """Return the names of the interface."""
    return __all__
