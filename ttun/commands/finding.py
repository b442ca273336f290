"""One item of the report of ``ttun doctor``: what was found, its effect, and how to fix it."""

from __future__ import annotations

from dataclasses import dataclass

from ttun.commands.terminal import colored, wrapped
from ttun.errors import printable

OK = "ok"
WARN = "warn"  # a tunnel runs, with a limitation
FAIL = "FAIL"  # no tunnel runs
SKIP = "skip"  # could not be checked
UNREACHED = "no tunnel to this server"  # an effect
COLORS = {OK: "green", WARN: "magenta", FAIL: "red", SKIP: "bold"}


@dataclass(frozen=True)
class Finding:
    """One item of the report."""

    mark: str
    subject: str
    found: str
    effect: str = ""
    fix: str = ""

    def __str__(self) -> str:
        """Return it as it is printed, with the effect and the fix below."""
        lines = wrapped(f"{self.mark:<5} {self.subject:<14} {printable(self.found)}", 21)
        lines[0] = lines[0].replace(self.mark, colored(self.mark, COLORS[self.mark]), 1)
        for name, text in (("effect", self.effect), ("fix", self.fix)):
            if text:
                lines += wrapped(f"{'':21}{name}: {printable(text)}", 23)
        return "\n".join(lines)
