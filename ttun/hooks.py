"""Commands that run when a peer comes and when it leaves, with the facts in their environment.

They run one after the other on a thread of their own, so a slow one holds up no packet. They run
as the user of --user, without capabilities, and no set-user-ID program changes that: what takes
more rights belongs into the service manager, or into a program that waits to be told.
"""

from __future__ import annotations

import logging
import os
import queue
import subprocess
import threading

from ttun import key

log = logging.getLogger("ttun")

TIMEOUT = 60.0  # seconds of one command
END_TIMEOUT = 5.0  # seconds that the program waits for the last one when it ends


class Hooks:
    """Runs --up and --down. Either may be None."""

    def __init__(self, up: str | None, down: str | None) -> None:
        """Start nothing yet."""
        self._up, self._down = up, down
        self._jobs: queue.SimpleQueue[tuple[str, dict[str, str]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread, once privileges are gone: the commands have what it has."""
        self._thread = threading.Thread(target=self._run, name="ttun-hooks", daemon=True)
        self._thread.start()

    def up(self, facts: dict[str, str | None]) -> None:
        """A peer came. facts: name without ``TTUN_`` in front, in lower case -> value."""
        self._add(self._up, facts)

    def down(self, facts: dict[str, str | None]) -> None:
        """It left."""
        self._add(self._down, facts)

    def close(self) -> None:
        """Wait a little for what is under way."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join(END_TIMEOUT)

    def _add(self, command: str | None, facts: dict[str, str | None]) -> None:
        if command is not None:
            named = {f"TTUN_{name.upper()}": value or "" for name, value in facts.items()}
            self._jobs.put((command, named))

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            command, facts = job
            environment = {**os.environ, **facts}
            environment.pop(key.VARIABLE, None)
            try:
                code = subprocess.run(
                    ["/bin/sh", "-c", command],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    timeout=TIMEOUT,
                    check=False,
                ).returncode
                if code != 0:
                    log.warning("%s: exit code %d", command, code)
            except (OSError, subprocess.TimeoutExpired) as error:
                log.warning("%s: %s", command, getattr(error, "strerror", None) or error)
