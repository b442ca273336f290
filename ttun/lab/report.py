"""The files that a benchmark writes. That one cannot be written is said before the measurement."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

from ttun.errors import TtunError, reason


def check(*files: str | None) -> None:
    """Raise TtunError if one of these files cannot be written; None is none."""
    for file in files:
        if file is None:
            continue
        path = Path(file)
        why = 0
        if path.is_dir():
            why = errno.EISDIR
        elif not path.exists() and not path.parent.is_dir():
            why = errno.ENOTDIR if path.parent.exists() else errno.ENOENT
        elif not os.access(path if path.exists() else path.parent, os.W_OK):
            why = errno.EACCES
        if why:
            raise _cannot(path, OSError(why, os.strerror(why)))


def write_json(file: str, report: dict[str, Any]) -> None:
    """Write a report; null stands for a figure that there is not. Raises TtunError."""
    write(Path(file), json.dumps(_finite(report), indent=1, allow_nan=False) + "\n")


def write(file: Path, text: str) -> None:
    """Write a file. Raises TtunError."""
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise _cannot(file, error) from None


def _cannot(file: Path, error: OSError) -> TtunError:
    return TtunError(f"cannot write {file}: {reason(error)}")


def _finite(value: Any) -> Any:
    """Return a value as JSON can hold it, which has no infinity."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
