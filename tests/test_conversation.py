"""Conversation: a generator gets exactly the bytes that it asks for."""

from __future__ import annotations

import socket
from collections.abc import Generator, Iterator

import pytest

from ttun.conversation import Conversation
from ttun.errors import ProtocolError


def ask() -> Generator[tuple[bytes, int], bytes, str]:
    """Ask for a name that follows its length."""
    (length,) = yield b"name?", 1
    name = yield b"", length
    yield b"thanks", 0
    return name.decode()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        yield ours, theirs


@pytest.mark.parametrize("pieces", [[b"\3abcrest"], [b"\3", b"ab", b"crest"]])
def test_it_takes_what_it_wants_in_whatever_pieces_and_leaves_the_rest(
    pieces: list[bytes], pair: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = pair
    talk = Conversation(ours, ask())
    assert talk.advance() is None
    assert not talk.heard
    assert theirs.recv(100) == b"name?"
    found = []
    for piece in pieces:
        theirs.sendall(piece)
        found.append(talk.advance())
    assert found == [None] * (len(pieces) - 1) + ["abc"]
    assert talk.heard
    assert theirs.recv(100) == b"thanks"
    assert ours.recv(100) == b"rest"


def test_it_begins_with_what_was_read_before(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    talk = Conversation(ours, ask(), b"\2a")
    theirs.sendall(b"bc")
    assert talk.advance() == "ab"
    assert ours.recv(100) == b"c"


def test_a_peer_that_leaves_or_does_not_read_is_an_error(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    theirs.sendall(b"\3a")
    theirs.shutdown(socket.SHUT_WR)
    with pytest.raises(ProtocolError, match="closed during the handshake"):
        Conversation(ours, ask()).advance()
    theirs.close()
    with pytest.raises(OSError, match="Broken pipe"):
        Conversation(ours, ask()).advance()
