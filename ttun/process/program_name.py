"""The name this program was started under: a link named ``tuntox`` runs ``ttun tox``.

Units and scripts that start tuntox then start this program. Nothing slow is imported here, as
signals.py needs it first.
"""

from __future__ import annotations

import os
import sys

TUNTOX = "tuntox"


def arguments() -> list[str]:
    """Return the arguments of this process as those of ``ttun``."""
    called = os.path.basename(sys.argv[0]) if sys.argv else ""
    return ["tox", *sys.argv[1:]] if called == TUNTOX else sys.argv[1:]
