"""The two kinds of error: ours, for the person who started the program, and the peer's."""

from __future__ import annotations


class TtunError(Exception):
    """Something cannot work here. One line: what is wrong and what to do. Exit code 1."""


class UsageError(TtunError):
    """A value that was given makes no sense. One line. Exit code 2."""


class ProtocolError(Exception):
    """The peer did something that ends its session. One line for the log: what it did."""


class UnrecognizedError(ProtocolError):
    """A peer showed no sign of the key where nothing may show that a ttun is here."""
