"""Where a client's connections start: at an address of this machine, or on one of its devices.

Sources: socket(7) for SO_BINDTODEVICE, which takes CAP_NET_RAW before Linux 5.7.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket

from ttun.errors import UsageError, reason
from ttun.network import resolver

WHY = {
    errno.EADDRNOTAVAIL: "not an address of this machine",
    errno.ENODEV: "no such device",
    errno.EPERM: "Linux before 5.7 takes CAP_NET_RAW for that, which ttun drops (name an address)",
}


class Binding:
    """An address or a device to bind sockets to. family: the only one that is left; None: both."""

    def __init__(self, text: str) -> None:
        """Read ADDRESS or %DEVICE. Raises UsageError."""
        self._text = text
        self.device = os.fsencode(text[1:]) if text.startswith("%") else None
        self.family: int | None = None
        if self.device is None:
            self._host = text[1:-1] if text.startswith("[") and text.endswith("]") else text
            try:
                address = ipaddress.ip_address(self._host)
            except ValueError:
                raise UsageError(
                    f"--bind {text!r}: use an address of this machine, or %DEVICE as in %eth1"
                ) from None
            self.family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        elif not 0 < len(self.device) < 16 or b"\0" in self.device:
            raise UsageError(f"--bind {text!r}: a device's name has 1 to 15 bytes, as in %eth1")

    def __str__(self) -> str:
        return f"--bind {self._text}"

    def apply(self, sock: socket.socket) -> None:
        """Bind a socket. Raises OSError with a line that names the option."""
        try:
            if self.device is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, self.device)
                return
            # Anew each time: the number of a zone's device changes with the device.
            found = resolver.numeric(self._host, 0)
            if not found:
                raise OSError(errno.ENODEV, "")
            sock.bind(found[0].sockaddr)
        except OSError as error:
            why = WHY.get(error.errno or 0) or reason(error)
            raise OSError(error.errno, f"{self}: {why}") from None
