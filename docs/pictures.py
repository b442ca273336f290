"""``make pictures``: record what a terminal shows, and draw it as SVG for the README. As root.

    PYTHONPATH=. python docs/pictures.py COLUMNS FILE.svg COMMAND...

draws any other command in the same way, as wide as that.

1. Run a command on a pseudo-terminal. Note what is on its screen, and when that changes.
2. Draw each line as text that is visible as long as it was on the screen. The last screen stays. It
   is the only one where the reader prefers reduced motion.

The picture has a dark background of its own, so it can be read on any page.
"""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import html
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from itertools import groupby, zip_longest
from pathlib import Path
from typing import NamedTuple

from ttun.commands import key
from ttun.lab import netns
from ttun.lab.demo import end
from ttun.lab.netns import CLIENT, SERVER, Hosts

ROOT = Path(__file__).resolve().parent.parent
ROWS, COLUMNS = 40, 80
SETTLED = 0.02  # seconds: a screen that changes sooner than that is not drawn
LONGEST = 600  # seconds that a command may run
LOAD = "sleep 2; {0} flood 10.1.1.1 5001 1 6; sleep 2; {0} drain 10.1.1.1 5001 1 9"
WIDTH, HEIGHT, MARGIN = 7.83, 19, 14  # of a character, of a line, around everything: pixels
STYLES = {"1": "bold", "31": "red", "32": "green", "35": "magenta"}  # by SGR parameter
STYLE = """
text { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  fill: #d6dde6; white-space: pre } .typed { fill: #7ee2a8 } .typed, .bold { font-weight: 600 }
.red { fill: #ff8f87 } .green { fill: #7ee2a8 } .magenta { fill: #e0a8ff }
.past { visibility: hidden }
@keyframes wait { from, to { visibility: hidden } }
@keyframes show { from, to { visibility: visible } }
@media (prefers-reduced-motion: reduce) { text { animation: none !important } }
"""
TOKEN = re.compile(r"\033\[([\d;?]*)([@-~])|[\r\n]|\033[^\[]|[^\033\r\n]", re.S)


class Span(NamedTuple):
    """Some text of one style that contains no wide gap."""

    column: int
    text: str
    style: str


Line = tuple[Span, ...]
Screens = list[tuple[float, list[Line]]]  # seconds since the start, the lines from then on


class Screen:
    """What a terminal shows: the few control sequences of console_codes(4) that ttun writes."""

    def __init__(self, columns: int) -> None:
        """Begin empty. columns: where lines wrap."""
        self._columns = columns
        self._cells: list[list[tuple[str, str]]] = [[]]  # characters and styles of each row
        self._row = self._column = 0
        self._style = self._rest = ""

    def feed(self, text: str) -> None:
        """Show some more output."""
        text, at = self._rest + text, 0
        while match := TOKEN.match(text, at):
            at = match.end()
            if match[2]:
                self._control(match[1], match[2])
            elif match[0] == "\n":
                self._move(self._row + 1, self._column)
            elif match[0] == "\r":
                self._column = 0
            elif match[0][0] != "\033":
                self._put(match[0])
        self._rest = text[at:]  # a sequence of which the end is missing

    def _put(self, character: str) -> None:
        if self._column >= self._columns:
            self._move(self._row + 1, 0)
        row = self._cells[self._row]
        row += [(" ", "")] * (self._column + 1 - len(row))
        row[self._column] = character, self._style
        self._column += 1

    def _move(self, row: int, column: int) -> None:
        self._row, self._column = row, column
        self._cells += [[] for _ in range(row + 1 - len(self._cells))]

    def _control(self, parameters: str, final: str) -> None:
        if final == "m":
            self._style = STYLES.get(parameters, "")
        elif final == "H":
            self._move(0, 0)
        elif final in "JK":  # from here to the end
            del self._cells[self._row][self._column :]
            if final == "J":
                del self._cells[self._row + 1 :]

    def lines(self) -> list[Line]:
        """Return the rows from the top, without empty ones at the bottom."""
        rows = [tuple(_spans(cells)) for cells in self._cells]
        while rows and not rows[-1]:
            rows.pop()
        return rows


def _spans(cells: list[tuple[str, str]]) -> Iterator[Span]:
    start = 0
    for style, run in groupby(cells, lambda cell: cell[1]):
        text = "".join(character for character, _ in run)
        for part in re.finditer(r"\S+( \S+)*", text):
            yield Span(start + part.start(), part[0], style)
        start += len(text)


def record(command: list[str], seconds: float, columns: int = COLUMNS) -> Screens:
    """Run a command until it ends, or for so many seconds; return what the terminal showed."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", ROWS, columns, 0, 0))
    left_out = re.compile("MAKE|COLUMNS|LINES|NO_COLOR")  # else make[1], or another width
    own = {name: text for name, text in os.environ.items() if not left_out.search(name)}
    own["TERM"] = "xterm-256color"
    process = subprocess.Popen(
        command, cwd=ROOT, env=own, stdin=slave, stdout=slave, stderr=slave, text=True
    )
    os.close(slave)
    screen, screens, start = Screen(columns), Screens(), time.monotonic()
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    with contextlib.suppress(OSError):  # EIO: the command has ended
        while select.select([master], [], [], max(0.0, start + seconds - time.monotonic()))[0]:
            screen.feed(decode(os.read(master, 65536)))
            now = time.monotonic() - start
            if screens and now - screens[-1][0] < SETTLED:
                screens.pop()
            screens.append((now, screen.lines()))
    os.close(master)
    end(process)
    return screens


def texts(screens: Screens) -> Iterator[tuple[int, Line, float, float | None]]:
    """Yield each line: its row, and from when until when it is there; None: to the end."""
    for row in range(max(len(lines) for _, lines in screens)):
        shown = [(when, lines[row] if row < len(lines) else ()) for when, lines in screens]
        changed = [now for before, now in zip([(0.0, ()), *shown], shown) if now[1] != before[1]]
        for (since, line), after in zip_longest(changed, changed[1:]):
            if line:
                yield row, line, since, after[0] if after else None


def draw(typed: str, screens: Screens, file: Path, columns: int = COLUMNS) -> None:
    """Draw a command line and what it showed."""
    height = (1 + max(len(lines) for _, lines in screens)) * HEIGHT + 2 * MARGIN
    width, top = round(columns * WIDTH) + 2 * MARGIN, MARGIN + 13
    typed = html.escape(typed[: columns - 2])
    svg = f"""\
<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" \
viewBox="0 0 {width} {height}" role="img">
<title>{typed}</title><style>{STYLE}</style>
<rect width="100%" height="100%" rx="8" fill="#171b21"/>
<text class="typed" x="{MARGIN}" y="{top}"># {typed}</text>
"""
    for row, line, since, until in texts(screens):
        play = f"show {until - since:.2f}s {since:.2f}s" if until else f"wait {since:.2f}s"
        past = ' class="past"' if until else ""
        svg += f'<text{past} y="{top + (row + 1) * HEIGHT}" style="animation:{play}">'
        # Text after a wide gap is in its column, however wide the reader's font is.
        for span in line:
            svg += f'<tspan x="{MARGIN + span.column * WIDTH:.0f}"'
            if span.style:
                svg += f' class="{span.style}"'
            if not span.text.isascii():  # the bars of a graph may come from another font
                svg += f' textLength="{len(span.text) * WIDTH:.0f}"'
            svg += f">{html.escape(span.text)}</tspan>"
        svg += "</text>\n"
    file.write_text(f"{svg}</svg>\n", encoding="utf-8")
    print(f"{file.name}: {len(screens)} screens, {file.stat().st_size / 1000:.0f} kB")


def watch(command: list[str]) -> Screens:
    """Record a command on the client's host during an upload and a download."""
    environment, quiet = netns.environment(TTUN_PSK=key.generate()), subprocess.DEVNULL
    traffic = netns.python("ttun.lab.traffic")
    with Hosts() as pair, contextlib.ExitStack() as running:
        for host, arguments in (
            (SERVER, netns.python("ttun", "server")),
            (CLIENT, netns.python("ttun", "client", "-s", netns.IPV4[SERVER], "--dev", "office")),
            (SERVER, [*traffic, "serve", "0.0.0.0", "5001"]),
            (CLIENT, ["sh", "-c", LOAD.format(" ".join(traffic))]),
        ):
            ends = pair.start(host, arguments, environment=environment, stdout=quiet, stderr=quiet)
            running.callback(end, ends)
            time.sleep(0.5)  # by then it is ready
        return record(command, 17)


def main(arguments: list[str]) -> None:
    """Draw the command line of the arguments, or without any the pictures of the README."""
    if arguments:
        columns, file, *command = arguments
        draw(" ".join(command), record(command, LONGEST, int(columns)), Path(file), int(columns))
        return
    if not netns.may_make_hosts():
        sys.exit("pictures: recording tunnels between hosts on this machine needs root (use sudo)")
    draw("make demo", record(["make", "demo"], LONGEST), ROOT / "docs/demo.svg")
    show = ["./ttun.py", "show", "office", "--watch"]
    draw(" ".join(show), watch(show), ROOT / "docs/watch.svg")


if __name__ == "__main__":
    main(sys.argv[1:])
