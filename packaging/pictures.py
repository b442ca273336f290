"""``make pictures``: what a terminal shows, recorded and drawn as SVG for the README. As root.

1. Run a command on a pseudo-terminal, and note what is on its screen, and when that changes.
2. Draw each line as a text, visible for as long as it was on the screen; the last screen stays, and
   is all there is where nothing may move.
"""

from __future__ import annotations

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
from itertools import zip_longest
from pathlib import Path

from ttun.commands import key
from ttun.commands.show import CLEAR
from ttun.lab import netns
from ttun.lab.demo import end
from ttun.lab.netns import CLIENT, SERVER, Hosts

ROOT = Path(__file__).resolve().parent.parent
ROWS, COLUMNS = 40, 88
SETTLED = 0.02  # seconds after which a screen counts: what follows sooner belongs to it
LOAD = "sleep 2; {0} flood 10.1.1.1 5001 1 6; sleep 2; {0} drain 10.1.1.1 5001 1 9"
WIDTH, HEIGHT, MARGIN = 7.83, 19, 14  # of a character, of a line, around all: pixels
STYLE = """
text { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  fill: #d6dde6 } .typed { fill: #7ee2a8; font-weight: 600 } .past { visibility: hidden }
@keyframes wait { from, to { visibility: hidden } }
@keyframes show { from, to { visibility: visible } }
@media (prefers-reduced-motion: reduce) { text { animation: none !important } }
"""

Screens = list[tuple[float, list[str]]]  # seconds since the start, the lines that are there then


def record(command: list[str], seconds: float) -> Screens:
    """Run a command until it ends, seconds at most; return what was to be seen."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", ROWS, COLUMNS, 0, 0))
    own = {name: text for name, text in os.environ.items() if "MAKE" not in name}  # not make[1]
    process = subprocess.Popen(
        command, cwd=ROOT, env=own, stdin=theirs, stdout=theirs, stderr=theirs, text=True
    )
    os.close(theirs)
    data, screens, start = b"", Screens(), time.monotonic()
    with contextlib.suppress(OSError):  # EIO: the command has ended
        while select.select([ours], [], [], max(0.0, start + seconds - time.monotonic()))[0]:
            data = (data + os.read(ours, 65536)).rpartition(CLEAR.encode())[2]
            now = time.monotonic() - start
            if screens and now - screens[-1][0] < SETTLED:
                screens.pop()
            screens.append((now, data.decode(errors="ignore").replace("\r", "").splitlines()))
    os.close(ours)
    end(process)
    return screens


def texts(screens: Screens) -> Iterator[tuple[int, str, float, float | None]]:
    """Yield each text: its row, and from when until when it is there; None: to the end."""
    for row in range(max(len(lines) for _, lines in screens)):
        shown = [(when, lines[row] if row < len(lines) else "") for when, lines in screens]
        changed = [now for before, now in zip([(0.0, ""), *shown], shown) if now[1] != before[1]]
        for (since, text), after in zip_longest(changed, changed[1:]):
            if text:
                yield row, text, since, after[0] if after else None


def draw(typed: str, screens: Screens, file: Path) -> None:
    """Draw a command line and what it showed."""
    height = (1 + max(len(lines) for _, lines in screens)) * HEIGHT + 2 * MARGIN
    width, top, typed = round(COLUMNS * WIDTH) + 2 * MARGIN, MARGIN + 13, html.escape(typed)
    svg = f"""\
<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" \
viewBox="0 0 {width} {height}" role="img">
<title>{typed}</title><style>{STYLE}</style>
<rect width="100%" height="100%" rx="8" fill="#171b21"/>
<text class="typed" x="{MARGIN}" y="{top}"># {typed}</text>
"""
    for row, text, since, until in texts(screens):
        play = f"show {until - since:.2f}s {since:.2f}s" if until else f"wait {since:.2f}s"
        past = ' class="past"' if until else ""
        svg += f'<text{past} y="{top + (row + 1) * HEIGHT}" style="animation:{play}">'
        # What stands between wide gaps is in its column whatever the font's width is.
        for part in re.finditer(r"\S+( \S+)*", text):
            svg += f'<tspan x="{MARGIN + part.start() * WIDTH:.0f}"'
            if not part[0].isascii():  # the bars of a graph may come from another font
                svg += f' textLength="{len(part[0]) * WIDTH:.0f}"'
            svg += f">{html.escape(part[0])}</tspan>"
        svg += "</text>\n"
    file.write_text(f"{svg}</svg>\n", encoding="utf-8")
    print(f"{file.relative_to(ROOT)}: {len(screens)} screens, {file.stat().st_size / 1000:.0f} kB")


def watch(command: list[str]) -> Screens:
    """Record a command on a client's host, while a transfer goes up and another one down."""
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
            time.sleep(0.5)  # the one before it is there by then
        return record(command, 17)


if __name__ == "__main__":
    if not netns.may_make_hosts():
        sys.exit("the pictures show tunnels between hosts on this machine: sudo make pictures")
    draw("make demo", record(["make", "demo"], 120), ROOT / "docs/demo.svg")
    show = ["./ttun.py", "show", "office", "--watch"]
    draw(" ".join(show), watch(show), ROOT / "docs/watch.svg")
