#!/usr/bin/env python3
"""Run ttun from its source directory: ``./ttun.py server``, after ``make``.

It finds the .venv that make built beside it and goes on in that Python, also under sudo, from any
directory and through a symbolic link. Under sudo it leaves no byte-code of root's in a user's tree.
"""

import os
import sys

HERE = os.path.dirname(os.path.realpath(__file__))
VENV = os.path.join(HERE, ".venv")
PYTHON = os.path.join(VENV, "bin", "python3")

if __name__ == "__main__":
    if os.stat(HERE).st_uid != os.geteuid():
        sys.dont_write_bytecode = True
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # nor do the Pythons that this one starts
    if os.path.realpath(sys.prefix) != os.path.realpath(VENV) and os.path.exists(PYTHON):
        os.execv(PYTHON, [PYTHON, os.path.abspath(__file__), *sys.argv[1:]])  # a link has its name
    sys.path.insert(0, HERE)
    from ttun.__main__ import main
    from ttun.process.signals import end_while_loading

    end_while_loading()
    try:
        import ttun._codec  # noqa: F401 - is it built?
    except ImportError as error:
        sys.exit(f"ttun is not built here ({error}): run make in {HERE}")
    sys.exit(main())
