"""Where every launcher begins: ``python -m ttun``, the installed ``ttun``, a wheel's script.

Signals come first: all that is imported before them cannot be interrupted in good order.
"""

import sys

from ttun.process.signals import end_while_loading


def main() -> int:
    """Run the command line of this process and return its exit code."""
    end_while_loading()
    from ttun.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
