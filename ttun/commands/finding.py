"""One line of ``ttun doctor``: what was found, what it costs, how to mend it."""

from __future__ import annotations

from dataclasses import dataclass

OK = "ok"
LESS = "less"  # a tunnel runs, at a cost
NO = "no"  # no tunnel runs
UNSEEN = "?"  # could not be looked at
UNREACHED = "no tunnel to this peer"  # what it costs


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was found, what it costs, how to mend it."""

    mark: str
    subject: str
    found: str
    cost: str = ""
    fix: str = ""

    def __str__(self) -> str:
        """Return it as it is printed; cost and fix stand below."""
        lines = [f"{self.mark:<5} {self.subject:<14} {self.found}"]
        if self.cost:
            lines.append(f"{'':<21}costs: {self.cost}")
        if self.fix:
            lines.append(f"{'':<21}fix: {self.fix}")
        return "\n".join(lines)
