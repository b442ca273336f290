"""The stop flag."""

from __future__ import annotations

import os
import select
import threading
import time

import pytest

from ttun.flag import Flag


def test_a_wait_for_something_else_ends_with_that_with_its_time_or_with_the_flag() -> None:
    flag = Flag()
    readable, writable = os.pipe()
    try:
        assert not flag.wait_for(readable, select.POLLIN, 0.05)
        os.write(writable, b"1")
        assert flag.wait_for(readable, select.POLLIN, 0), "what came is seen without time, too"
        os.read(readable, 1)
        threading.Timer(0.1, flag.set).start()
        began = time.monotonic()
        with pytest.raises(InterruptedError):
            flag.wait_for(readable, select.POLLIN, 60)
        assert time.monotonic() - began < 30
        os.write(writable, b"1")
        with pytest.raises(InterruptedError):
            flag.wait_for(readable, select.POLLIN, 60)
    finally:
        os.close(readable)
        os.close(writable)


def test_whatever_it_waits_for_a_thread_shows_that_it_lives() -> None:
    flag, beats = Flag(), []

    def beat() -> float:
        beats.append(time.monotonic())
        return 60.0

    flag.on_beat = beat
    readable, writable = os.pipe()
    try:
        assert not flag.wait(1.2)
        assert not flag.wait_for(readable, select.POLLIN, 1.2)
        assert len(beats) >= 4
    finally:
        os.close(readable)
        os.close(writable)


def test_a_beat_comes_sooner_if_the_last_one_asked_for_that() -> None:
    flag, beats = Flag(), []

    def beat() -> float:
        beats.append(time.monotonic())
        return 0.01

    flag.on_beat = beat
    assert not flag.wait(2)
    assert len(beats) > 10, "not one a second"
