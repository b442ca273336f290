"""The life of an endpoint in a program that embeds it: what each call does in each state."""

from __future__ import annotations

import pytest
from embedded import run
from tunnel import CLIENT, SERVER, Bench

pytestmark = pytest.mark.hosts


STATES = {
    "made": "",
    "open": "end.open()",
    "running": "end.start()",
    "over": "end.start(); end.stop()",
    "given up": "end.stop()",
}
# What each call does: rejected or not, and whether the endpoint has stopped afterwards.
TABLE = [
    ("made", "end.open()", False, False),
    ("made", "end.start()", False, False),
    ("made", "end.stop()", False, True),
    ("made", "end.port", True, False),
    ("made", "end.use_keys([b'another'])", False, False),
    ("open", "end.open()", True, False),
    ("open", "end.start()", False, False),
    ("open", "end.stop()", False, True),
    ("open", "end.port", False, False),
    ("open", "end.use_keys([b'another'])", False, False),
    ("running", "end.open()", True, False),
    ("running", "end.start()", True, False),
    ("running", "end.stop()", False, True),
    ("running", "end.port", False, False),
    ("running", "end.use_keys([b'another'])", True, False),
    ("over", "end.open()", True, True),
    ("over", "end.start()", True, True),
    ("over", "end.stop()", False, True),
    ("over", "end.port", False, True),
    ("over", "end.use_keys([b'another'])", True, True),
    ("given up", "end.open()", True, True),
    ("given up", "end.start()", True, True),
    ("given up", "end.use_keys([b'another'])", True, True),
]


def test_each_call_in_each_state_does_what_the_table_says(plain: Bench) -> None:
    lines = ["results = []"]
    for state, call, _, _ in TABLE:
        lines += [
            "end = ttun.Server(b'secret', listen='192.0.2.1:0')",
            STATES[state] or "pass",
            f"denied = refused(lambda: {call})",
            "end.status()",
            "over = end.wait(0)",
            "results.append((denied, over))",
            "end.stop()",
            "assert end.wait(5), 'it is over after stop()'",
            "end.stop()",
            "assert not devices(), devices()",
        ]
    printed = run(plain, SERVER, "\n".join([*lines, "print(results)"]))
    assert str([(denied, over) for _, _, denied, over in TABLE]) in printed


def test_a_second_start_writes_into_nobodys_file(plain: Bench) -> None:
    """It once closed the device, whose descriptor number was then reused."""
    plain.client()
    printed = run(
        plain,
        SERVER,
        """
        import tempfile
        server = ttun.Server(b"secret")
        server.start()
        until(lambda: server.status().peer)
        print("refused:", refused(server.start), refused(server.open))
        with tempfile.TemporaryFile() as file:
            time.sleep(1)
            end = time.monotonic() + 3
            while time.monotonic() < end:
                os.system("ping -c 1 -W 1 10.1.1.2 > /dev/null 2>&1")
            print("written:", os.fstat(file.fileno()).st_size)
        print("peer:", server.status().peer is not None)
        server.stop()
        """,
    )
    assert "refused: True True" in printed
    assert "written: 0" in printed
    assert "peer: True" in printed


def test_two_threads_that_start_it_start_one(plain: Bench) -> None:
    printed = run(
        plain,
        SERVER,
        """
        for _ in range(20):
            server = ttun.Server(b"secret", listen="192.0.2.1:0")
            denied = []
            threads = [
                threading.Thread(target=lambda: denied.append(refused(server.start)))
                for _ in range(4)
            ]
            for thread in threads: thread.start()
            for thread in threads: thread.join()
            assert sorted(denied) == [False, True, True, True], denied
            server.stop()
            assert server.wait(5)
        print("good")
        """,
    )
    assert "good" in printed


def test_a_signal_handler_may_stop_it_whatever_the_main_thread_does(plain: Bench) -> None:
    plain.client()
    printed = run(
        plain,
        SERVER,
        """
        import faulthandler
        faulthandler.dump_traceback_later(40, exit=True)  # a deadlock ends the program
        for number in range(30):
            server = ttun.Server(b"secret", listen="192.0.2.1:20203")
            signal.signal(signal.SIGALRM, lambda *_: server.stop())
            server.start()
            if number == 0:
                until(lambda: server.status().peer)
            signal.setitimer(signal.ITIMER_REAL, 0.003 * (1 + number % 7))
            while not server.wait(0):
                server.status()
                server.facts()
        print("good")
        """,
        timeout=90,
    )
    assert "good" in printed


def test_a_signal_handler_may_stop_it_in_the_middle_of_stop_and_of_start(plain: Bench) -> None:
    """It once waited for the call that it had interrupted."""
    printed = run(
        plain,
        SERVER,
        """
        import faulthandler
        faulthandler.dump_traceback_later(40, exit=True)  # a deadlock ends the program
        signal.signal(signal.SIGUSR1, lambda *_: server.stop())

        class Server(ttun.Server):
            def _begin(self):
                super()._begin()
                os.kill(os.getpid(), signal.SIGUSR1)

            def _close(self):
                os.kill(os.getpid(), signal.SIGUSR1)
                super()._close()

        for prepare in ("open", "start"):
            server = Server(b"secret", listen="192.0.2.1:0")
            getattr(server, prepare)()
            server.stop()
            print("over:", server.wait(10), devices())
        server = Server(b"secret")
        server.stop()
        print("over:", server.wait(10), devices())
        """,
    )
    assert printed.count("over: True []") == 3


def test_an_interrupted_start_ends_it_once(plain: Bench) -> None:
    """KeyboardInterrupt once closed the device while the thread was running."""
    printed = run(
        plain,
        SERVER,
        """
        start = threading.Thread.start

        def interrupted(thread):
            start(thread)
            if thread.name == "ttun-server":
                time.sleep(0.5)
                raise KeyboardInterrupt

        threading.Thread.start = interrupted
        server = ttun.Server(b"secret", listen="192.0.2.1:0")
        try:
            server.start()
        except KeyboardInterrupt:
            print("over:", server.wait(10), devices())
        time.sleep(0.5)
        print("threads:", threading.active_count())
        """,
    )
    assert "over: True []" in printed
    assert "threads: 1" in printed


def test_stop_from_a_callback_does_not_wait_for_itself(plain: Bench) -> None:
    plain.client()
    printed = run(
        plain,
        SERVER,
        """
        server = ttun.Server(b"secret", on_connected=lambda _: server.stop())
        server.start()
        print("over:", server.wait(20))
        """,
    )
    assert "over: True" in printed


def test_two_whose_callbacks_stop_each_other_end(plain: Bench) -> None:
    """Each waited for the other one for good, and so did every later stop()."""
    program = """
        import socket
        one, other = socket.socketpair()
        given = ttun.GivenSockets()
        server = ttun.Server(b"secret", listen=given)
        client = ttun.Client(b"secret", server=ttun.GivenSocket(other))
        both = threading.Barrier(2)
        def stop(end):
            both.wait(20)
            end.stop()
        server.on_connected = lambda peer: stop(client)
        client.on_connected = lambda peer: stop(server)
        given.give(one, "the client")
        server.start()
        client.start()
        until(lambda: server.wait(0) and client.wait(0))
        print("devices left:", devices())
        os._exit(0)
    """
    assert "devices left: []" in run(plain, CLIENT, program)


def test_what_a_callback_raises_is_a_line_and_the_session_stays(plain: Bench) -> None:
    client = plain.client()
    printed = run(
        plain,
        SERVER,
        """
        def trouble(*_):
            raise ValueError("mine")
        server = ttun.Server(b"secret", on_connected=trouble, on_disconnected=trouble)
        server.start()
        until(lambda: server.status().peer)
        time.sleep(0.5)
        print("peer:", server.status().peer is not None, "over:", server.wait(0))
        server.stop()
        print("no peer:", server.status().peer)
        """,
    )
    assert "peer: True over: False" in printed
    assert printed.count("callback failed: ValueError: mine") == 2
    assert "no peer: None" in printed
    assert client.log().count("authenticated") == 1


@pytest.mark.slow
def test_it_shows_that_it_lives_unless_a_callback_hangs(plain: Bench) -> None:
    """While listening, connecting and in a session; the heartbeat stops with the thread."""
    plain.client()
    printed = run(
        plain,
        SERVER,
        """
        def hang(_):
            time.sleep(14)
        client = ttun.Client(b"secret", server="192.0.2.99", device="dials")
        client.start()
        server = ttun.Server(b"secret", on_connected=hang)
        server.start()
        until(lambda: server.status().peer)
        seen = []
        for _ in range(28):
            time.sleep(1)
            seen.append(server.is_alive())
            assert client.is_alive()
        print("seen:", seen[3], seen[11], seen[17], all(seen[17:]))
        server.stop()
        client.stop()
        """,
        timeout=120,
    )
    assert "seen: True False True True" in printed


def test_a_device_that_was_only_opened_is_gone_after_stop(plain: Bench) -> None:
    printed = run(
        plain,
        CLIENT,
        """
        client = ttun.Client(b"secret", server="192.0.2.1")
        client.open()
        print("open:", devices())
        client.stop()
        print("over:", client.wait(0), devices())
        """,
    )
    assert "open: ['ttun0']" in printed
    assert "over: True []" in printed


def test_a_callback_that_waits_for_the_end_is_refused(plain: Bench) -> None:
    plain.client()
    printed = run(
        plain,
        SERVER,
        """
        server = ttun.Server(b"secret", on_connected=lambda _: print(server.wait(0), server.wait()))
        server.start()
        until(lambda: server.status().peer)
        threading.Timer(20, lambda: os._exit(1)).start()
        server.stop()
        print("stopped", flush=True)
        os._exit(0)
        """,
    )
    assert "wait() in a callback would wait for itself" in printed
    assert "stopped" in printed


def test_callbacks_may_be_methods_of_a_subclass(plain: Bench) -> None:
    plain.client()
    printed = run(
        plain,
        SERVER,
        """
        class Server(ttun.Server):
            def on_connected(self, peer):
                self.stop()
                raise KeyError("after all")

            def on_disconnected(self, peer, reason):
                print("left:", reason)

        server = Server(b"secret")
        server.start()
        print("stopped:", server.wait(20))
        """,
    )
    assert "callback failed: KeyError" in printed
    assert "left: stopped" in printed
    assert "stopped: True" in printed


def test_keys_that_come_too_late_are_refused_and_the_first_ones_stay(plain: Bench) -> None:
    """A client with the third of three keys once ended the server, which had names for two."""
    plain.client()
    printed = run(
        plain,
        SERVER,
        """
        server = ttun.Server([b"one", b"two", b"secret"])
        server.start()
        print("refused:", refused(lambda: server.use_keys([b"one", b"two"])))
        until(lambda: server.status().sessions or server.wait(0))
        print("over:", server.wait(1), "peer:", server.status().peer is not None)
        server.stop()
        """,
    )
    assert "refused: True" in printed
    assert "over: False peer: True" in printed
