"""``python -m ttun`` is ``ttun``."""

import sys

from ttun.cli import main

sys.exit(main())
