"""Entry point of every launcher: ``python -m ttun``, the installed ``ttun``, a wheel's script.

The signal handlers are set up first, so that the imports that follow can be interrupted cleanly.
"""

import sys

from ttun.process.signals import end_while_loading


def main() -> int:
    """Run the command line and return its exit code."""
    end_while_loading()
    from ttun.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
