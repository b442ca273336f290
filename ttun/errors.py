"""Error classes (local and the peer's), temporary resource shortages, error texts."""

from __future__ import annotations

import errno
import socket

# Descriptors, memory, processes: a temporary shortage.
_LACKING = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN})
# What a temporary shortage raises; RuntimeError: no thread.
LACKS = (OSError, MemoryError, RuntimeError)


class TtunError(Exception):
    """A failure. One line: what is wrong and what to do. Exit code 1."""


class UsageError(TtunError):
    """An invalid option value. One line. Exit code 2."""


class ProtocolError(Exception):
    """The peer violated the protocol, which ends its session. One line for the log."""


class UnrecognizedError(ProtocolError):
    """A peer did not authenticate to a server that must not reveal itself."""


def is_lack(error: BaseException) -> bool:
    """Return whether the error is a temporary shortage on this machine: descriptors, memory or
    threads.
    """
    return error.errno in _LACKING if isinstance(error, OSError) else True


def reason(error: BaseException) -> str:
    """Return the text of an error, without errno and file name."""
    if isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN:
        return "temporary failure in name resolution"  # as in glibc; musl: "Try again"
    if isinstance(error, RuntimeError) and "new thread" not in str(error):
        return f"internal error: {error}"  # a bug must not look like a shortage
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def printable(text: str) -> str:
    """Return text as one line that is safe to print on a terminal.

    Escape control characters, line ends, bidirectional controls, and invalid UTF-8 bytes, which
    os.fsdecode() represents as surrogates.
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else _escape(each) for each in text)


def _escape(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # an undecodable byte (PEP 383)
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")
