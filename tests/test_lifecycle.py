"""The life of something that needs no device."""

from __future__ import annotations

import threading

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

    def _depends_on_this_thread(self) -> bool:
        self.stopping.set()
        assert self.opened.wait(10)
        try:
            return super()._depends_on_this_thread()
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
