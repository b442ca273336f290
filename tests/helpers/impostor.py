"""What answers ``ttun show`` in place of a tunnel, as a hostile owner of a directory would."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

from tunnel import PROGRAM, run_program

import ttun
from ttun.commands import status

PATIENCE = 25  # seconds: ten times what it may take


def made(**changes: object) -> dict[str, Any]:
    """What a tunnel answers, with some fields changed."""
    plain = status.as_dict(ttun.Server(b"key").status())
    peer = {"peer": "192.0.2.1:20203", "transport": "tcp", "wire": "x1", "cipher": "aegis-256"}
    times = {
        "connected_for": 5.0,
        "silent_for": 0.5,
        "round_trip": 0.001,
        "rekeys": 0,
        "uptime": 9.0,
    }
    return {**plain, "device": "ttun0", **peer, **times, **changes}


def line(**changes: object) -> bytes:
    return json.dumps(made(**changes)).encode() + b"\n"


class Place:
    """A directory for status sockets that only our programs know, and what listens in it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.listeners: list[socket.socket] = []
        self.over = threading.Event()
        own = {"XDG_RUNTIME_DIR": str(directory.parent), "LC_ALL": "C.UTF-8"}
        self.environment = {**os.environ, **own}

    def listen(self, name: str, inner: str = "", backlog: int = 128) -> socket.socket:
        place = self.directory / inner
        place.mkdir(exist_ok=True)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(place / name))
        listener.listen(backlog)
        self.listeners.append(listener)
        return listener

    def answer(
        self, name: str, answer: bytes | Callable[[socket.socket], object], inner: str = ""
    ) -> None:
        """Answer whoever connects: with these bytes and a close, or as a function does."""
        listener = self.listen(name, inner)

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    asking, _ = listener.accept()
                    threading.Thread(target=one, args=(asking,), daemon=True).start()

        def one(asking: socket.socket) -> None:
            with asking, contextlib.suppress(OSError):
                asking.sendall(answer) if isinstance(answer, bytes) else answer(asking)

        threading.Thread(target=serve, daemon=True).start()

    def show(self, *options: str, limits: str = "", seconds: float = PATIENCE) -> tuple[str, str]:
        """What ``ttun show`` prints, on stdout and on stderr."""
        code, out, err = self.run(*options, limits=limits, seconds=seconds)
        assert code == 0, err
        return out, err

    def run(
        self, *options: str, limits: str = "", seconds: float = PATIENCE
    ) -> tuple[int, str, str]:
        if limits:
            done = subprocess.run(
                ["prlimit", limits, *PROGRAM, "show", *options], capture_output=True, check=False,
                timeout=seconds, encoding="utf-8", errors="surrogateescape", env=self.environment,
            )  # fmt: skip
        else:
            done = run_program("show", *options, timeout=seconds, **self.environment)
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout, done.stderr

    def watch(self, text: str, times: int) -> str:
        """What ``ttun show --watch`` prints until it has printed a text that many times."""
        process = subprocess.Popen(
            [*PROGRAM, "show", "--watch"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            encoding="utf-8", env=self.environment,
        )  # fmt: skip
        timer = threading.Timer(2 * PATIENCE, process.kill)
        timer.start()
        assert process.stdout is not None
        out = ""
        while out.count(text) < times and (shown := process.stdout.readline()):
            out += shown
        process.send_signal(signal.SIGINT)
        out += process.communicate()[0]
        timer.cancel()
        assert process.returncode == 0 and "Traceback" not in out
        return out

    def close(self) -> None:
        self.over.set()
        for listener in self.listeners:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()


def place() -> Iterator[Place]:
    """The fixture."""
    home = Path(tempfile.mkdtemp(prefix="ttun-", dir="/tmp"))  # unix(7): a path of 107 bytes
    made = Place(home / "ttun")
    made.directory.mkdir()
    yield made
    made.close()
    shutil.rmtree(home)
