"""The two kinds of error, ours and the peer's; what is lacking for a while; lines about one."""

from __future__ import annotations

import errno
import socket

# Descriptors, memory, processes: other programs give theirs back sooner or later.
_LACKING = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN})
# What a program can lack for a while: those, and threads (a RuntimeError).
LACKS = (OSError, MemoryError, RuntimeError)


class TtunError(Exception):
    """Something cannot work here. One line: what is wrong and what to do. Exit code 1."""


class UsageError(TtunError):
    """A value that was given makes no sense. One line. Exit code 2."""


class ProtocolError(Exception):
    """The peer did something that ends its session. One line for the log: what it did."""


class UnrecognizedError(ProtocolError):
    """A peer showed no sign of the key where nothing may show that a ttun is here."""


def is_lack(error: BaseException) -> bool:
    """Return whether it is this machine that lacks something for now, not the way or the peer.

    Descriptors, memory, or threads (a RuntimeError).
    """
    return error.errno in _LACKING if isinstance(error, OSError) else True


def reason(error: BaseException) -> str:
    """Return what went wrong, in the system's words if it has some."""
    if isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN:
        return "temporary failure in name resolution"  # glibc's words; musl's are «Try again»
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def printable(text: str) -> str:
    """Return text as one line that is safe on a terminal and in any encoding of Unicode.

    Control characters, line ends and characters that change the direction of writing become
    escapes of Python's. So do bytes that were no UTF-8: os.fsdecode() keeps those as surrogates.
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else _escape(each) for each in text)


def _escape(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # a byte, as PEP 383 keeps it
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")
