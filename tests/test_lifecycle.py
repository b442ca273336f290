"""The life of something that needs no device."""

from __future__ import annotations

import gc
import threading
import warnings
import weakref

import pytest

import ttun
from ttun.errors import TtunError
from ttun.lifecycle import Lifecycle


class Between(Lifecycle):
    """stop() has seen that it is not open; then open() on another thread makes it so."""

    role = "test"

    def __init__(self) -> None:
        super().__init__()
        self.opening, self.stopping, self.opened, self.judged = (
            threading.Event() for _ in range(4)
        )
        self.refused: TtunError | None = None

    def open_it(self) -> None:
        try:
            self.open()
        except TtunError as error:
            self.refused = error

    def _acquire(self) -> None:
        self.opening.set()
        assert self.stopping.wait(10)

    def _take(self, step: str) -> bool:
        if step == "start":  # open() has just made it so
            self.opened.set()
            assert self.judged.wait(10)
        return super()._take(step)

    def _interrupted_here(self) -> bool:
        self.stopping.set()
        assert self.opened.wait(10)
        try:
            return super()._interrupted_here()
        finally:
            self.judged.set()

    def _run(self) -> None: ...

    def _look(self) -> float:
        return 1.0

    def _release(self) -> None: ...


def test_stop_while_another_thread_ends_open_waits_for_it() -> None:
    end = Between()
    thread = threading.Thread(target=end.open_it)
    thread.start()
    assert end.opening.wait(10)
    end.stop()
    thread.join(10)
    assert str(end.refused) == "stopped while opening"
    assert end.wait(0)


class Failing(Lifecycle):
    """One that ends with an error."""

    role = "test"

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def _acquire(self) -> None: ...

    def _run(self) -> None:
        raise self.error

    def _look(self) -> float:
        return 1.0

    def _release(self) -> None: ...


def test_an_error_keeps_nothing_of_those_that_waited_for_it() -> None:
    """A program that asks again and again kept all of its frames, with what they held."""
    end = Failing(TtunError("over"))
    end.start()
    held = weakref.WeakSet[threading.Event]()

    def ask() -> None:
        mine = threading.Event()
        held.add(mine)
        with pytest.raises(TtunError, match="over"):
            end.wait(10)

    for _ in range(5):
        ask()
    gc.collect()
    assert len(held) <= 1


def test_a_bug_of_the_program_is_told_with_its_place() -> None:
    end = Failing(LookupError("in a Dialer"))
    end.start()
    with pytest.raises(TtunError, match="internal error: LookupError: in a Dialer") as raised:
        end.wait(10)
    assert raised.value.__cause__ is end.error


def test_an_endpoint_that_was_dropped_is_no_leak_to_python() -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ttun.Server(b"secret").stop()
        gc.collect()
    assert not said
