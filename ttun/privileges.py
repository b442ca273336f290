"""What this process may do, and what nobody may do to it. Source: capabilities(7), prctl(2)."""

from __future__ import annotations

import resource
from pathlib import Path

from ttun.errors import TtunError

NET_ADMIN, SYS_ADMIN = 12, 21  # linux/capability.h


def has(capability: int) -> bool:
    """Return whether this process has a capability in effect."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    effective = int(status.split("CapEff:", 1)[1].split(None, 1)[0], 16)
    return bool(effective >> capability & 1)


def check() -> None:
    """Raise TtunError if this process may not make a network device."""
    if not has(NET_ADMIN):
        raise TtunError("making a TUN device needs root or CAP_NET_ADMIN: run it with sudo")


def forbid_dumps() -> None:
    """Keep what is in memory, keys among it, out of core files and other processes' reach."""
    from ttun._codec import lib

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    lib.ttun_forbid_dumps()
