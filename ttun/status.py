"""What an endpoint is doing, for whoever asks on this machine: a Unix socket that answers once.

 1. The endpoint opens it before it gives its privileges up. Only its owner and root may connect.
 2. A thread answers each connection with one line of JSON and closes it.
 3. ``ttun show`` asks all sockets that there are (show.py).

A program that has given up its privileges, or was killed, leaves its socket behind. It answers
nobody, and the next one removes it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import os
import socket
import threading
from pathlib import Path
from typing import Any, Callable

from ttun.endpoint import Status

log = logging.getLogger("ttun")

ANSWER_TIMEOUT = 1.0  # seconds
ANSWER_MAX = 65536  # bytes


def directories() -> list[Path]:
    """Return where sockets are: root's place, and that of the user who asks."""
    own = os.environ.get("XDG_RUNTIME_DIR")
    return [Path("/run/ttun"), *([Path(own, "ttun")] if own else [])]


class StatusSocket:
    """Answers for one endpoint. Where it cannot be opened the endpoint goes on without."""

    def __init__(self, name: str) -> None:
        """Listen in the first of the directories that we may write to. name: the device's."""
        self._listener: socket.socket | None = None
        self._thread: threading.Thread | None = None
        for directory in directories():
            try:
                # Devices of different network namespaces may have the same name.
                self._path = directory / f"{name}.{os.getpid()}.sock"
                self._listener = _listen(self._path)
                return
            except OSError as error:
                why = error.strerror
        log.info("no status for ttun show: cannot listen on %s: %s", self._path, why)

    def serve(self, status: Callable[[], Status]) -> None:
        """Answer from now on, on a thread."""
        if self._listener is not None:
            self._thread = threading.Thread(
                target=self._serve, args=(status,), name="ttun-status", daemon=True
            )
            self._thread.start()

    def close(self) -> None:
        """Stop answering; remove the socket if we still may."""
        if self._listener is None:
            return
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        if self._thread is not None:
            self._thread.join()
        self._listener.close()
        with contextlib.suppress(OSError):
            self._path.unlink()

    def _serve(self, status: Callable[[], Status]) -> None:
        assert self._listener is not None
        while True:
            try:
                asking, _ = self._listener.accept()
            except ConnectionError:
                continue
            except OSError:  # closed
                return
            with asking, contextlib.suppress(OSError):
                asking.settimeout(ANSWER_TIMEOUT)
                asking.sendall(json.dumps(as_dict(status())).encode() + b"\n")


def as_dict(status: Status) -> dict[str, Any]:
    """Return a status as it is sent: plain types, counters by name."""
    counters = {name: getattr(status, name)._asdict() for name in ("counters", "totals")}
    return {**dataclasses.asdict(status), **counters}


def _listen(path: Path) -> socket.socket:
    path.parent.mkdir(mode=0o755, exist_ok=True)
    for other in path.parent.glob("*.sock"):
        with contextlib.suppress(OSError):
            if not _is_alive(other):
                other.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
        listener.listen(8)
    except BaseException:
        listener.close()
        raise
    finally:
        os.umask(before)
    return listener


def _is_alive(path: Path) -> bool:
    """Return whether somebody listens on a socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        return sock.connect_ex(str(path)) != errno.ECONNREFUSED


def ask(path: Path) -> dict[str, Any] | None:
    """Return what an endpoint answers, None if there is none any more. Raises PermissionError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(ANSWER_TIMEOUT)
        answer = b""
        try:
            sock.connect(str(path))
            while len(answer) < ANSWER_MAX and (part := sock.recv(ANSWER_MAX)):
                answer += part
        except PermissionError:
            raise
        except OSError:
            return None
    try:
        status: dict[str, Any] = json.loads(answer)
    except ValueError:
        return None
    return status
