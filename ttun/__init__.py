"""A point-to-point tunnel over one TCP connection: a TUN device on each side, AEAD frames.

``Server`` and ``Client`` are the whole interface; the command line is built on them::

    import ttun

    server = ttun.Server(b"secret", listen=":20203")
    server.start()
    server.wait()
"""

from typing import TYPE_CHECKING, Any

from ttun.errors import TtunError, UsageError
from ttun.version import __version__

if TYPE_CHECKING:
    from ttun.client import Client
    from ttun.endpoint import Status
    from ttun.server import Server

__all__ = ["Client", "Server", "Status", "TtunError", "UsageError", "__version__"]


def __getattr__(name: str) -> Any:
    """Import what needs the extension when it is asked for: ``ttun -h`` works without it."""
    homes = {"Server": "server", "Client": "client", "Status": "endpoint"}
    if name not in homes:
        raise AttributeError(f"module 'ttun' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"ttun.{homes[name]}"), name)
