"""``ttun server --stdio``: the one peer is on standard input and output.

1. /dev/null takes the place of both: what a library prints by mistake is not for the tunnel.
2. Where both are one stream socket (sshd, inetd), the session gets that. Else a thread for each
   direction copies between them and a socketpair.
3. The peer arrives with its first byte, as a client speaks first; on a serial line that may take
   days.
4. The end of stdin, of stdout's reader or of the session ends the other two, and the program.

Sources: splice(2), poll(2), pipe(7), unix(7).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import socket
import stat
import threading
from typing import Callable

from ttun import transport
from ttun.errors import TtunError, UsageError
from ttun.process import standard_streams

SIZE = 256 << 10  # bytes
F_SETPIPE_SZ = 1031  # linux/fcntl.h; in fcntl from Python 3.10 on
LAST = 1.0  # seconds that the reader of the output has at the end


class Carrier(socket.socket):
    """A stream socket that tells when it is closed."""

    def __init__(self, sock: socket.socket, closed: Callable[[], object]) -> None:
        """Take sock over. closed: called after close(), by whatever thread that is."""
        super().__init__(fileno=sock.detach())
        self._tell = closed

    def close(self) -> None:
        """Close it, and tell."""
        super().close()
        self._tell()


class Listener(transport.GivenSockets):
    """Has one peer, which arrives with its first byte. over: called when it is closed."""

    name = "stdin and stdout"
    single = True

    def __init__(self) -> None:
        """Take stdin and stdout. Raises UsageError where one of them is a terminal."""
        if os.isatty(0) or os.isatty(1):
            raise UsageError("--stdio: stdin and stdout have to lead to a peer, not to a terminal")
        super().__init__()
        self.over: Callable[[], object] = lambda: None
        self._relays: list[threading.Thread] = []
        self._input, self._output = (fcntl.fcntl(each, fcntl.F_DUPFD_CLOEXEC, 3) for each in (0, 1))
        for number in (0, 1):
            standard_streams.open_nowhere(number)
        try:
            self._sock = Carrier(self._join(), self._end)
        except OSError as error:
            raise TtunError(f"--stdio: {error.strerror}") from None

    def start(self) -> None:
        """Wait for the peer in the background. Raises TtunError."""
        arrival = threading.Thread(target=self._arrive, name="ttun-stdio", daemon=True)
        try:
            for thread in (arrival, *self._relays):
                thread.start()
        except RuntimeError as error:
            raise TtunError(f"--stdio: {error} (ulimit -u, ulimit -v)") from None

    def kind(self, sock: socket.socket) -> str:
        """Return "stdio"."""
        return "stdio"

    def close(self) -> None:
        """Close all; what the session wrote last reaches the output within LAST seconds."""
        self._sock.close()
        super().close()
        for thread in self._relays:
            if thread.is_alive():
                thread.join(LAST)

    def _arrive(self) -> None:
        _await(self._sock.fileno(), select.POLLIN)
        self.give(self._sock, "stdio")

    def _end(self) -> None:
        self.over()

    def _join(self) -> socket.socket:
        """Return the socket that both are, or one that stands for them. Raises OSError."""
        pair = self._input, self._output
        if stat.S_ISSOCK(os.fstat(self._input).st_mode) and os.path.sameopenfile(*pair):
            os.close(self._output)
            sock = socket.socket(fileno=self._input)
            if sock.type != socket.SOCK_STREAM:
                raise OSError(errno.ESOCKTNOSUPPORT, "stdin is not a stream socket")
            sock.getpeername()
            return sock
        ours, inner = socket.socketpair()
        for source, sink in ((self._input, inner.fileno()), (inner.fileno(), self._output)):
            arguments = (source, sink, inner)
            relay = threading.Thread(target=_carry, args=arguments, name="ttun-stdio", daemon=True)
            self._relays.append(relay)
        return ours


def _carry(source: int, sink: int, inner: socket.socket) -> None:
    """Copy to the end of either; then it is the end of both."""
    for each in (source, sink):
        with contextlib.suppress(OSError):
            fcntl.fcntl(each, F_SETPIPE_SZ, SIZE)
    with contextlib.suppress(OSError):
        move = getattr(os, "splice", _copy)  # from Python 3.10 on
        while _await(source, select.POLLIN, sink):
            try:
                if not move(source, sink, SIZE):
                    break
            except BlockingIOError:  # somebody else has set O_NONBLOCK
                _await(sink, select.POLLOUT)
            except OSError:
                if move is _copy:
                    raise
                move = _copy  # neither is a pipe
    with contextlib.suppress(OSError):
        inner.shutdown(socket.SHUT_WR if sink == inner.fileno() else socket.SHUT_RDWR)
    os.close(sink if source == inner.fileno() else source)


def _copy(source: int, sink: int, size: int) -> int:
    """Do what splice(2) does, and all of it. Raises OSError."""
    data = memoryview(os.read(source, size))
    sent = 0
    while sent < len(data):
        try:
            sent += os.write(sink, data[sent:])
        except BlockingIOError:
            _await(sink, select.POLLOUT)
    return sent


def _await(descriptor: int, events: int, sink: int = -1) -> bool:
    """Wait for events, or their end; return whether they came before the sink's end."""
    waiting = select.poll()
    waiting.register(descriptor, events)
    if sink >= 0:
        waiting.register(sink, 0)
    return sink not in dict(waiting.poll())
