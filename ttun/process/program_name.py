"""The name this program was called by: a link to it that is named ``tuntox`` is ``ttun tox``.

So whatever starts tuntox, a unit or a script, starts this program. Nothing is imported here that
takes time: signals.py asks first of all.
"""

from __future__ import annotations

import os
import sys

TUNTOX = "tuntox"


def arguments() -> list[str]:
    """Return this process's command line behind the program's name, as ``ttun`` takes it."""
    called = os.path.basename(sys.argv[0]) if sys.argv else ""
    return ["tox", *sys.argv[1:]] if called == TUNTOX else sys.argv[1:]
