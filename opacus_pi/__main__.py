"""``python -m opacus_pi``: the command line."""

import sys

from opacus_pi.cli import main

if __name__ == "__main__":
    sys.exit(main())
