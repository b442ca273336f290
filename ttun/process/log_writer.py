"""The log writer: logging never waits for the reader of the log, and neither does the exit.

 1. A line goes into a queue of ROOM bytes. When the queue is full, lines are lost; later one line
    says how many.
 2. Before start() there must be no thread: capabilities are per thread, and privileges are not
    dropped yet. Each caller that logs writes the queue itself, as far as poll(2) says that a write
    does not block. This stays so if no thread can be started, which is retried every second.
 3. After start() a thread writes, and may block on the reader.
 4. At the end finish() allows LAST seconds for the rest. The thread is a daemon and calls write(2)
    itself: it holds no lock that the interpreter's shutdown takes, and if it hangs it ends with the
    process.

The open file description of stderr is shared with others, such as the shell. O_NONBLOCK would
affect them too, so it is not set. What Python itself prints on stderr takes the same path.
Sources: pipe(7) for PIPE_BUF, write(2), poll(2).
"""

from __future__ import annotations

import collections
import contextlib
import io
import logging
import os
import select
import sys
import threading
import time
from typing import Protocol

log = logging.getLogger("ttun")

ROOM = 65536  # bytes of lines in the queue
LAST = 1.0  # seconds that the exit waits for the reader
PAUSE = 0.1  # seconds between two attempts if poll() reports room and write() finds none
RETRY = 1.0  # seconds until starting a thread is retried
PIECE = select.PIPE_BUF  # bytes that a pipe accepts at once when poll() reports room
UNREAD = "the log is not being read"
STDERR = 2


class Output(Protocol):
    """The destination of lines."""

    def fileno(self) -> int:
        """Return the descriptor to poll."""

    def encode(self, text: str, level: int) -> bytes:
        """Return a line as it is written. level: one of logging's."""

    def write(self, data: bytes) -> int:
        """Write some of data; return the number of bytes written. Raises OSError."""


class Descriptor:
    """An open file, by default stderr."""

    def __init__(self, descriptor: int = STDERR) -> None:
        """Use a descriptor, which stays open."""
        self._descriptor = descriptor
        self._encoding = getattr(sys.stderr, "encoding", None) or "utf-8"

    def fileno(self) -> int:
        """Return the descriptor to poll."""
        return self._descriptor

    def encode(self, text: str, _: int) -> bytes:
        """Return a line as it is written."""
        return text.encode(self._encoding, "backslashreplace") + b"\n"

    def write(self, data: bytes) -> int:
        """Write a piece that a pipe accepts whole; return its size. Raises OSError."""
        return os.write(self._descriptor, data[:PIECE])


class Writer(logging.Handler):
    """Accepts records and lines from any thread without blocking, and writes them in order."""

    def __init__(self, output: Output) -> None:
        """Write without a thread until start()."""
        super().__init__()
        self._output = output
        self._changed = threading.Condition()  # guards the following
        self._lines: collections.deque[bytes] = collections.deque()
        self._size = 0  # bytes of them
        self._lost = 0  # number of lost lines
        self._why = ""  # the reason
        self._is_full = False  # until the queue is empty again
        self._has_failed = False  # the last write; the next line retries
        self._rest = b""  # of the line that is being written
        self._is_begun = False  # a part of that line is written
        self._is_torn = False  # a line was written in part and given up
        self._told = -1  # number of lost lines that the current line reports; -1: another line
        self._is_writing = False  # without a thread
        self._wants_thread = False
        self._next_try = 0.0
        self._thread: threading.Thread | None = None
        self._deadline: float | None = None  # for flush(); the end has one for all

    def start(self) -> None:
        """Start the thread; after privileges are dropped."""
        with self._changed:
            self._wants_thread = True
            self._start_thread()

    def move(self, output: Output) -> None:
        """Change the destination; before start()."""
        self.flush()
        with self._changed:
            self._output = output

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a record."""
        try:
            self.say(self.format(record), record.levelno)
        except Exception:
            self.handleError(record)

    def say(self, text: str, level: int = logging.ERROR) -> None:
        """Queue a line."""
        line = self._output.encode(text, level)
        with self._changed:
            if self._is_full or self._size + len(line) > ROOM:
                self._is_full = True
                self._lose(UNREAD)
            else:
                self._lines.append(line)
                self._size += len(line)
            self._has_failed = False
            if self._wants_thread and not self._has_thread():
                self._start_thread()
            if self._has_thread():
                self._changed.notify_all()
            else:
                self._write_without_thread(0.0)

    def flush(self) -> None:
        """Wait until all is written, LAST seconds at most; LAST in all from finish() on."""
        deadline = self._deadline or time.monotonic() + LAST
        with self._changed:
            while self._has_work() and (left := deadline - time.monotonic()) > 0:
                if self._has_thread():
                    self._changed.wait(left)
                else:
                    self._write_without_thread(left)

    def finish(self) -> None:
        """Flush for the last time. Later lines are written only if that does not block."""
        self._deadline = self._deadline or time.monotonic() + LAST
        self.flush()

    def _start_thread(self) -> None:
        if time.monotonic() < self._next_try or self._deadline is not None:
            return
        self._next_try = time.monotonic() + RETRY
        thread = threading.Thread(target=self._run, name="ttun-log", daemon=True)
        with contextlib.suppress(RuntimeError):  # the limit of threads is reached
            thread.start()
            self._thread = thread

    def _has_thread(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _has_work(self) -> bool:
        return not self._has_failed and bool(self._rest or self._lines or self._lost)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._has_work():
                    self._changed.wait()
                self._take()
            self._write(None)

    def _write_without_thread(self, seconds: float) -> None:
        """Write what can be written; wait up to so many seconds for each piece."""
        if self._is_writing:
            return  # called again by a warning of the interpreter
        self._is_writing = True
        try:
            while self._has_work():
                self._take()
                if not self._write(seconds):
                    break
        finally:
            self._is_writing = False

    def _take(self) -> None:
        """Choose the next line to write, unless one is in progress."""
        if self._rest:
            return
        if self._lost and not (self._is_full and self._lines):
            self._is_full = False
            self._told = self._lost
            many = "line" if self._lost == 1 else "lines"
            record = logging.WARNING, "%d log %s lost: %s", self._lost, many, self._why
            self._rest = self._format(*record)
        else:
            self._told = -1
            self._rest = self._lines.popleft()
            self._size -= len(self._rest)
        if self._is_torn:
            self._rest = b"\n" + self._rest

    def _format(self, level: int, message: str, *arguments: object) -> bytes:
        record = log.makeRecord(log.name, level, "", 0, message, arguments, None)
        return self._output.encode(self.format(record), level)

    def _write(self, seconds: float | None) -> bool:
        """Write a piece of a line; False if that takes longer, or fails. seconds: None for ever."""
        try:
            written = self._write_piece(seconds)
        except (OSError, ValueError) as error:
            with self._changed:
                self._fail(getattr(error, "strerror", None) or str(error))
            return False
        with self._changed:
            self._rest = self._rest[written:]
            if written:
                self._is_begun, self._is_torn = bool(self._rest), False
            if not self._rest:
                self._lost -= max(self._told, 0)
                self._changed.notify_all()
        return written > 0

    def _write_piece(self, seconds: float | None) -> int:
        """Return how many bytes were written; 0 if it would take longer."""
        if seconds is not None and not self._poll(seconds):
            return 0
        try:
            return self._output.write(self._rest)
        except BlockingIOError:  # another process set O_NONBLOCK, or it is the syslog socket
            if seconds is None:
                self._poll(None)
            # There may be room, but not enough for this: do not poll in a busy loop.
            time.sleep(PAUSE if seconds is None else min(seconds, PAUSE))
            return 0

    def _poll(self, seconds: float | None) -> bool:
        waiting = select.poll()
        waiting.register(self._output, select.POLLOUT)
        return bool(waiting.poll(None if seconds is None else seconds * 1000))

    def _fail(self, why: str) -> None:
        """Drop the line that cannot be written; the next attempt is with the next line."""
        self._is_torn = self._is_torn or self._is_begun
        self._rest, self._is_begun = b"", False
        self._has_failed = True
        if self._told < 0:
            self._lose(why)
        else:
            self._why = why
        self._changed.notify_all()

    def _lose(self, why: str) -> None:
        self._lost += 1
        self._why = why


class Stream(io.TextIOBase):
    """A sys.stderr whose lines go to a Writer: errors, warnings, tracebacks."""

    def __init__(self, writer: Writer) -> None:
        """Start with an empty line."""
        self._writer = writer
        self._line = ""
        self._lock = threading.RLock()  # guards the incomplete line

    def fileno(self) -> int:
        """Return the descriptor of stderr."""
        return STDERR

    def write(self, text: str) -> int:
        """Take text; pass each complete line on."""
        if sys.is_finalizing():
            return self._write_at_last(text)
        with self._lock:
            *lines, self._line = (self._line + text).split("\n")
            for line in lines:
                self._writer.say(line)
        return len(text)

    def flush(self) -> None:
        """Pass an incomplete line on too."""
        if self._line:
            self.write("\n")

    def _write_at_last(self, text: str) -> int:
        """Write text during the interpreter's shutdown, such as an error in a destructor.

        Other threads no longer run, and one of them may hold a lock: take none.
        """
        waiting = select.poll()
        waiting.register(STDERR, select.POLLOUT)
        with contextlib.suppress(OSError):
            if waiting.poll(0):
                os.write(STDERR, text.encode(errors="backslashreplace")[:PIECE])
        return len(text)


def install() -> None:
    """Send the log of this program, and all that it prints on stderr, through a Writer."""
    for earlier in _writers():
        log.removeHandler(earlier)
    logging.raiseExceptions = False
    writer = Writer(Descriptor())
    writer.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y/%m/%d %H:%M:%S"))
    log.addHandler(writer)
    log.setLevel(logging.INFO)
    with contextlib.suppress(OSError):  # the caller has replaced it
        if sys.stderr.fileno() == STDERR:
            sys.stderr = Stream(writer)


def start() -> None:
    """Start the writer's thread; after privileges are dropped."""
    for writer in _writers():
        writer.start()


def move(output: Output, form: str) -> None:
    """Log to another destination in lines of this format; before start()."""
    for writer in _writers():
        writer.move(output)
        writer.setFormatter(logging.Formatter(form))


def flush() -> None:
    """Write what can be written, within LAST seconds."""
    sys.stderr.flush()
    for writer in _writers():
        writer.flush()


def finish() -> None:
    """Flush for the last time: later calls do not extend the deadline."""
    sys.stderr.flush()
    for writer in _writers():
        writer.finish()


def _writers() -> list[Writer]:
    return [handler for handler in log.handlers if isinstance(handler, Writer)]
