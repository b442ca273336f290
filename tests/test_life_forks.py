"""The life of an endpoint in a program that forks."""

from __future__ import annotations

import pytest
from embedded import run
from tunnel import SERVER, Bench

pytestmark = pytest.mark.hosts


def test_stop_does_not_wait_for_a_forked_child(plain: Bench) -> None:
    printed = run(
        plain,
        SERVER,
        """
        server = ttun.Server(b"secret")
        server.start()
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writing, b"forked")
            time.sleep(30)
            os._exit(0)
        os.read(reading, 6)
        started = time.monotonic()
        server.stop()
        took = time.monotonic() - started
        print("quick:", took < 10, devices())
        again = ttun.Server(b"secret", device="ttun0")  # the port and the name are free
        again.start()
        again.stop()
        os.kill(child, signal.SIGKILL)
        """,
    )
    assert "quick: True []" in printed


def test_a_forked_child_that_waits_for_it_sees_its_end(plain: Bench) -> None:
    """It once used a core for ever."""
    printed = run(
        plain,
        SERVER,
        """
        server = ttun.Server(b"secret", listen="192.0.2.1:0")
        server.start()
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            server.wait()
            os._exit(7)
        server.stop()
        print("child:", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """,
    )
    assert "child: 7" in printed


def test_a_forked_child_that_leaves_the_block_leaves_the_tunnel_alone(plain: Bench) -> None:
    """stop() of the child once had the parent's thread spin."""
    plain.client()
    printed = run(
        plain,
        SERVER,
        """
        with ttun.Server(b"secret") as server:
            until(lambda: server.status().peer)
            child = os.fork()
            if child == 0:
                signal.alarm(20)  # else a deadlock
                sys.exit(7)  # leaves the block
            code = os.waitpid(child, 0)[1] >> 8
            used = time.process_time()
            over = server.wait(2)
            used = time.process_time() - used
            print("left:", code, over, server.status().peer is not None, used < 1)
        made = ttun.Server(b"secret", listen="192.0.2.1:0")
        child = os.fork()
        if child == 0:
            made.start()  # the child's from here on
            made.stop()
            os._exit(made.wait(5))
        print("child's own:", os.waitpid(child, 0)[1] >> 8)
        """,
    )
    assert "left: 7 False True True" in printed
    assert "child's own: 1" in printed


def test_an_endpoint_that_two_processes_share_ends_with_either(plain: Bench) -> None:
    printed = run(
        plain,
        SERVER,
        """
        server = ttun.Server(b"secret", listen="192.0.2.1:0")
        server.open()
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            server.start()
            over = server.wait(10)
            used = time.process_time()
            time.sleep(2)
            os._exit(over and time.process_time() - used < 1)
        time.sleep(0.5)
        server.stop()
        print("ended:", os.waitpid(child, 0)[1])
        """,
    )
    assert "ended: 256" in printed
