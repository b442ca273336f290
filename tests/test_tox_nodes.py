"""Bootstrap nodes, and a name server that does not answer."""

from __future__ import annotations

import socket
import threading
from typing import Any, Callable

import pytest
from tunnel import eventually

from ttun.tox.nodes import Bootstrap, Node


class Loop:
    """A loop and its Tox in one: it notes from which nodes it is told to bootstrap."""

    def __init__(self) -> None:
        self.tox = self
        self.hosts: list[str] = []

    def call(self, function: Callable[[], None]) -> None:
        function()

    def bootstrap(self, host: str, *_: object) -> None:
        self.hosts.append(host)


def test_a_name_that_nobody_answers_for_holds_up_no_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each could take 20 s, one after the other."""
    over, look_up = threading.Event(), socket.getaddrinfo

    def slow(host: str, *arguments: Any, **options: Any) -> list[Any]:
        if host.endswith(".invalid"):
            over.wait(60)
        return look_up(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    hosts = ["a.invalid", "192.0.2.1", "b.invalid", "2001:db8::1", "c.invalid", "d.invalid"]
    loop = Loop()
    Bootstrap(loop).try_some([Node(host, 1, b"", ()) for host in hosts], 1.0)
    try:
        eventually(lambda: sorted(loop.hosts) == ["192.0.2.1", "2001:db8::1"], "both", 5)
    finally:
        over.set()
