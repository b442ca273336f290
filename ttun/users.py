"""Names of users, without the codec: for messages of commands that work before make, too."""

from __future__ import annotations

import pwd


def user_name(uid: int) -> str:
    """Return the name of a user; the number if there is none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except (KeyError, OSError):
        return str(uid)
